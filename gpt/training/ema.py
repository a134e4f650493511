"""A moving average of the weights, which predicts better than the weights of any single step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of a model's weights (Polyak & Juditsky 1992; Izmailov et al. 2018).

    Args:
        decay: the part of the average that a step keeps; 0.99 averages over about 100 steps. It is smaller in the
            first steps, so that the random initial weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        self._model, self._decay = model, decay

    def update(self, step: int) -> None:
        """Include the weights after a step, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        current = self._model.state_dict()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.lerp_(current[name], 1 - decay)

    def restore(self, weights: dict[str, Tensor]) -> None:
        """Continue from a saved average."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give the model the average for its weights within the block."""
        current = {name: weight.detach().clone() for name, weight in self._model.state_dict().items()}
        self._model.load_state_dict(self.weights)
        try:
            yield
        finally:
            self._model.load_state_dict(current)
