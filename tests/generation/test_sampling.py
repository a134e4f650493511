"""Penalty, temperature and filters compute the published formulas."""

import math

import pytest
import torch
from torch import Tensor

from gpt.generation.sampling import (
    SamplingParams,
    apply_repetition_penalty,
    apply_temperature,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    next_token_probabilities,
)


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def kept(logits_BV: Tensor) -> list[int]:
    return logits_BV[0].isfinite().nonzero().flatten().tolist()


def test_top_k() -> None:
    logits_V = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert filter_top_k(logits_V, 2).tolist() == [-math.inf, 3.0, -math.inf, 2.0]
    for k in (None, 4, 100):
        assert torch.equal(filter_top_k(logits_V, k), logits_V)


def test_top_p() -> None:
    logits_BV = logits_of(0.1, 0.5, 0.15, 0.25)
    for p, expected in [(0.4, [1]), (0.49, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])]:
        assert kept(filter_top_p(logits_BV, p)) == expected, p
    assert kept(filter_top_p(logits_of(0.25, 0.25, 0.25, 0.25), 0.3)) == [0, 1]  # the first of equal ones
    assert torch.equal(filter_top_p(logits_BV, None), logits_BV)


def test_min_p() -> None:
    logits_BV = logits_of(0.1, 0.5, 0.15, 0.25)
    for p, expected in [(0.0, [0, 1, 2, 3]), (0.19, [0, 1, 2, 3]), (0.21, [1, 2, 3]), (0.4, [1, 3]), (1.0, [1])]:
        assert kept(filter_min_p(logits_BV, p)) == expected, p
    assert torch.equal(filter_min_p(logits_BV, None), logits_BV)


def test_repetition_penalty() -> None:
    logits_BV, seen_BV = torch.tensor([[3.0, -3.0, 3.0, -3.0]]), torch.tensor([[True, True, False, False]])
    assert apply_repetition_penalty(logits_BV, seen_BV, 1.5).tolist() == [[2.0, -4.5, 3.0, -3.0]]
    assert torch.equal(apply_repetition_penalty(logits_BV, seen_BV, 1.0), logits_BV)


def test_temperature() -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    halved_BV = apply_temperature(logits_BV, 0.5)
    assert halved_BV.softmax(-1)[0].tolist() == pytest.approx((2 * logits_BV).softmax(-1)[0].tolist())
    assert kept(apply_temperature(logits_BV, 0)) == [1]
    assert apply_temperature(logits_BV, 1e-30).softmax(-1).tolist() == [[0.0, 0.5, 0.5, 0.0]]


def test_filters_apply_after_the_temperature() -> None:
    """At a high temperature the most probable token alone has less than half of the probability."""
    logits_BV, seen_BV = logits_of(0.6, 0.2, 0.1, 0.1), torch.zeros(1, 4, dtype=torch.bool)
    for temperature, expected in [(1.0, 1), (3.0, 2)]:
        params = SamplingParams(temperature=temperature, top_p=0.5)
        assert int((next_token_probabilities(logits_BV, seen_BV, params) > 0).sum()) == expected
