"""Plots of a `ModelInspection` as PNGs: attention maps, position schemes, similarities of the embeddings.

Equal numbers give equal bytes. Matplotlib is imported with the first plot, since that takes half a second.
"""

import io
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt.core.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    from gpt.evaluation.interpretability import Attention, ModelInspection, Numbers, Positions

DPI, WIDTH = 100, 1000  # WIDTH: pixels, where the content does not determine them
MIN_WIDTH = 720  # pixels that the longest title needs
CELL = 12, 24  # size of a matrix element in pixels: minimum and maximum
LEFT, RIGHT, TOP, BOTTOM = 60, 60, 60, 26  # margins in pixels
MAX_LABEL = 6  # characters
LABEL_DISTANCE = 12  # minimum distance of two labels in pixels
FONT = "DejaVu Sans Mono"  # part of matplotlib: the same on every machine
NONE, HIGH, LOW, GREY = "#f0f0f0", "#a93226", "#2c5d8a", "#555555"
TABLES = {
    "learned": ("learned: vectors that are added to the token embeddings", "channel"),
    "sinusoidal": (
        "sinusoidal: vectors that are added to the token embeddings",
        "channel: first all sines, then all cosines",
    ),
    "rotary": (
        "rotary: cosine of the angle by which queries and keys are rotated",
        "pair of channels, by descending frequency",
    ),
}
LINES = {
    "relative": ("relative: norm of the vector that is added to the key", "layer"),
    "alibi": ("alibi: bias that is added to the score", "head"),
}


def write_plots(folder: Path, inspection: "ModelInspection") -> list[Path]:
    """Write all plots into a folder; return their paths."""
    written = []
    for name, content in render_plots(inspection):
        with atomic_write(folder / name) as file:
            file.write(content)
        written.append(folder / name)
    return written


def render_plots(inspection: "ModelInspection") -> Iterator[tuple[str, bytes]]:
    """File names and PNGs; there is no plot of a part that the model does not have."""
    if inspection.attention:
        yield "attention.png", attention_maps(inspection.attention, inspection.tokens)
    if inspection.positions:
        positions = inspection.positions
        yield "positions.png", _position_table(positions) if positions.scheme in TABLES else _position_lines(positions)
    yield "embeddings.png", embedding_similarities(*inspection.embedding_similarities())


def attention_maps(attention: "Attention", tokens: Sequence[str]) -> bytes:
    """The attention weights of every head: a row of maps for each layer.

    Each label right of the diagonal names the token of this row and of the column that starts there.
    """
    layers, heads, length = attention.weights.shape[:3]
    labels, future = [_label(token) for token in tokens], np.triu(np.ones((length, length), dtype=bool), 1)
    across, down = length + 1 + 0.6 * max(map(len, labels)), length + 1.6  # distance between maps, in cells
    figure, axes = _matrix_figure(heads * across, layers * down - 1.6)
    colors = _colormap(NONE, HIGH)
    for layer, head in np.ndindex(layers, heads):
        left, top = head * across, layer * down
        weights_TT = np.ma.masked_array(attention.weights[layer, head], future)
        _matrix(axes, weights_TT, left, top, colors, (0, 1))
        for index, label in enumerate(labels):
            _text(axes, left + index + 1.2, top + index + 0.5, label, va="center_baseline")
        if layer == 0:
            _text(axes, left, -0.4, f"head {head + 1}", va="bottom")
        if head == 0:
            _text(axes, -0.8, top + length / 2, f"layer {layer + 1}", rotation=90, ha="right", va="center")
    _colorbar(figure, axes, colors, (0, 1))
    return _render(figure, "Attention weights: rows are queries, columns are keys")


def embedding_similarities(vocabulary: Sequence[str], cosines_VV: "Numbers") -> bytes:
    """The matrix of cosine similarities."""
    labels = [_label(token) for token in vocabulary]
    longest = max(map(len, labels))
    figure, axes = _matrix_figure(len(labels), len(labels), bottom=BOTTOM if longest == 1 else BOTTOM + 6 * longest)
    colors = _colormap(LOW, "#ffffff", HIGH)
    _matrix(axes, cosines_VV, 0, 0, colors, (-1, 1))
    for index, label in enumerate(labels):
        _text(axes, -0.3, index + 0.5, label, ha="right", va="center_baseline")
        _text(axes, index + 0.5, len(labels) + 0.3, label, ha="center", va="top", rotation=0 if longest == 1 else 90)
    _colorbar(figure, axes, colors, (-1, 1))
    return _render(figure, "Cosine similarity of the token embeddings, clustered")


