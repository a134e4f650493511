"""The batches: random windows to train on, and windows that cover the validation split exactly once."""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from gpt.core.errors import UserError
from gpt.data.token_files import Split, TokenData

Numbers = np.ndarray[Any, np.dtype[np.int64]]

MIN_BLOCKS = 4  # in each split; on fewer, the loss says more about the place than about the model


def check_lengths(data: TokenData, *, block_size: int) -> None:
    """Refuse a text that is too short to train on with this block size.

    Raises:
        UserError: one of the splits has fewer than `MIN_BLOCKS` blocks.
    """
    needed = MIN_BLOCKS * block_size
    if min(len(data.train), len(data.val)) < needed:
        raise UserError(
            f"the text is too short: expected at least {needed:,} tokens in each split ({MIN_BLOCKS} blocks of "
            f"model.block_size {block_size:,}), found {len(data.train):,} to train on and {len(data.val):,} to "
            f"validate on; {_remedies(len(data.train), len(data.val), needed)}"
        )


def shuffled_windows(
    split: Split, *, first: int, count: int, block_size: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take windows first, first + 1, … of an endless row of epochs: each visits every place of the split once.

    In every epoch the split is cut at other places and its windows are shuffled anew.

    Returns:
        Inputs and targets as `random_windows` gives them.
    """
    windows = _windows_an_epoch(len(split), block_size)
    numbers = np.arange(first, first + count)
    epochs, places = numbers // windows, numbers % windows
    starts = np.array([_starts(len(split), block_size, seed, int(e))[p] for e, p in zip(epochs, places, strict=True)])
    return _windows_at(split, starts, block_size)


def random_windows(split: Split, *, count: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw windows at random starts, with replacement, from torch's current random state.

    Returns:
        Inputs and targets, each of shape (count, block_size), int64: the target of a token is the token after it.
    """
    return _windows_at(split, torch.randint(len(split) - block_size, (count,)).numpy(), block_size)


def evaluation_windows(data: TokenData, *, block_size: int, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cut the validation split so that every one of its tokens is a target exactly once.

    The token before the first target is the last one of the training split: the text goes on there.

    Returns:
        Batches of inputs and targets, each of shape (≤ batch_size, ≤ block_size): full blocks in order, then, in a
        batch of its own, the shorter rest.
    """
    stream = torch.from_numpy(np.concatenate([data.train[-1:], data.val]).astype(np.int64))
    inputs, targets = stream[:-1], stream[1:]
    full = len(targets) // block_size * block_size
    batches = list(
        zip(
            torch.split(inputs[:full].view(-1, block_size), batch_size),
            torch.split(targets[:full].view(-1, block_size), batch_size),
            strict=True,
        )
    )
    if full < len(targets):
        batches.append((inputs[None, full:], targets[None, full:]))
    return batches


def _windows_at(split: Split, starts: Numbers, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    windows = torch.from_numpy(split[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def _windows_an_epoch(length: int, block_size: int) -> int:
    """How many windows with their targets fit, wherever in the first block the first one starts."""
    return (length - 1) // block_size - 1


@lru_cache(maxsize=2)  # a step may lie across the border of two epochs
def _starts(length: int, block_size: int, seed: int, epoch: int) -> Numbers:
    """Where the windows of an epoch start, in their order."""
    chance = np.random.Generator(np.random.PCG64([seed, epoch]))
    first = chance.integers(block_size)
    return first + block_size * chance.permutation(_windows_an_epoch(length, block_size))


def _remedies(train: int, val: int, needed: int) -> str:
    """What makes both splits at least as long as needed, the least effort first."""
    shorter, total = min(train, val), train + val
    found = []
    if shorter >= MIN_BLOCKS:
        found.append(f"set model.block_size to at most {shorter // MIN_BLOCKS}")
    if total >= 2 * needed:
        percent = 100 * needed / total
        bound = f"at most {math.floor(100 - percent) / 100}" if val < needed else f"at least {math.ceil(percent) / 100}"
        found.append(f"set tokenize.train_fraction to {bound}")
    return ", or ".join([*found, f"take a text of {math.ceil(total * needed / shorter):,} tokens or more"])
