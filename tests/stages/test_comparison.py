"""The statistics of the promotion gate, on blocks whose difference is known."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from stages.release.comparison import (
    MAX_CALIBRATION_ERROR,
    MAX_COPIED,
    MIN_IMPROVEMENT,
    Evaluation,
    judge,
    paired_difference,
)

SHA256 = "a" * 64
SIZES = np.array([1000, 1001] * 50)


def blocks(bits: float, noise: float = 0.0, seed: int = 0, text: int = 0) -> pd.DataFrame:
    """Blocks with this mean loss in bits per character.

    The loss varies between the blocks as it does between parts of a `text`, and by `noise` of the model alone.
    """
    difficulty, own = (np.random.default_rng(number).normal(0, 1, len(SIZES)) for number in (text, 100 + seed))
    values = bits + 0.15 * difficulty + noise * own
    values += bits - np.average(values, weights=SIZES)
    return pd.DataFrame({"block": range(1, 101), "characters": SIZES, "nats": values * SIZES * math.log(2)})


def evaluation(bits: float, **changes: object) -> Evaluation:
    given = Evaluation(SHA256, "c" * 64, blocks(bits), 0.02, 0.0, {"model.n_layer": "4", "train.seed": "1"}, (), SHA256)
    return replace(given, **changes)  # type: ignore[arg-type]


CHAMPION = evaluation(2.2, params={"model.n_layer": "3", "train.seed": "1"})


def test_the_difference_is_exact_and_its_interval_is_that_of_the_paired_blocks() -> None:
    """Each block's difference has a deviation of 0.05·√2, so that its mean over 100 blocks has a tenth of it."""
    found = paired_difference(blocks(2.1, 0.05, seed=1), blocks(2.2, 0.05, seed=2))
    assert found.bits == pytest.approx(-0.1)
    half = 1.96 * 0.05 * math.sqrt(2) / 10
    assert found.high - found.low == pytest.approx(2 * half, rel=0.3)
    assert found.low + found.high == pytest.approx(-0.2, abs=half / 5)
    assert found == paired_difference(blocks(2.1, 0.05, seed=1), blocks(2.2, 0.05, seed=2))


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    """Of 100 pairs, 95 are expected; fewer than 87 have a probability below one in a thousand."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        own = rng.normal(0, 0.1, (2, len(SIZES)))
        first, second = (pd.DataFrame({"characters": SIZES, "nats": (2 + row) * SIZES}) for row in own)
        found = paired_difference(first, second)
        covered += found.low <= 0 <= found.high
    assert 87 <= covered < 100


def test_a_constant_difference_has_no_uncertainty() -> None:
    found = paired_difference(blocks(2.1), blocks(2.2))
    assert [found.low, found.high] == pytest.approx([-0.1, -0.1])


@pytest.mark.parametrize(
    ("candidate", "promoted"),
    [
        (blocks(2.2 - MIN_IMPROVEMENT - 0.001), True),
        (blocks(2.2 - MIN_IMPROVEMENT + 0.001), False),
        (blocks(2.2), False),
        (blocks(2.3), False),
        (blocks(2.2 - MIN_IMPROVEMENT - 0.005, noise=0.05), False),  # the interval is wider than 0.005
        (blocks(2.2 - MIN_IMPROVEMENT - 0.02, noise=0.05), True),
        (blocks(2.0) * float("nan"), False),
    ],
)
def test_the_whole_interval_has_to_be_beyond_the_margin(candidate: pd.DataFrame, promoted: bool) -> None:
    candidate["characters"] = SIZES
    assert judge(evaluation(2.0, blocks=candidate), CHAMPION).promoted == promoted


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration_error": MAX_CALIBRATION_ERROR}, ""),
        ({"calibration_error": MAX_CALIBRATION_ERROR + 0.001}, "calibration error: 5.1%, required: at most 5%"),
        ({"calibration_error": float("nan")}, "calibration error"),
        ({"copied": MAX_COPIED}, ""),
        ({"copied": MAX_COPIED + 0.001}, "copied windows: 5.1%, required: at most 5%"),
        ({"stored": "b" * 64}, "checkpoint SHA-256"),
        ({"stored": None}, "checkpoint SHA-256"),
        ({"rolled_back": "2026-11-30"}, "rolled back"),
    ],
)
@pytest.mark.parametrize("champion", [None, CHAMPION])
def test_each_guard_alone_prevents_a_promotion(
    champion: Evaluation | None, changes: dict[str, object], words: str
) -> None:
    verdict = judge(evaluation(2.0, **changes), champion)
    assert verdict.promoted == (not words)
    assert words in verdict.reason
    assert [check.holds for check in verdict.checks].count(False) == bool(words)


@pytest.mark.parametrize(
    "changes", [{"corpus": "d" * 64}, {"corpus": ""}, {"blocks": blocks(2.0).assign(characters=500)}]
)
def test_models_of_different_texts_are_not_comparable(changes: dict[str, object]) -> None:
    verdict = judge(evaluation(2.0, **changes), CHAMPION)
    assert not verdict.promoted
    assert verdict.difference is None
    assert "not comparable" in verdict.reason


def test_the_spread_of_three_seeds_enlarges_the_margin_and_never_reduces_it() -> None:
    candidate = evaluation(2.2 - MIN_IMPROVEMENT - 0.01)
    for bits, promoted in (((2.2, 2.3), True), ((2.2, 2.22, 2.24), False), ((2.2, 2.2, 2.2), True)):
        assert judge(candidate, replace(CHAMPION, bits_of_seeds=bits)).promoted == promoted
        assert judge(replace(candidate, bits_of_seeds=bits), CHAMPION).promoted == promoted


@pytest.mark.parametrize(
    ("params", "promoted"),
    [
        ({"model.n_layer": "3", "train.seed": "2"}, False),
        ({"model.n_layer": "3", "train.seed": "2", "download.sources": "elsewhere"}, False),
        ({"model.n_layer": "4", "train.seed": "2"}, True),
        ({"model.n_layer": "3", "train.seed": "1"}, True),  # other code
        ({}, True),
    ],
)
def test_a_change_of_the_seed_alone_is_not_promoted(params: dict[str, str], promoted: bool) -> None:
    verdict = judge(evaluation(2.0, params=params), CHAMPION)
    assert verdict.promoted == promoted
    assert ("train.seed 2" in verdict.reason) != promoted
