"""The optimizers (AdamW, or Muon for the matrices of the blocks and AdamW for the rest) and their learning rates."""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from gpt.core.params import Count, PositiveFloat, Section
from gpt.training.distributed import Group
from gpt.training.muon import Muon


class OptimizerParams(Section):
    """The keys of the section `train` that the optimizers use."""

    max_steps: Count
    optimizer: Literal["adamw", "muon"]
    learning_rate: PositiveFloat
    min_learning_rate: float = Field(ge=0, le=1e12)
    warmup_steps: int = Field(ge=0, le=10**9)
    schedule: Literal["cosine", "linear"]
    beta1: float = Field(ge=0, lt=1)
    beta2: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0, le=1e12)
    muon_learning_rate: PositiveFloat
    muon_momentum: float = Field(ge=0, lt=1)
    muon_weight_decay: float = Field(ge=0, le=1e12)

    @model_validator(mode="after")
    def _min_is_below_max(self) -> "OptimizerParams":
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate: expected at most learning_rate ({self.learning_rate}), found "
                f"{self.min_learning_rate}; lower it"
            )
        return self


def make_optimizers(params: OptimizerParams, model: nn.Module, ranks: Group) -> list[torch.optim.Optimizer]:
    """Return AdamW (Loshchilov & Hutter 2019), after Muon if the params select it.

    AdamW's weight decay applies to embeddings and matrices, not to norms and biases.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    inner = {name for name, weight in weights.items() if name.startswith("blocks.") and weight.dim() == 2}
    matrices = inner if params.optimizer == "muon" else set()
    others = [weight for name, weight in weights.items() if name not in matrices]
    adamw = torch.optim.AdamW(
        [
            {"params": [weight for weight in others if weight.dim() >= 2], "weight_decay": params.weight_decay},
            {"params": [weight for weight in others if weight.dim() < 2], "weight_decay": 0.0},
        ],
        lr=params.learning_rate,
        betas=(params.beta1, params.beta2),
        fused=True,
    )
    if not matrices:
        return [adamw]
    muon = Muon(
        [weights[name] for name in sorted(matrices)],
        ranks,
        lr=params.muon_learning_rate,
        momentum=params.muon_momentum,
        weight_decay=params.muon_weight_decay,
    )
    return [muon, adamw]


def learning_rate_at(step: int, params: OptimizerParams) -> float:
    """AdamW's learning rate at step 1, 2, …, max_steps; Muon's is proportional to it.

    After a linear warm-up it decays along half a cosine (Loshchilov & Hutter 2017) or a line (Defazio et al. 2023).
    """
    highest, lowest = params.learning_rate, params.min_learning_rate
    if step <= params.warmup_steps:
        return highest * step / (params.warmup_steps + 1)
    progress = (step - params.warmup_steps) / max(1, params.max_steps - params.warmup_steps)
    factor = 0.5 * (1 + math.cos(math.pi * progress)) if params.schedule == "cosine" else 1 - progress
    return lowest + (highest - lowest) * factor
