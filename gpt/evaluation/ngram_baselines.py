"""Losses of n-gram models, as baselines, and the mean loss by position in the context."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gpt.data.token_files import Split


def unigram_loss(train: Split, val_targets: Split, vocab_size: int) -> float:
    """The loss in nats of token frequencies in the training split, with add-one (Laplace) smoothing."""
    counts = np.bincount(train, minlength=vocab_size) + 1
    return float(-np.log(counts / counts.sum())[val_targets].mean())


def bigram_loss(train: Split, val: Split, vocab_size: int) -> float:
    """The loss in nats of bigram frequencies in the training split, with add-one (Laplace) smoothing.

    The first token of `val` is predicted from the last one of `train`.
    """
    bigrams, counts = np.unique(_bigrams(train, vocab_size), return_counts=True)
    first_counts = np.bincount(train[:-1], minlength=vocab_size)
    targets = _bigrams(np.concatenate([train[-1:], val]), vocab_size)
    indices = np.searchsorted(bigrams, targets).clip(max=len(bigrams) - 1)
    target_counts = np.where(bigrams[indices] == targets, counts[indices], 0)
    return float(-np.log((target_counts + 1) / (first_counts[targets // vocab_size] + vocab_size)).mean())


def loss_by_position(losses_by_batch: Sequence[Tensor]) -> pd.DataFrame:
    """The mean loss at each `position` of the context, from 1, and the number of `predictions` there."""
    length = max(batch.shape[1] for batch in losses_by_batch)
    total, count = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.int64)
    for batch in losses_by_batch:
        total[: batch.shape[1]] += batch.sum(0)
        count[: batch.shape[1]] += batch.shape[0]
    columns = {"position": np.arange(1, length + 1), "loss": (total / count).numpy(), "predictions": count.numpy()}
    return pd.DataFrame(columns)


def _bigrams(tokens: Split, vocab_size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Each pair of consecutive tokens as one number."""
    wide = tokens.astype(np.int64)
    return wide[:-1] * vocab_size + wide[1:]
