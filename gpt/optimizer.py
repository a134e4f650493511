"""The optimizer and its learning rate over the steps."""

import math

import torch
from torch import nn


def make_optimizer(
    model: nn.Module, *, learning_rate: float, beta1: float, beta2: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with weight decay on matrices only: norms have nothing to shrink towards."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": weight_decay},
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)


def learning_rate_at(
    step: int, *, max_steps: int, warmup_steps: int, learning_rate: float, min_learning_rate: float
) -> float:
    """The learning rate of step 1, 2, …, max_steps: a linear rise, then half a cosine (Loshchilov & Hutter 2017)."""
    if step <= warmup_steps:
        return learning_rate * step / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return min_learning_rate + (learning_rate - min_learning_rate) * 0.5 * (1 + math.cos(math.pi * progress))
