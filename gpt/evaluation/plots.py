"""Plots of a `ModelInspection` as PNGs: attention maps, position schemes, similarities of the embeddings.

Equal numbers give equal bytes. Matplotlib is imported with the first plot, since that takes half a second.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt.core.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gpt.evaluation.interpretability import Attention, ModelInspection, Numbers, Positions

DPI = 100
CELL = 0.17  # size of a matrix element in inches: room for a label
MARGIN = 1.2  # inches for labels, title and colorbar
MIN_WIDTH = 7.2  # inches that the longest title needs
MAX_LABEL = 6  # characters
# This font is part of matplotlib: the same on every machine.
LABEL_STYLE: dict[str, Any] = {"fontfamily": "DejaVu Sans Mono", "fontsize": 8, "parse_math": False}
# Titles of the position schemes, and the labels of their channels or lines.
TABLES = {
    "learned": ("vectors that are added to the token embeddings", "channel"),
    "sinusoidal": ("vectors that are added to the token embeddings", "channel: first all sines, then all cosines"),
    "rotary": (
        "cosine of the angle by which queries and keys are rotated",
        "pair of channels, by descending frequency",
    ),
}
LINES = {
    "relative": ("norm of the vector that is added to the key", "layer"),
    "alibi": ("bias that is added to the score", "head"),
}


def write_plots(folder: Path, plots: Iterable[tuple[str, bytes]]) -> list[Path]:
    """Write plots, given as file names and PNGs, into a folder; return their paths."""
    written = []
    for name, content in plots:
        with atomic_write(folder / name) as file:
            file.write(content)
        written.append(folder / name)
    return written


def render_plots(inspection: "ModelInspection") -> Iterator[tuple[str, bytes]]:
    """File names and PNGs; there is no plot of a part that the model does not have."""
    if inspection.attention:
        yield "attention.png", attention_maps(inspection.attention, inspection.tokens)
    if inspection.positions:
        yield "positions.png", position_values(inspection.positions)
    yield "embeddings.png", embedding_similarities(*inspection.embedding_similarities())


def attention_maps(attention: "Attention", tokens: Sequence[str]) -> bytes:
    """The attention weights of every head: a row of maps for each layer."""
    layers, heads, length = attention.weights.shape[:3]
    figure = _figure("Attention weights: rows are queries, columns are keys", heads * length, layers * length)
    maps: Any = figure.subplots(layers, heads, squeeze=False)
    future = np.triu(np.ones((length, length), dtype=bool), 1)
    for layer, head in np.ndindex(layers, heads):
        weights_TT = np.ma.masked_array(attention.weights[layer, head], future)
        axes = maps[layer, head]
        image = axes.imshow(weights_TT, cmap="Reds", vmin=0, vmax=1)
        axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
        _label_cells(axes, tokens, rows=head == 0, columns=layer == layers - 1)
    figure.colorbar(image, ax=maps, fraction=0.03, pad=0.02, shrink=1 / layers)
    return png(figure)


def embedding_similarities(vocabulary: Sequence[str], cosines_VV: "Numbers") -> bytes:
    """The matrix of cosine similarities."""
    figure = _figure("Cosine similarity of the token embeddings, clustered", len(vocabulary), len(vocabulary))
    axes = figure.add_subplot()
    image = axes.imshow(cosines_VV, cmap="RdBu_r", vmin=-1, vmax=1)
    _label_cells(axes, vocabulary)
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    return png(figure)


def png(figure: "Figure") -> bytes:
    """Encode a figure without metadata such as the date or matplotlib's version."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def position_values(positions: "Positions") -> bytes:
    """The values as a table of channels by position, or as one line by distance for each layer or head."""
    scheme, values = positions.scheme, positions.values
    title, label = (TABLES | LINES)[scheme]
    figure = _figure(f"Positions, {scheme}: {title}", 50, 22)
    if scheme in TABLES:
        axes = figure.add_subplot(xlabel="position", ylabel=label)
        bound = float(np.abs(values).max()) or 1.0
        image = axes.imshow(values.T, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
        figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    else:
        axes = figure.add_subplot(xlabel="distance from query to key in tokens")
        for number, line in enumerate(values, start=1):
            axes.plot(line, label=f"{label} {number}", linewidth=1.2)
        axes.axhline(0, color="grey", linewidth=0.5)
        figure.legend(loc="outside right center", frameon=False)
    return png(figure)


def _figure(title: str, columns: int, rows: int) -> "Figure":
    """An empty figure with room for this many matrix elements."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    size = max(columns * CELL + MARGIN, MIN_WIDTH), rows * CELL + MARGIN
    figure = Figure(figsize=size, dpi=DPI)  # without constrained layout, which takes most of the time
    FigureCanvasAgg(figure)
    left, right, bottom, top = 0.7 / size[0], 1 - 0.4 / size[0], 0.6 / size[1], 1 - 0.6 / size[1]
    figure.subplots_adjust(left, bottom, right, top, wspace=0.05, hspace=0.12)
    figure.suptitle(title, fontsize=10)
    return figure


def _label_cells(axes: "Axes", tokens: Sequence[str], *, rows: bool = True, columns: bool = True) -> None:
    """Label the rows and columns of a matrix with the tokens; every label costs layout time."""
    labels = [_label(token) for token in tokens]
    rotation = 0 if max(map(len, labels)) == 1 else 90
    axes.tick_params(length=0)
    axes.set_yticks(range(len(labels)) if rows else [], labels if rows else [], **LABEL_STYLE)
    axes.set_xticks(range(len(labels)) if columns else [], labels if columns else [], rotation=rotation, **LABEL_STYLE)


def _label(token: str) -> str:
    """A token as a label of limited length; characters that the font lacks become their code points."""
    from matplotlib.font_manager import findfont, get_font  # noqa: PLC0415

    font = get_font(findfont(LABEL_STYLE["fontfamily"]))
    label = "".join(char if font.get_char_index(ord(char)) else f"{ord(char):x}" for char in token)
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"
