"""Plots of the evaluation's tables as PNGs: loss by position in the context, and the reliability diagram."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pandas as pd

from gpt.evaluation.plots import png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOR, GREY = "#c0392b", "#888888"


def render_curves(positions: pd.DataFrame, calibration: pd.DataFrame) -> Iterator[tuple[str, bytes]]:
    """File names and PNGs; in the reliability diagram, the area of a point shows its number of predictions."""
    figure, axes = line_figure("position in the context (tokens)", "loss (nats per token)")
    axes.plot(positions["position"], positions["loss"], color=COLOR)
    axes.set_xlim(0, positions["position"].max() * 1.02)
    yield "loss_by_position.png", png(figure)
    figure, axes = line_figure("predicted probability", "accuracy")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
    areas = 4 + 120 * calibration["predictions"] / calibration["predictions"].max()
    axes.scatter(calibration["probability"], calibration["right"], s=areas, color=COLOR, alpha=0.8, linewidths=0)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    yield "calibration.png", png(figure)


def line_figure(x_label: str, y_label: str) -> tuple["Figure", "Axes"]:
    """An empty figure for lines, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (slow import)
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import StrMethodFormatter  # noqa: PLC0415

    figure = Figure(figsize=(8, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    return figure, axes