def png(figure: "Figure") -> bytes:
    """Encode a figure without metadata such as the date or matplotlib's version."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _position_table(positions: "Positions") -> bytes:
    title, channels = TABLES[positions.scheme]
    figure, axes = _chart_figure()
    bound = float(np.abs(positions.values).max()) or 1.0
    length, height = positions.values.shape
    colors = _colormap(LOW, "#ffffff", HIGH)
    axes.set(xlabel="position", ylabel=channels, xlim=(-0.5, length - 0.5), ylim=(height - 0.5, -0.5))
    _matrix(axes, positions.values.T, -0.5, -0.5, colors, (-bound, bound))
    axes.spines[:].set_visible(False)
    _colorbar(figure, axes, colors, (-bound, bound))
    return _render(figure, f"Positions, {title}")


def _position_lines(positions: "Positions") -> bytes:
    """One line by distance for each layer or head, labelled at its end."""
    title, name = LINES[positions.scheme]
    figure, axes = _chart_figure()
    colors = _colormap(LOW, HIGH)(np.linspace(0, 1, len(positions.values)))
    for values, color in zip(positions.values, colors, strict=True):
        axes.plot(values, color=color, linewidth=1.2)
    lowest, highest = min(0.0, float(positions.values.min())), max(0.0, float(positions.values.max()))
    margin = 0.04 * (highest - lowest) or 1.0
    axes.set(xlabel="distance from query to key in tokens", xlim=(0, positions.values.shape[1] - 1))
    axes.set_ylim(lowest - margin * (lowest < 0), highest + margin)
    axes.spines[["top", "right"]].set_visible(False)
    ends = positions.values[:, -1]
    pixels = axes.get_position().height * figure.get_figheight() * DPI
    distance = LABEL_DISTANCE / pixels * np.diff(axes.get_ylim()).item()
    y = -np.inf
    for index in np.argsort(ends, kind="stable"):
        y = max(float(ends[index]), y + distance)
        _text(axes, positions.values.shape[1] - 1, y, f" {name} {index + 1}", va="center", color=colors[index])
    return _render(figure, f"Positions, {title}")


def _figure(width: float, height: float) -> "Figure":
    """An empty figure; sizes in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _chart_figure() -> tuple["Figure", "Axes"]:
    figure = _figure(WIDTH, 440)
    return figure, figure.add_axes((LEFT / WIDTH, 0.13, 0.86, 0.74))


def _matrix_figure(columns: float, rows: float, bottom: float = BOTTOM) -> tuple["Figure", "Axes"]:
    """A figure for matrices; its axes use cells as units, with (0, 0) at the top left."""
    cell = min(max((WIDTH - LEFT - RIGHT) / columns, CELL[0]), CELL[1])
    width, height = max(LEFT + columns * cell + RIGHT, MIN_WIDTH), TOP + rows * cell + bottom
    figure = _figure(width, height)
    axes = figure.add_axes((LEFT / width, bottom / height, columns * cell / width, rows * cell / height))
    axes.set(xlim=(0, columns), ylim=(rows, 0), autoscale_on=False)
    axes.set_axis_off()
    return figure, axes


def _matrix(
    axes: "Axes", values: "Numbers", left: float, top: float, colors: "Colormap", bounds: tuple[float, float]
) -> None:
    rows, columns = values.shape
    axes.imshow(
        values,
        cmap=colors,
        vmin=bounds[0],
        vmax=bounds[1],
        interpolation="nearest",
        aspect="auto",
        extent=(left, left + columns, top + rows, top),
    )


@cache  # creating the font for every label would take longer than the labels
def _font() -> "FontProperties":
    from matplotlib.font_manager import FontProperties  # noqa: PLC0415

    return FontProperties(family=FONT, size=8)


def _text(axes: "Axes", x: float, y: float, text: str, **style: Any) -> None:
    axes.text(x, y, text, **{"fontproperties": _font(), "color": GREY, "parse_math": False, **style})


def _label(token: str) -> str:
    """A token as a label of limited length; characters that the font lacks become their code points."""
    from matplotlib.font_manager import findfont, get_font  # noqa: PLC0415

    font = get_font(findfont(_font()))
    label = "".join(char if font.get_char_index(ord(char)) else f"{ord(char):x}" for char in token)
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"


def _colorbar(figure: "Figure", beside: "Axes", colors: "Colormap", bounds: tuple[float, float]) -> None:
    """Add a colorbar of fixed size right of the axes."""
    box = beside.get_position()
    width, height = figure.get_size_inches() * DPI
    tall = min(box.height, 120 / height)
    bar = figure.add_axes((box.x1 + 16 / width, box.y1 - tall, 10 / width, tall))
    bar.imshow(
        np.linspace(1, 0, 64)[:, None], cmap=colors, aspect="auto", extent=(0, 1, *bounds), interpolation="bilinear"
    )
    bar.set_xticks([])
    bar.set_yticks([bounds[0], sum(bounds) / 2, bounds[1]])
    bar.yaxis.tick_right()
    bar.tick_params(length=0, labelsize=8, labelcolor=GREY)
    bar.spines[:].set_visible(False)


def _colormap(*colors: str) -> "Colormap":
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415

    return LinearSegmentedColormap.from_list("", colors)


def _render(figure: "Figure", title: str) -> bytes:
    width, height = figure.get_size_inches() * DPI
    figure.text(LEFT / width, 1 - 12 / height, title, fontsize=10, va="top", parse_math=False)
    return png(figure)
