"""Muon, an optimizer for matrices (Jordan et al. 2024); the ranks share its work."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gpt.training.distributed import Group

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steep at zero, so that few iterations are enough
ITERATIONS = 5
WARMUP_STEPS, INITIAL_MOMENTUM = 100, 0.85  # the first gradients change direction quickly


class Muon(torch.optim.Optimizer):
    """Updates by orthogonal matrices, so that all directions of a layer learn equally fast (Jordan et al. 2024).

    Each update is the orthogonal matrix nearest to the momentum. Finding it takes a good part of a step, so each rank
    orthogonalizes some of the matrices.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], ranks: Group, *, lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": 0})
        self._ranks = ranks

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the loss is never computed again
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            group["steps"] += 1
            weights = [weight for weight in group["params"] if weight.grad is not None]
            updates = self._orthogonal([self._momentum(weight, group) for weight in weights])
            for weight, update in zip(weights, updates, strict=True):
                rows, columns = weight.shape
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))

    def _momentum(self, weight: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """Nesterov momentum: the mean of past gradients, one step ahead."""
        assert weight.grad is not None
        warmup = min(1.0, group["steps"] / WARMUP_STEPS)
        momentum = INITIAL_MOMENTUM + warmup * (group["momentum"] - INITIAL_MOMENTUM)
        mean: Tensor = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        mean.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(mean, momentum)

    def _orthogonal(self, matrices: list[Tensor]) -> list[Tensor]:
        """Return the orthogonal matrix nearest to each.

        Matrices of one shape are stacked, tall ones transposed. Each rank orthogonalizes its part of each stack.
        Example with 2 ranks: matrices 0 to 3 of shapes (8, 8), (32, 8), (8, 32), (8, 8) give the stacks [0, 3] of
        shape (8, 8) and [1 transposed, 2] of shape (8, 32); rank 0 computes 0 and 1, rank 1 computes 3 and 2.
        """
        wide = [matrix.T if matrix.shape[0] > matrix.shape[1] else matrix for matrix in matrices]
        shapes = dict.fromkeys(matrix.shape for matrix in wide)
        stacks = [torch.stack([matrix for matrix in wide if matrix.shape == shape]).bfloat16() for shape in shapes]
        for stack in stacks:
            begin, end = (len(stack) * rank // self._ranks.size for rank in (self._ranks.rank, self._ranks.rank + 1))
            result = orthogonalize(stack[begin:end])
            stack.zero_()[begin:end] = result
        self._ranks.all_gather_parts(stacks)
        results = {stack.shape[1:]: iter(stack) for stack in stacks}
        wide = [next(results[matrix.shape]) for matrix in wide]
        return [new.T if old.shape[0] > old.shape[1] else new for old, new in zip(matrices, wide, strict=True)]


def orthogonalize(matrices_NRC: Tensor) -> Tensor:
    """Bring all singular values near 1 (0.7 to 1.2), with the same singular vectors, by Newton-Schulz iterations.

    Args:
        matrices_NRC: a stack of N matrices with no more rows than columns.
    """
    linear, cubic, quintic = NEWTON_SCHULZ
    x_NRC: Tensor = matrices_NRC / (matrices_NRC.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square_NRR = x_NRC @ x_NRC.mT
        x_NRC = linear * x_NRC + (cubic * square_NRR + quintic * square_NRR @ square_NRR) @ x_NRC
    return x_NRC
