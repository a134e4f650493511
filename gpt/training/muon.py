"""Muon, an optimizer for matrices (Jordan et al. 2024), whose work the ranks share."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steep at zero, so that few rounds are enough
ROUNDS = 5
WARM_UP_STEPS, FIRST_MOMENTUM = 100, 0.85  # the first gradients turn quickly and are not worth remembering


class Ranks(Protocol):
    """Those who share the work."""

    @property
    def rank(self) -> int:
        """Which of them this process is, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def exchange(self, tensors: Sequence[Tensor]) -> None:
        """Fill in what the others computed: where this rank has zeros."""


class Muon(torch.optim.Optimizer):
    """Steps whose matrices are orthogonal, so that all directions of a layer learn equally fast (Jordan et al. 2024).

    Each step goes along the orthogonal matrix that is nearest to the momentum. Finding it costs a good part of a step,
    so the ranks share out the matrices and exchange what they found.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        ranks: Ranks,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": 0})
        self._ranks = ranks

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: nothing here computes a loss again
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            group["steps"] += 1
            weights = [weight for weight in group["params"] if weight.grad is not None]
            updates = self._orthogonal([self._aim(weight, group) for weight in weights])
            for weight, update in zip(weights, updates, strict=True):
                height, width = weight.shape
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, height / width)))

    def _aim(self, weight: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """Nesterov's momentum: the mean of past gradients, seen from one step ahead."""
        assert weight.grad is not None
        share = min(1.0, group["steps"] / WARM_UP_STEPS)
        momentum = FIRST_MOMENTUM + share * (group["momentum"] - FIRST_MOMENTUM)
        mean: Tensor = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        mean.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(mean, momentum)

    def _orthogonal(self, aims: list[Tensor]) -> list[Tensor]:
        """The orthogonal matrix nearest to each; those of one shape, lying or standing, are computed together."""
        lying = [aim.T if aim.shape[0] > aim.shape[1] else aim for aim in aims]
        shapes = sorted({matrix.shape for matrix in lying})
        stacks = [torch.stack([matrix for matrix in lying if matrix.shape == shape]).bfloat16() for shape in shapes]
        for stack in stacks:
            begin, end = (len(stack) * rank // self._ranks.size for rank in (self._ranks.rank, self._ranks.rank + 1))
            mine = orthogonalize(stack[begin:end])
            stack.zero_()[begin:end] = mine
        self._ranks.exchange(stacks)
        found = {shape: iter(stack) for shape, stack in zip(shapes, stacks, strict=True)}
        updates = [next(found[matrix.shape]) for matrix in lying]
        return [update.T if aim.shape[0] > aim.shape[1] else update for aim, update in zip(aims, updates, strict=True)]


def orthogonalize(matrices_NRC: Tensor) -> Tensor:
    """Bring all singular values near 1 (0.7 to 1.2) and leave the singular vectors, by Newton-Schulz iterations.

    Args:
        matrices_NRC: a stack of N matrices with no more rows than columns.
    """
    linear, cubic, quintic = NEWTON_SCHULZ
    x_NRC: Tensor = matrices_NRC / (matrices_NRC.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        square_NRR = x_NRC @ x_NRC.mT
        x_NRC = linear * x_NRC + (cubic * square_NRR + quintic * square_NRR @ square_NRR) @ x_NRC
    return x_NRC
