"""Sampling: from scores to the next token, one token after the other, for several texts side by side."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from gpt.core.params import Section


class SamplingParams(Section):
    """How text is sampled. The only settings with defaults, so that a checkpoint alone is enough to make text."""

    max_new_tokens: int = Field(default=500, ge=1)
    temperature: float = Field(default=0.8, ge=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    seed: int = Field(default=1337, ge=0)


def filtered(logits_BV: Tensor, seen_BV: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities to draw from: what was seen already is made less likely, then the temperature, then the filters.

    Args:
        seen_BV: which tokens a text, with its prompt, holds already.
    """
    logits_BV = with_temperature(penalise(logits_BV, seen_BV, params.repetition_penalty), params.temperature)
    logits_BV = keep_top_p(keep_top_k(logits_BV, params.top_k), params.top_p)
    return keep_min_p(logits_BV, params.min_p).softmax(-1)


def penalise(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Divide positive scores of seen tokens by it, multiply negative ones with it (Keskar et al. 2019, section 4.1)."""
    return torch.where(seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def with_temperature(logits_BV: Tensor, temperature: float) -> Tensor:
    """Sharpen the choice below 1, flatten it above; 0 leaves the highest score alone, the first of equal ones."""
    if temperature == 0:
        return torch.full_like(logits_BV, -torch.inf).scatter(-1, logits_BV.argmax(-1, keepdim=True), 0.0)
    # Subtract the maximum first: at a tiny temperature the quotient alone would overflow.
    return (logits_BV - logits_BV.max(-1, keepdim=True).values) / temperature


def keep_top_k(logits_BV: Tensor, k: int | None) -> Tensor:
    """Rule out all but the k highest scores (Fan et al. 2018, section 5.4); None and a k over V keep all."""
    if k is None or k >= logits_BV.shape[-1]:
        return logits_BV
    return logits_BV.masked_fill(logits_BV < logits_BV.topk(k).values[..., -1:], -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float | None) -> Tensor:
    """Keep the fewest tokens, likeliest first, that together have probability p (Holtzman et al. 2020, section 3.1)."""
    if p is None or p >= 1:
        return logits_BV
    probabilities_BV, order_BV = logits_BV.softmax(-1).sort(descending=True, stable=True)
    needless_BV = probabilities_BV.cumsum(-1) - probabilities_BV >= p  # those before have it already
    return logits_BV.masked_fill(needless_BV.scatter(-1, order_BV, needless_BV), -torch.inf)


def keep_min_p(logits_BV: Tensor, p: float | None) -> Tensor:
    """Rule out what is less likely than p times the likeliest token (Nguyen et al. 2024, section 3)."""
    if not p:
        return logits_BV
    probabilities_BV = logits_BV.softmax(-1)
    return logits_BV.masked_fill(probabilities_BV < p * probabilities_BV.max(-1, keepdim=True).values, -torch.inf)


def draw(probabilities_BV: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
    """Draw one token for each text, each with its own generator."""
    return [
        int(torch.multinomial(probabilities_V, 1, generator=generator))
        for probabilities_V, generator in zip(probabilities_BV, generators, strict=True)
    ]
