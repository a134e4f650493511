"""Plots of a run as PNGs: losses and learning rate by step, loss by position, calibration, and those of the command.

Importing it takes half a second (matplotlib): stages do so while their child runs. Equal numbers give equal bytes.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from gpt.evaluation.plots import png

Columns = Mapping[str, Sequence[float]]

SIZE, DPI = (8, 3.6), 110
PALE, STRONG, GREY = "#9db4c8", "#c0392b", "#888888"


def of_training(points: Iterable[Mapping[str, float]]) -> Iterator[tuple[str, bytes]]:
    """Losses and learning rate from the points of a history, as far as it has them."""
    found = list(points)
    training, validation, rate = (_columns(found, name) for name in ("train_loss", "val_loss", "learning_rate"))
    if training["step"]:
        yield "loss.png", loss(training, validation)
    if rate["step"]:
        yield "learning_rate.png", learning_rate(rate)


def of_evaluation(positions: Path, calibration: Path | None, model_plots: Path) -> Iterator[tuple[str, bytes]]:
    """The command's own plots, loss by position and, if there is such a table, calibration.

    Args:
        model_plots: folder with the command's own plots.
    """
    for path in sorted(model_plots.glob("*.png")):
        yield path.name, path.read_bytes()
    yield "loss_by_position.png", loss_by_position(read_table(positions))
    if calibration:
        yield "calibration.png", reliability(read_table(calibration))


def loss(training: Columns, validation: Columns) -> bytes:
    """Training and validation loss by step; the last validation loss is annotated."""
    figure, axes = _axes("step", "loss (nats per token)")
    axes.plot(training["step"], training["train_loss"], color=PALE, linewidth=1, label="training")
    if validation["step"]:
        axes.plot(*_xy(validation, "val_loss"), color=STRONG, marker="o", markersize=4, label="validation")
        end = validation["step"][-1], validation["val_loss"][-1]
        axes.annotate(f"{end[1]:.3f}", end, xytext=(6, 4), textcoords="offset points")
    axes.set_xlim(0, max(training["step"]) * 1.07 or 1)
    axes.legend(frameon=False)
    return png(figure)


def learning_rate(rate: Columns) -> bytes:
    """The learning rate by step."""
    figure, axes = _axes("step", "learning rate")
    axes.plot(*_xy(rate, "learning_rate"), color=STRONG)
    axes.set_xlim(0, max(rate["step"]) * 1.07 or 1)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
    return png(figure)


def loss_by_position(table: Columns) -> bytes:
    """The mean loss by position in the context."""
    figure, axes = _axes("position in the context (tokens)", "loss (nats per token)")
    axes.plot(table["position"], table["loss"], color=STRONG)
    axes.set_xlim(0, max(table["position"]) * 1.02)
    return png(figure)


def reliability(table: Columns) -> bytes:
    """The reliability diagram: accuracy by predicted probability; the area of a point is its number of predictions."""
    figure, axes = _axes("predicted probability", "accuracy")
    most = max(table["predictions"], default=0) or 1
    areas = [4 + 120 * count / most for count in table["predictions"]]
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
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


def _xy(columns: Columns, name: str) -> tuple[Sequence[float], Sequence[float]]:
    return columns["step"], columns[name]


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    return figure, axes
