"""Calibration: of the predictions that a model makes with 70 %, are 70 % right? (Guo et al. 2017, section 2)."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gpt.data.loss import Batch, batch_losses, eval_mode
from gpt.launch import usable_cores
from gpt.model.device import CPU_THREADS

BINS = 10  # equally wide, of the probability of the likeliest token

Numbers = np.ndarray[tuple[int], np.dtype[Any]]


def predictions(
    model: nn.Module, batches: Sequence[Batch], device: torch.device, precision: torch.dtype
) -> tuple[list[Tensor], Numbers, Numbers]:
    """Predict every target once; on a CPU several batches side by side, each on one core and so with the same bits.

    Args:
        precision: of matrix products.

    Returns:
        The losses as `gpt.scoring.losses` gives them; for every prediction the probability of the token that the model
        takes for the likeliest, and whether that token came, each of shape (targets,).
    """

    def predict(batch: Batch) -> tuple[Tensor, Numbers, Numbers]:
        mixed = precision != torch.float32
        with torch.inference_mode(), torch.autocast(device.type, precision, enabled=mixed):  # known to one thread only
            loss_BT, logits_BTV, targets_BT = batch_losses(model, batch, device)
            top_BT, token_BT = logits_BTV.float().softmax(-1).max(-1)
            right_BT = token_BT == targets_BT
        return loss_BT, top_BT.flatten().cpu().double().numpy(), right_BT.flatten().cpu().numpy()

    workers = usable_cores() if device.type == "cpu" else 1
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(CPU_THREADS,))
    with eval_mode(model), pool:
        losses, probability, right = zip(*pool.map(predict, batches), strict=True)
    return list(losses), np.concatenate(probability), np.concatenate(right)


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
