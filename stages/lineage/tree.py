"""A chain as a tree for the terminal."""

from collections.abc import Iterator

from gpt.core.errors import printable
from stages.lineage.items import PRESENT, Item, Place

LABEL = 12  # columns


def tree(item: Item) -> str:
    """The chain, one item with its hashes and places below the other; text from outside is escaped."""
    return "\n".join(_lines(item, "", ""))


def _lines(item: Item, first: str, rest: str) -> Iterator[str]:
    """The lines of an item and its origins.

    Args:
        first: what stands before the first line.
        rest: what stands before all others.

    """
    yield f"{first}{_escaped(item.kind)}  {_escaped(item.name)}"
    below = rest + ("│  " if item.origins else "   ")
    for label, value in _rows(item):
        yield f"{below}{_escaped(label):<{LABEL}} {_escaped(value)}"
    for index, origin in enumerate(item.origins):
        yield below.rstrip()
        last = index == len(item.origins) - 1
        yield from _lines(origin, f"{rest}{'└─' if last else '├─'} ", rest + ("   " if last else "│  "))


def _rows(item: Item) -> Iterator[tuple[str, str]]:
    if item.sha256:
        yield "SHA-256", item.sha256
    if item.md5:
        yield "MD5", item.md5
    for name, file in (item.content.files if item.content else {}).items():
        yield "SHA-256", f"{file.sha256} {name}"
    yield from item.details.items()
    for place in item.places:
        yield place.where, _shown(place)
    for problem in item.problems:
        yield "problem", problem


def _shown(place: Place) -> str:
    notes = [place.state.upper() if place.is_problem else place.state] if place.state != PRESENT else []
    notes += [place.note] if place.note else []
    return f"{place.address} ({': '.join(notes)})" if notes else place.address


def _escaped(text: str) -> str:
    return printable(text).replace("\n", "\\n")
