"""Calibration (Guo et al. 2017, section 2): how well predicted probabilities agree with the accuracy."""

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

BINS = 10  # of equal width, by the probability of the most probable token

Numbers = np.ndarray[tuple[int], np.dtype[Any]]


def predictions(
    model: nn.Module, batches: Sequence[Batch], device: torch.device, precision: torch.dtype
) -> tuple[list[Tensor], Numbers, Numbers]:
    """Predict every target once. On a CPU, several batches run in parallel, each on one core: same bits for any number.

    Args:
        precision: of matrix products.

    Returns:
        The losses as in `token_losses`; for every target the probability of the most probable token, and whether this
        token is the target, each of shape (targets,).
    """

    def predict(batch: Batch) -> tuple[Tensor, Numbers, Numbers]:
        mixed = precision != torch.float32
        # Both modes are thread-local: they have to be entered in the worker thread.
        with torch.inference_mode(), torch.autocast(device.type, precision, enabled=mixed):
            loss_BT, logits_BTV, targets_BT = batch_losses(model, batch, device)
            top_BT, token_BT = logits_BTV.float().softmax(-1).max(-1)
            correct_BT = token_BT == targets_BT
        return loss_BT, top_BT.flatten().cpu().double().numpy(), correct_BT.flatten().cpu().numpy()

    workers = usable_cores() if device.type == "cpu" else 1
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(CPU_THREADS,))
    with eval_mode(model), pool:
        losses, probability, correct = zip(*pool.map(predict, batches), strict=True)
    return list(losses), np.concatenate(probability), np.concatenate(correct)


def calibration_table(probability: Numbers, correct: Numbers) -> pd.DataFrame:
    """The data of a reliability diagram: accuracy by predicted probability.

    Returns:
        For every bin that is not empty, in ascending order: the mean `probability`, the accuracy `right`, the accuracy
        `ideal` of a perfectly calibrated model, which equals the probability, and the number of `predictions`.
    """
    bins = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    filled = count > 0
    mean = np.bincount(bins, probability, minlength=BINS)[filled] / count[filled]
    accuracy = np.bincount(bins, correct, minlength=BINS)[filled] / count[filled]
    return pd.DataFrame({"probability": mean, "right": accuracy, "ideal": mean, "predictions": count[filled]})


def calibration_error(table: pd.DataFrame) -> float:
    """Expected calibration error: the mean difference between accuracy and probability over all predictions."""
    return float(np.average((table["right"] - table["probability"]).abs(), weights=table["predictions"]))
