"""Sampling: from logits to the next token. Shapes: B sequences, V tokens of the vocabulary."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from gpt.core.params import Count, PositiveFloat, Probability, Section, Seed

MIN_TEMPERATURE = 1e-12  # below, quotients would overflow in single precision


def _zero_or_normal(temperature: float) -> float:
    if 0 < temperature < MIN_TEMPERATURE:
        raise ValueError(f"expected 0 or at least {MIN_TEMPERATURE}, found {temperature}; take 0 for greedy decoding")
    return temperature


class SamplingParams(Section):
    """How tokens are sampled. The defaults apply when no params file is given."""

    max_new_tokens: Count = 500
    temperature: Annotated[float, Field(ge=0, le=1e12), AfterValidator(_zero_or_normal)] = 0.8
    top_k: Count | None = None
    top_p: Probability | None = None
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: PositiveFloat = 1.0
    seed: Seed = 1337

    @property
    def filters(self) -> tuple[float | None, ...]:
        """The settings that determine the probabilities of the next token."""
        return self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty


def next_token_probabilities(logits_BV: Tensor, seen_BV: Tensor | None, params: SamplingParams) -> Tensor:
    """Apply the repetition penalty, the temperature, the filters and softmax, in this order, (B, V).

    Args:
        seen_BV: whether the sequence, prompt included, contains the token; None: no repetition penalty.
    """
    if seen_BV is not None:
        logits_BV = apply_repetition_penalty(logits_BV, seen_BV, params.repetition_penalty)
    logits_BV = apply_temperature(logits_BV, params.temperature)
    logits_BV = filter_top_p(filter_top_k(logits_BV, params.top_k), params.top_p)
    return filter_min_p(logits_BV, params.min_p).softmax(-1)


def apply_repetition_penalty(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of seen tokens by the penalty, multiply negative ones by it (Keskar et al. 2019, 4.1)."""
    return torch.where(seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def apply_temperature(logits_BV: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature; 0 keeps only the highest logit, the first one of equals."""
    if temperature == 0:
        return torch.full_like(logits_BV, -torch.inf).scatter(-1, logits_BV.argmax(-1, keepdim=True), 0.0)
    # Subtract the maximum first: at a very low temperature the quotient alone would overflow.
    return (logits_BV - logits_BV.max(-1, keepdim=True).values) / temperature


def filter_top_k(logits_BV: Tensor, k: int | None) -> Tensor:
    """Keep the k highest logits (Fan et al. 2018, section 5.4); None keeps all."""
    if k is None or k >= logits_BV.shape[-1]:
        return logits_BV
    return logits_BV.masked_fill(logits_BV < logits_BV.topk(k).values[..., -1:], -torch.inf)


def filter_top_p(logits_BV: Tensor, p: float | None) -> Tensor:
    """Keep the fewest tokens with a total probability of at least p (Holtzman et al. 2020, section 3.1)."""
    if p is None or p >= 1:
        return logits_BV
    probabilities_BV, order_BV = logits_BV.softmax(-1).sort(descending=True, stable=True)
    removed_BV = probabilities_BV.cumsum(-1) - probabilities_BV >= p  # the tokens before it have p already
    return logits_BV.masked_fill(removed_BV.scatter(-1, order_BV, removed_BV), -torch.inf)


def filter_min_p(logits_BV: Tensor, p: float | None) -> Tensor:
    """Keep tokens with at least p times the probability of the most probable one (Nguyen et al. 2024, section 3)."""
    if not p:
        return logits_BV
    probabilities_BV = logits_BV.softmax(-1)
    return logits_BV.masked_fill(probabilities_BV < p * probabilities_BV.max(-1, keepdim=True).values, -torch.inf)


class Sampler:
    """Samples the tokens of one sequence: its settings, its random generator and the tokens that it contains.

    Args:
        seed: replaces that of the settings. The same seed gives the same tokens.
    """

    def __init__(self, params: SamplingParams, seed: int, prompt: Sequence[int], vocab_size: int) -> None:
        self.params = params
        self.seen_V = torch.zeros(vocab_size, dtype=torch.bool)
        self.seen_V[list(prompt)] = True
        self._generator = torch.Generator().manual_seed(seed)

    def draw_noise(self) -> Tensor:
        """Exponential noise for the next token, (V,)."""
        return torch.empty(len(self.seen_V)).exponential_(generator=self._generator)


def sample_tokens(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Sample the next token of each sequence; those with equal settings are computed as one batch."""
    groups: dict[tuple[float | None, ...], list[int]] = {}
    for sequence, sampler in enumerate(samplers):
        groups.setdefault(sampler.params.filters, []).append(sequence)
    tokens = [0] * len(samplers)
    for sequences in groups.values():
        params, seen_BV = samplers[sequences[0]].params, None
        if params.repetition_penalty != 1:
            seen_BV = torch.stack([samplers[sequence].seen_V for sequence in sequences])
        selected_BV = logits_BV[sequences] if len(groups) > 1 else logits_BV
        probabilities_BV = next_token_probabilities(selected_BV, seen_BV, params)
        # The token with the highest quotient is a sample: exponential clocks (Efraimidis & Spirakis 2006)
        noise_BV = torch.stack([samplers[sequence].draw_noise() for sequence in sequences])
        for sequence, token in zip(sequences, (probabilities_BV / noise_BV).argmax(-1).tolist(), strict=True):
            tokens[sequence] = token
            samplers[sequence].seen_V[token] = True
    return tokens
