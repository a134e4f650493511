"""Calibration: of the predictions that a model makes with 70 %, are 70 % right? (Guo et al. 2017, section 2)."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gpt.scoring import Batch, scored

BINS = 10  # equally wide, of the probability of the likeliest token

Numbers = np.ndarray[tuple[int], np.dtype[Any]]


@torch.inference_mode()
def predictions(
    model: nn.Module, batches: Iterable[Batch], device: torch.device
) -> tuple[list[Tensor], Numbers, Numbers]:
    """Predict every target once.

    Returns:
        The losses as `gpt.scoring.losses` gives them; for every prediction the probability of the token that the model
        takes for the likeliest, and whether that token came, each of shape (targets,).
    """
    losses, probability, right = [], [], []
    for loss_BT, logits_BTV, targets_BT in scored(model, batches, device):
        top_BT, token_BT = logits_BTV.float().softmax(-1).max(-1)
        losses.append(loss_BT)
        probability.append(top_BT.flatten().cpu().double().numpy())
        right.append((token_BT == targets_BT).flatten().cpu().numpy())
    return losses, np.concatenate(probability), np.concatenate(right)


def calibration_table(probability: Numbers, right: Numbers) -> pd.DataFrame:
    """Predictions of about the same probability, and the share of them that were right.

    Returns:
        For every bin that holds predictions, from the least probable on: their mean `probability`, the share `right`,
        the share `ideal` of a perfectly calibrated model, which is the probability, and how many `predictions`.
    """
    bins = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    filled = count > 0
    mean = np.bincount(bins, probability, minlength=BINS)[filled] / count[filled]
    share = np.bincount(bins, right, minlength=BINS)[filled] / count[filled]
    return pd.DataFrame({"probability": mean, "right": share, "ideal": mean, "predictions": count[filled]})


def calibration_error(table: pd.DataFrame) -> float:
    """How far the share of right predictions is from their probability, on average (expected calibration error)."""
    return float(np.average((table["right"] - table["probability"]).abs(), weights=table["predictions"]))
