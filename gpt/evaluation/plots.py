"""Draw what one sees in a model, as PNGs: attention maps, positions, which symbols are alike.

Only numbers and words come in here. Same numbers, same bytes. Matplotlib takes half a second to import; that is done
with the first picture.
"""

import gc
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

    from gpt.evaluation.interpretability import Attention, Insight, Numbers, Positions

DPI, WIDTH = 100, 1000  # dots an inch; pixels that a picture is wide where its content leaves the choice
NARROWEST = 720  # so that the title fits
CELL = 12, 24  # pixels of a matrix's cell, at least and at most
LEFT, RIGHT, TOP, BOTTOM = 60, 60, 60, 26  # pixels around a matrix
LONGEST = 6  # characters of a label
LINE = 12  # pixels between two labels, at least
FONT = "DejaVu Sans Mono"  # comes with matplotlib: the same everywhere
NONE, MUCH, LITTLE, GREY = "#f0f0f0", "#a93226", "#2c5d8a", "#555555"
TABLES = {
    "learned": ("learned: what is added to the embedding of a token at each place", "channel"),
    "sinusoidal": (
        "sinusoidal: what is added to the embedding of a token at each place",
        "channel: first all sines, then all cosines",
    ),
    "rotary": (
        "rotary: cosine of the angle by which queries and keys are turned at each place",
        "pair of channels, the fastest first",
    ),
}
LINES = {
    "relative": ("relative: length of the vector that a distance adds to the key", "layer"),
    "alibi": ("alibi: what a distance adds to the score", "head"),
}


def write_pictures(folder: Path, seen: "Insight") -> list[Path]:
    """Draw all that there is to draw into a folder."""
    written = []
    gc.disable()  # a quarter of the time
    try:
        for name, content in pictures(seen):
            with atomic_write(folder / name) as file:
                file.write(content)
            written.append(folder / name)
    finally:
        gc.enable()
    return written


def pictures(seen: "Insight") -> Iterator[tuple[str, bytes]]:
    """File names and PNGs; of what the model does not have there is none."""
    if seen.attention:
        yield "attention.png", attention_maps(seen.attention, seen.labels)
    if seen.positions:
        yield "positions.png", position_table(seen.positions)
    yield "embeddings.png", neighbours(*seen.neighbours())


def attention_maps(attention: "Attention", labels: Sequence[str]) -> bytes:
    """A row of maps for each layer, a map for each head: how much each position takes from each earlier one.

    A label beside the diagonal names the row that ends and the column that begins there.
    """
    layers, heads, length = attention.weights.shape[:3]
    named, future = [_short(label) for label in labels], np.triu(np.ones((length, length), dtype=bool), 1)
    across, down = length + 1 + 0.6 * max(map(len, named)), length + 1.6  # from map to map
    figure, axes = _sheet(heads * across, layers * down - 1.6)
    colours = _inks(NONE, MUCH)
    for layer, head in np.ndindex(layers, heads):
        left, top = head * across, layer * down
        weights_TT = np.ma.masked_array(attention.weights[layer, head], future)
        _matrix(axes, weights_TT, left, top, colours, (0, 1))
        for place, label in enumerate(named):
            _say(axes, left + place + 1.2, top + place + 0.5, label, va="center_baseline")
        if layer == 0:
            _say(axes, left, -0.4, f"head {head + 1}", va="bottom")
        if head == 0:
            _say(axes, -0.8, top + length / 2, f"layer {layer + 1}", rotation=90, ha="right", va="center")
    _key(figure, axes, colours, (0, 1))
    return _titled(figure, "Attention: how much each position (row) takes from itself and from earlier ones (columns)")


def position_table(positions: "Positions") -> bytes:
    """What the scheme of positions works with: a table by place, or lines by distance."""
    return _table(positions) if positions.scheme in TABLES else _lines(positions)


def neighbours(symbols: Sequence[str], cosines_VV: "Numbers") -> bytes:
    """The cosines between the embeddings of all symbols."""
    named = [_short(symbol) for symbol in symbols]
    longest = max(map(len, named))
    figure, axes = _sheet(len(named), len(named), bottom=BOTTOM if longest == 1 else BOTTOM + 6 * longest)
    colours = _inks(LITTLE, "#ffffff", MUCH)
    _matrix(axes, cosines_VV, 0, 0, colours, (-1, 1))
    for place, name in enumerate(named):
        _say(axes, -0.3, place + 0.5, name, ha="right", va="center_baseline")
        _say(axes, place + 0.5, len(named) + 0.3, name, ha="center", va="top", rotation=0 if longest == 1 else 90)
    _key(figure, axes, colours, (-1, 1))
    return _titled(figure, "Embeddings: cosine between each two symbols, those alike side by side")


