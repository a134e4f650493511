"""The batches: random windows to train on, and windows that cover the validation split exactly once."""

import numpy as np
import torch

from gpt.token_files import Split, TokenData


def random_windows(split: Split, *, count: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw windows at random starts, with replacement, from torch's current random state.

    Returns:
        Inputs and targets, each of shape (count, block_size), int64: the target of a token is the token after it.
    """
    starts = torch.randint(len(split) - block_size, (count,)).numpy()
    windows = torch.from_numpy(split[starts[:, None] + np.arange(block_size + 1)].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def covering_windows(data: TokenData, *, block_size: int, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
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
