"""Plots of a run."""

from pathlib import Path

import pytest

from stages.run_plots import of_evaluation, of_training
from stages.stage import rendered

POINTS = [{"step": step, "train_loss": 4 - step / 50, "learning_rate": step / 9e3, "time": step} for step in range(9)]


def test_equal_numbers_give_equal_plots(tmp_path: Path) -> None:
    positions, calibration = tmp_path / "positions.csv", tmp_path / "calibration.csv"
    positions.write_text("position,loss\n1,4.1\n2,3.0\n")
    calibration.write_text("probability,right,predictions\n0.1,0.2,7\n0.5,,0\n0.9,0.8,3\n")
    points = [*POINTS, {**POINTS[-1], "val_loss": 2.0}]
    (tmp_path / "attention.png").write_bytes(b"\x89PNG of the command")
    found = dict([*of_training(points), *of_evaluation(positions, calibration, tmp_path)])
    names = ["attention.png", "calibration.png", "learning_rate.png", "loss.png", "loss_by_position.png"]
    assert sorted(found) == names
    assert all(content.startswith(b"\x89PNG") for content in found.values())
    assert dict(of_training(points))["loss.png"] == found["loss.png"] != dict(of_training(POINTS))["loss.png"]
    assert list(of_training([])) == []
    assert "calibration.png" not in dict(of_evaluation(positions, None, tmp_path))


def test_a_plot_that_fails_costs_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    positions = tmp_path / "positions.csv"
    positions.write_text("position,loss\n1,4.1\n")
    found = rendered("evaluate", of_evaluation(positions, tmp_path / "missing.csv", tmp_path))
    assert list(found) == ["pictures/loss_by_position.png"]
    err = capsys.readouterr().err
    assert err.startswith("stages.evaluate: some plots are missing: FileNotFoundError")
    assert err.count("\n") == 1
