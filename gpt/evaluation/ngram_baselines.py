"""How well a model predicts a text: the loss at every token of the validation split, each predicted once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt.data.token_files import Split


def uniform_loss(vocab_size: int) -> float:
    """The loss in nats of somebody who knows nothing but the vocabulary."""
    return float(np.log(vocab_size))


def unigram_loss(train: Split, val_targets: Split, vocab_size: int) -> float:
    """The loss in nats of somebody who knows how frequent each token is in the training split.

    Counts start at one (Laplace), so that what never occurred still has a probability.
    """
    counts = np.bincount(train, minlength=vocab_size) + 1
    return float(-np.log(counts / counts.sum())[val_targets].mean())


def bigram_loss(train: Split, val: Split, vocab_size: int) -> float:
    """The loss in nats of somebody who knows how often each token followed each other one in the training split.

    The first token of `val` is predicted from the last one of `train`. Counts start at one (Laplace).
    """
    pairs, occurrences = np.unique(_pairs(train, vocab_size), return_counts=True)
    starts = np.bincount(train[:-1], minlength=vocab_size)
    wanted = _pairs(np.concatenate([train[-1:], val]), vocab_size)
    places = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    seen = np.where(pairs[places] == wanted, occurrences[places], 0)
    return float(-np.log((seen + 1) / (starts[wanted // vocab_size] + vocab_size)).mean())


def mean_by_position(losses_by_batch: Sequence[Tensor]) -> tuple[list[float], list[int]]:
    """The mean loss at each position of the context, and of how many predictions; the first has one token to go by."""
    length = max(batch.shape[1] for batch in losses_by_batch)
    total, count = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.int64)
    for batch in losses_by_batch:
        total[: batch.shape[1]] += batch.sum(0)
        count[: batch.shape[1]] += batch.shape[0]
    return (total / count).tolist(), count.tolist()


def _pairs(tokens: Split, vocab_size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Each token but the last with the one after it, as one number."""
    wide = tokens.astype(np.int64)
    return wide[:-1] * vocab_size + wide[1:]
