"""N-gram losses and mean losses by position, calculated by hand."""

import math

import numpy as np
import pytest
import torch

from gpt.evaluation.ngram_baselines import bigram_loss, loss_by_position, unigram_loss


def test_ngram_losses_by_hand() -> None:
    train, val = np.array([0, 1, 0, 1, 0, 2], dtype="<u2"), np.array([0, 2], dtype="<u2")
    # With add-one smoothing, unigrams: 4, 3, 2 of 9.
    assert unigram_loss(train, val, 3) == pytest.approx(-(math.log(4 / 9) + math.log(2 / 9)) / 2)
    # Bigrams: (2, 0) of none that start with 2: 1/3; (0, 2) once among 01, 01, 02: (1 + 1) / (3 + 3).
    assert bigram_loss(train, val, 3) == pytest.approx(-(math.log(1 / 3) + math.log(2 / 6)) / 2)


def test_loss_by_position_by_hand() -> None:
    batches = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double(), torch.tensor([[8.0]]).double()]
    assert loss_by_position(batches).to_dict("list") == {"position": [1, 2], "loss": [4.0, 3.0], "predictions": [3, 2]}
