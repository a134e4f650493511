"""Plots of a run as PNGs: losses and learning rate by step, loss by position, calibration, and those of the command.

Importing it takes half a second (matplotlib): stages do so while their child runs. Equal numbers give equal bytes.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from gpt.evaluation.plots import png

Columns = Mapping[str, Sequence[float]]

PALE, STRONG, GREY = "#9db4c8", "#c0392b", "#888888"


def of_training(points: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, bytes]]:
    """Losses and learning rate from the points of a history, as far as it has them."""
    training, validation, rate = (_columns(points, name) for name in ("train_loss", "val_loss", "learning_rate"))
    if training["step"]:
        yield "loss.png", loss(training, validation)
    if rate["step"]:
        figure, axes = _line_plot(rate, ("step", "learning rate"), "learning_rate", color=STRONG)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
        yield "learning_rate.png", png(figure)


def of_evaluation(positions: Path, calibration: Path | None, model_plots: Path) -> Iterator[tuple[str, bytes]]:
    """The command's own plots (a folder), loss by position and, if there is such a table, calibration."""
    for path in sorted(model_plots.glob("*.png")):
        yield path.name, path.read_bytes()
    table, labels = read_table(positions), ("position in the context (tokens)", "loss (nats per token)")
    yield "loss_by_position.png", png(_line_plot(table, labels, "loss", x="position", margin=1.02, color=STRONG)[0])
    if calibration:
        yield "calibration.png", reliability(read_table(calibration))


def loss(training: Columns, validation: Columns) -> bytes:
    """Training and validation loss by step; the last validation loss is annotated."""
    labels = "step", "loss (nats per token)"
    figure, axes = _line_plot(training, labels, "train_loss", color=PALE, linewidth=1, label="training")
    if validation["step"]:
        steps, losses = validation["step"], validation["val_loss"]
        axes.plot(steps, losses, color=STRONG, marker="o", markersize=4, label="validation")
        axes.annotate(f"{losses[-1]:.3f}", (steps[-1], losses[-1]), xytext=(6, 4), textcoords="offset points")
    axes.legend(frameon=False)
    return png(figure)


def reliability(table: Columns) -> bytes:
    """The reliability diagram: accuracy by predicted probability; the area of a point is its number of predictions."""
    diagonal = {"x": [0.0, 1.0], "y": [0.0, 1.0]}
    labels = "predicted probability", "accuracy"
    figure, axes = _line_plot(diagonal, labels, "y", x="x", color=GREY, linewidth=1, linestyle="--")
    most = max(table["predictions"], default=0) or 1
    areas = [4 + 120 * count / most for count in table["predictions"]]
    axes.scatter(table["probability"], table["right"], s=areas, color=STRONG, alpha=0.8, linewidths=0)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    return png(figure)


def read_table(path: Path) -> Columns:
    """A CSV file of numbers by columns; rows with an empty cell are left out."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row.values())]
    return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else {})}


def _columns(points: Iterable[Mapping[str, float]], name: str) -> Columns:
    """Steps and values of one metric, of the points that have it."""
    having = [point for point in points if name in point]
    return {"step": [point["step"] for point in having], name: [point[name] for point in having]}


def _line_plot(
    table: Columns, labels: tuple[str, str], y: str, *, x: str = "step", margin: float = 1.07, **style: Any
) -> tuple[Figure, Axes]:
    """A plot of one column by another, from 0 to the largest x times the margin."""
    figure = Figure(figsize=(8, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(table[x], table[y], **style)
    axes.set(xlabel=labels[0], ylabel=labels[1], xlim=(0, max(table[x]) * margin or 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    return figure, axes