def png(figure: "Figure") -> bytes:
    """A figure as a file that tells neither when nor by which version it was made."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _table(positions: "Positions") -> bytes:
    title, channels = TABLES[positions.scheme]
    figure, axes = _chart()
    bound = float(np.abs(positions.values).max()) or 1.0
    places, height = positions.values.shape
    colours = _inks(LITTLE, "#ffffff", MUCH)
    axes.set(xlabel="place", ylabel=channels, xlim=(-0.5, places - 0.5), ylim=(height - 0.5, -0.5))
    _matrix(axes, positions.values.T, -0.5, -0.5, colours, (-bound, bound))
    axes.spines[:].set_visible(False)
    _key(figure, axes, colours, (-bound, bound))
    return _titled(figure, f"Positions, {title}")


def _lines(positions: "Positions") -> bytes:
    """One line for each layer or head, its name at its end."""
    title, what = LINES[positions.scheme]
    figure, axes = _chart()
    colours = _inks(LITTLE, MUCH)(np.linspace(0, 1, len(positions.values)))
    for values, colour in zip(positions.values, colours, strict=True):
        axes.plot(values, color=colour, linewidth=1.2)
    lowest, highest = min(0.0, float(positions.values.min())), max(0.0, float(positions.values.max()))
    margin = 0.04 * (highest - lowest) or 1.0
    axes.set(xlabel="distance from query back to key, in tokens", xlim=(0, positions.values.shape[1] - 1))
    axes.set_ylim(lowest - margin * (lowest < 0), highest + margin)
    axes.spines[["top", "right"]].set_visible(False)
    ends = positions.values[:, -1]
    apart = LINE / (axes.get_position().height * figure.get_figheight() * DPI) * np.diff(axes.get_ylim()).item()
    at = -np.inf
    for number in np.argsort(ends, kind="stable"):
        at = max(float(ends[number]), at + apart)
        _say(axes, positions.values.shape[1] - 1, at, f" {what} {number + 1}", va="center", color=colours[number])
    return _titled(figure, f"Positions, {title}")


def _chart() -> tuple["Figure", "Axes"]:
    figure = _figure(WIDTH, 440)
    return figure, figure.add_axes((LEFT / WIDTH, 0.13, 0.86, 0.74))


def _figure(width: float, height: float) -> "Figure":
    """An empty sheet of so many pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (half a second)
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _sheet(columns: float, rows: float, bottom: float = BOTTOM) -> tuple["Figure", "Axes"]:
    """A sheet for matrices of so many cells together, measured in cells, with room for labels around."""
    cell = min(max((WIDTH - LEFT - RIGHT) / columns, CELL[0]), CELL[1])
    width, height = max(LEFT + columns * cell + RIGHT, NARROWEST), TOP + rows * cell + bottom
    figure = _figure(width, height)
    axes = figure.add_axes((LEFT / width, bottom / height, columns * cell / width, rows * cell / height))
    axes.set(xlim=(0, columns), ylim=(rows, 0), autoscale_on=False)
    axes.set_axis_off()
    return figure, axes


def _matrix(
    axes: "Axes", values: "Numbers", left: float, top: float, colours: "Colormap", bounds: tuple[float, float]
) -> None:
    rows, columns = values.shape
    axes.imshow(
        values,
        cmap=colours,
        vmin=bounds[0],
        vmax=bounds[1],
        interpolation="nearest",
        aspect="auto",
        extent=(left, left + columns, top + rows, top),
    )


@cache  # a font that is named anew for each label costs more time than the label
def _font() -> "FontProperties":
    from matplotlib.font_manager import FontProperties  # noqa: PLC0415

    return FontProperties(family=FONT, size=8)


def _say(axes: "Axes", x: float, y: float, text: str, **how: Any) -> None:
    axes.text(x, y, text, **{"fontproperties": _font(), "color": GREY, "parse_math": False, **how})


def _short(label: str) -> str:
    """A label that fits and can be drawn: a sign that the font lacks becomes its number."""
    from matplotlib.font_manager import findfont, get_font  # noqa: PLC0415

    font = get_font(findfont(_font()))
    drawable = "".join(one if font.get_char_index(ord(one)) else f"{ord(one):x}" for one in label)
    return drawable if len(drawable) <= LONGEST else f"{drawable[: LONGEST - 1]}…"


def _key(figure: "Figure", beside: "Axes", colours: "Colormap", bounds: tuple[float, float]) -> None:
    """A strip at the right edge that says which colour stands for which number."""
    box = beside.get_position()
    width, height = figure.get_size_inches() * DPI
    tall = min(box.height, 120 / height)
    strip = figure.add_axes((box.x1 + 16 / width, box.y1 - tall, 10 / width, tall))
    strip.imshow(
        np.linspace(1, 0, 64)[:, None], cmap=colours, aspect="auto", extent=(0, 1, *bounds), interpolation="bilinear"
    )
    strip.set_xticks([])
    strip.set_yticks([bounds[0], sum(bounds) / 2, bounds[1]])
    strip.yaxis.tick_right()
    strip.tick_params(length=0, labelsize=8, labelcolor=GREY)
    strip.spines[:].set_visible(False)


def _inks(*colours: str) -> "Colormap":
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415

    return LinearSegmentedColormap.from_list("", colours)


def _titled(figure: "Figure", title: str) -> bytes:
    width, height = figure.get_size_inches() * DPI
    figure.text(LEFT / width, 1 - 12 / height, title, fontsize=10, va="top", parse_math=False)
    return png(figure)
