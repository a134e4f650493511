"""An average of the weights over the last steps, which predicts better than the weights of any one of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of a model's weights (Polyak & Juditsky 1992; Izmailov et al. 2018).

    Args:
        decay: how much of the average a step keeps; 0.99 averages over about 100 steps. In the first steps it is less,
            so that the random first weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        self._model, self._decay = model, decay

    def update(self, step: int) -> None:
        """Take in the weights after a step; the first is 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        now = self._model.state_dict()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.lerp_(now[name], 1 - decay)

    def restore(self, weights: dict[str, Tensor]) -> None:
        """Continue from an average that `weights` held."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Meanwhile the model has the average for its weights."""
        own = {name: weight.detach().clone() for name, weight in self._model.state_dict().items()}
        self._model.load_state_dict(self.weights)
        try:
            yield
        finally:
            self._model.load_state_dict(own)
