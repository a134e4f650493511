"""The weight average: its values, and that it is evaluated and kept."""

import pytest
import torch
from torch import nn

from gpt.data.token_files import TokenData
from gpt.training.distributed import process_group
from gpt.training.ema import WeightAverage
from tests.support.common import make_trainer


def test_the_average_equals_hand_computed_values() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(10.0)
        average = WeightAverage(model, decay=0.2)
        model.weight.fill_(0.0)
        average.update(step=1)  # decay (1 + 1) / (10 + 1)
        assert float(average.weights["weight"]) == pytest.approx(10 * 2 / 11)
        average.update(step=5)  # decay 0.2 from now on
        assert float(average.weights["weight"]) == pytest.approx(10 * 2 / 11 * 0.2)
        with average.in_use():
            assert torch.equal(model.weight, average.weights["weight"])
        assert float(model.weight) == 0.0


def test_the_average_is_evaluated_and_kept(data: TokenData) -> None:
    with process_group(torch.device("cpu"), timeout_s=30) as group:
        trainer = make_trainer(data, group, train__weight_average=0.9)
        for _ in range(10):
            trainer.train_step()
        loss = trainer.evaluate()
        assert trainer.average
        for name, weight in trainer.best.items():
            assert torch.equal(weight, trainer.average.weights[name])
        assert not torch.equal(trainer.best["output.weight"], trainer.model.state_dict()["output.weight"])
        trainer.model.load_state_dict(trainer.best)
        trainer.average = None
        assert trainer.evaluate() == loss
