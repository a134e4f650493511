"""Windows of the token files: random or shuffled ones for training, consecutive ones for evaluation."""

from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from typing import Any, overload

import numpy as np
import torch

from gpt.core.errors import UserError
from gpt.data.token_files import Split, TokenData

Numbers = np.ndarray[Any, np.dtype[np.int64]]
Windows = tuple[torch.Tensor, torch.Tensor]

MIN_BLOCKS = 4  # of each split; the loss over fewer blocks depends too much on where they are


def check_lengths(data: TokenData, *, block_size: int) -> None:
    """Raise a UserError if a split has fewer than `MIN_BLOCKS` blocks of this size."""
    found, required = (len(data.train), len(data.val)), MIN_BLOCKS * block_size
    if min(found) < required:
        longest = max(min(found) // MIN_BLOCKS, 1)
        raise UserError(
            f"the text is too short: expected at least {required:,} tokens in each split ({MIN_BLOCKS} blocks of "
            f"model.block_size {block_size:,}), found {found[0]:,} to train on and {found[1]:,} to validate on; use a "
            f"longer text, change tokenize.train_fraction, or set model.block_size to at most {longest:,}"
        )


def shuffled_windows(
    split: Split, *, first: int, count: int, block_size: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows first, first + 1, … of an endless sequence of epochs; an epoch covers the split once.

    Each epoch starts at another offset and shuffles its windows in another order.

    Returns:
        Inputs and targets as in `random_windows`.
    """
    windows = _windows_per_epoch(len(split), block_size)
    epochs, indices = np.divmod(np.arange(first, first + count), windows)
    starts = [_epoch_starts(len(split), block_size, seed, int(e))[i] for e, i in zip(epochs, indices, strict=True)]
    return _windows_at(split, np.array(starts), block_size)


def random_windows(split: Split, *, count: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample windows at random starts, with replacement, with torch's default generator.

    Returns:
        Inputs and targets, each of shape (count, block_size), int64: the target of a token is the token after it.
    """
    return _windows_at(split, torch.randint(len(split) - block_size, (count,)).numpy(), block_size)


def evaluation_windows(data: TokenData, *, block_size: int, batch_size: int) -> "EvaluationWindows":
    """Split the validation tokens into windows such that each of them is a target exactly once.

    The input of the first target is the last token of the training split.

    Returns:
        Batches of inputs and targets, each of shape (≤ batch_size, ≤ block_size): full blocks in order, then a batch
        with the shorter remainder.
    """
    return EvaluationWindows(data, block_size, batch_size)


class EvaluationWindows(Sequence[Windows]):
    """The batches of `evaluation_windows`, read from the token file when they are used: the split may be large."""

    def __init__(self, data: TokenData, block_size: int, batch_size: int) -> None:
        self._previous, self._val = data.train[-1:], data.val
        self._block_size, self._batch_size = block_size, batch_size
        self._full = len(data.val) // block_size * block_size  # tokens in full blocks
        remainder = self._full < len(data.val)
        self._numbers = range(-(-self._full // (block_size * batch_size)) + remainder)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Windows: ...

    @overload
    def __getitem__(self, index: slice) -> "EvaluationWindows": ...

    def __getitem__(self, index: int | slice) -> "Windows | EvaluationWindows":
        if isinstance(index, slice):
            part = copy(self)
            part._numbers = self._numbers[index]
            return part
        batch = self._block_size * self._batch_size
        begin = min(self._numbers[index] * batch, self._full)
        end = min(begin + batch, self._full) if begin < self._full else len(self._val)
        before = self._val[begin - 1 : begin] if begin else self._previous
        tokens = torch.from_numpy(np.concatenate([before, self._val[begin:end]]).astype(np.int64))
        (windows,) = consecutive_windows(tokens, block_size=self._block_size, batch_size=self._batch_size)
        return windows


def consecutive_windows(
    tokens: torch.Tensor, *, block_size: int, batch_size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Split tokens into windows as `evaluation_windows` does; all but the first token are targets."""
    inputs, targets = tokens[:-1], tokens[1:]
    full = len(targets) // block_size * block_size
    windows = (torch.split(part[:full].view(-1, block_size), batch_size) for part in (inputs, targets))
    batches = list(zip(*windows, strict=True)) if full else []
    if full < len(targets):
        batches.append((inputs[None, full:], targets[None, full:]))
    return batches


def _windows_at(split: Split, starts: Numbers, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    windows = torch.from_numpy(split[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def _windows_per_epoch(length: int, block_size: int) -> int:
    """Number of windows, with their targets, that fit at every offset below the block size."""
    return (length - 1) // block_size - 1


@lru_cache(maxsize=2)  # a batch may contain windows of two epochs
def _epoch_starts(length: int, block_size: int, seed: int, epoch: int) -> Numbers:
    """The start of each window of an epoch, in shuffled order."""
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    offset = generator.integers(block_size)
    starts: Numbers = generator.permutation(_windows_per_epoch(length, block_size))
    starts *= block_size  # in place: of a large text there are many
    starts += offset
    return starts
