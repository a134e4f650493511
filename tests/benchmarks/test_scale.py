"""The benchmark of growth: its exponents, and trainings that alternate."""

from pathlib import Path

import pytest

import tests.support.processes  # noqa: F401 (its forkserver has imported torch)
from benchmarks.scale import PROCESSES_SERIES, Point, Training, alternate, table


def point(series: str, size: float, seconds: float) -> Point:
    return Point(series, size, seconds, 0.9 * seconds, 1.1 * seconds, 1000, 0.5)


def test_the_table_has_the_exponents_of_each_series() -> None:
    series = {"constant": 0, "linear": 1, "quadratic": 2, PROCESSES_SERIES: -1}
    points = [point(name, size, size**power) for size in (1, 2, 1024) for name, power in series.items()]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(points)[2:]]
    assert [cell[3] for cell in cells] == [text for power in series.values() for text in ("", *2 * [f"{power}.00"])]
    assert [cell[0] for cell in cells if cell[0]] == list(series)
    assert "more than the" in cells[-1][1]


def test_trainings_of_one_and_two_processes_alternate(tokens: Path) -> None:
    trainings = [Training(tokens, "model.block_size=16", size=count, processes=count) for count in (1, 2)]
    for found in alternate(PROCESSES_SERIES, trainings, turns=2):
        assert found.low <= found.seconds <= found.high
        assert found.tokens_per_second * found.seconds == pytest.approx(16 * 16)
        assert 0.1 < found.memory_gb < 4
