"""Penalty, temperature and filters compute the published formulas."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpt.generation import sampling
from gpt.generation.sampling import SamplingParams


@pytest.mark.parametrize(
    ("keep", "counts"),
    [
        (sampling.filter_top_k, {None: 4, 100: 4, 4: 4, 2: 2, 1: 1}),
        (sampling.filter_top_p, {None: 4, 1.0: 4, 0.8: 3, 0.74: 2, 0.51: 2, 0.49: 1, 0.4: 1}),
        (sampling.filter_min_p, {None: 4, 0.0: 4, 0.19: 4, 0.21: 3, 0.4: 2, 1.0: 1}),
    ],
)
def test_filters_keep_the_most_probable_tokens(
    keep: Callable[[Tensor, float | None], Tensor], counts: dict[float | None, int]
) -> None:
    logits_BV = torch.tensor([[0.25, 0.15, 0.5, 0.1]]).log()
    for setting, count in counts.items():
        removed = torch.tensor([2, 0, 1, 3][count:], dtype=torch.int64)
        assert torch.equal(keep(logits_BV, setting), logits_BV.index_fill(1, removed, -torch.inf))


def test_top_p_keeps_the_first_of_equally_probable_tokens() -> None:
    assert sampling.filter_top_p(torch.zeros(1, 4), 0.3).tolist() == [[0.0, 0.0, -math.inf, -math.inf]]


def test_repetition_penalty() -> None:
    logits_BV, seen_BV = torch.tensor([[3.0, -3.0, 3.0, -3.0]]), torch.tensor([[True, True, False, False]])
    assert sampling.apply_repetition_penalty(logits_BV, seen_BV, 1.5).tolist() == [[2.0, -4.5, 3.0, -3.0]]
    assert torch.equal(sampling.apply_repetition_penalty(logits_BV, seen_BV, 1.0), logits_BV)


def test_temperature() -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    halved_BV = sampling.apply_temperature(logits_BV, 0.5)
    assert halved_BV.softmax(-1)[0].tolist() == pytest.approx((2 * logits_BV).softmax(-1)[0].tolist())
    assert sampling.apply_temperature(logits_BV, 0).softmax(-1).tolist() == [[0.0, 1.0, 0.0, 0.0]]
    assert sampling.apply_temperature(logits_BV, 1e-30).softmax(-1).tolist() == [[0.0, 0.5, 0.5, 0.0]]


def test_filters_apply_after_the_temperature() -> None:
    """At a high temperature the most probable token alone has less than half of the probability."""
    logits_BV, seen_BV = torch.tensor([[0.6, 0.2, 0.1, 0.1]]).log(), torch.zeros(1, 4, dtype=torch.bool)
    for temperature, expected in [(1.0, 1), (3.0, 2)]:
        params = SamplingParams(temperature=temperature, top_p=0.5)
        assert int((sampling.next_token_probabilities(logits_BV, seen_BV, params) > 0).sum()) == expected
