"""Predictions of the validation split, the calibration table and the expected calibration error."""

import numpy as np
import pandas as pd
import pytest
import torch

from gpt.data.dataset import evaluation_windows
from gpt.data.loss import token_losses
from gpt.data.token_files import TokenData
from gpt.evaluation.calibration import calibration_error, calibration_table, predictions
from gpt.model.gpt import GPT
from tests.support.common import model_params


def test_predictions_agree_with_the_losses(data: TokenData) -> None:
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    model = GPT(model_params(n_layer=1, n_head=1, n_embd=8, block_size=16, dropout=0.5), data.meta.vocab_size)
    torch.nn.init.normal_(model.token_embedding.weight, std=0.5)
    windows = evaluation_windows(data, block_size=16, batch_size=50)
    by_batch, probability, correct = predictions(model, windows, cpu, torch.float32)
    for parallel, serial in zip(by_batch, token_losses(model, windows, cpu), strict=True):
        assert torch.equal(parallel, serial)
    assert model.training
    target_probability = torch.cat([batch.flatten() for batch in by_batch]).neg().exp().numpy()
    assert len(target_probability) == len(probability) == len(correct) == len(data.val)
    assert target_probability[correct] == pytest.approx(probability[correct])
    assert (target_probability[~correct] <= probability[~correct]).all()
    assert 0 < correct.sum() < len(correct)


def test_calibration_by_hand() -> None:
    probability = np.array([0.15, 0.19, 1.0, 0.94, 0.3])
    table = calibration_table(probability, np.array([True, False, True, True, False]))
    columns = {"probability": [0.17, 0.3, 0.97], "right": [0.5, 0.0, 1.0], "ideal": [0.17, 0.3, 0.97]}
    pd.testing.assert_frame_equal(table, pd.DataFrame({**columns, "predictions": [2, 1, 2]}))
    assert calibration_error(table) == pytest.approx((2 * 0.33 + 0.3 + 2 * 0.03) / 5)
