"""How much of a written text stands word for word in the text that a model was trained on.

Windows are compared exactly, by giving equal ones equal names: a window is named after the pair of names of its first
and its last part, so that names of 2, 4, 8, … characters come from one another (Karp, Miller and Rosenberg 1972). Only
windows of the written text get a name; whatever else the long corpus holds is `NONE` and drops out early.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WINDOW = 30  # characters that hardly ever stand elsewhere by chance
NONE = -1  # the name of every window that the written text does not hold; also the border between two texts

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Copies:
    """What of some texts stands in a corpus: the share of their windows, and the longest stretch, the first if several.

    The share of no windows is 0.
    """

    share: float
    longest: str


def find_copies(texts: Sequence[str], corpus: str, window: int = WINDOW) -> Copies:
    """Search a corpus for what stands in it word for word of some texts; a stretch never runs over two of them."""
    named = _single_characters(texts, corpus)
    windows = sum(max(len(text) - window + 1, 0) for text in texts)
    share = int(_of_length(named, window).copied().sum()) / max(windows, 1)
    return Copies(share, _longest("\0".join(texts), named))


@dataclass(frozen=True)
class _Named:
    """The names of all windows of one length: those that start at each place of the text and of the corpus."""

    text: Numbers
    corpus: Numbers
    length: int

    def longer(self, length: int) -> "_Named":
        """The names of longer windows, up to twice the length."""
        shift = length - self.length
        size = max(len(self.text), 1)
        text = self.text[: max(len(self.text) - shift, 0)] * size + self.text[shift:]
        first, last = self.corpus[: max(len(self.corpus) - shift, 0)], self.corpus[shift:]
        return _name(text, np.where((first != NONE) & (last != NONE), first * size + last, NONE), length)

    def copied(self) -> npt.NDArray[np.bool_]:
        """For each window of the text, whether the corpus holds it."""
        seen = np.zeros(len(self.text) + 1, dtype=np.bool_)  # a place for each name, and the last one for NONE
        seen[self.corpus] = True
        return seen[self.text]


def _of_length(named: _Named, length: int) -> _Named:
    while named.length < length:
        named = named.longer(min(2 * named.length, length))
    return named


def _longest(text: str, named: _Named) -> str:
    """Double the length as long as anything is copied, then halve the steps."""
    if not named.copied().any():
        return ""
    while (longer := named.longer(2 * named.length)).copied().any():
        named = longer
    longest, step = named, named.length // 2
    while step:
        longer = named.longer(longest.length + step)
        longest = longer if longer.copied().any() else longest
        step //= 2
    start = int(longest.copied().argmax())
    return text[start : start + longest.length]


def _single_characters(texts: Sequence[str], corpus: str) -> _Named:
    """Windows of one character; the border between two texts stands for none, so that no copy runs over it."""
    parts = [part for text in texts for part in (_code_points(text), np.array([NONE]))][:-1]
    return _name(np.concatenate([np.empty(0, np.int64), *parts]), _code_points(corpus), 1)


def _name(text: Numbers, corpus: Numbers, length: int) -> _Named:
    """Give each distinct value in the text its place among them as its name, and find the corpus' values by it."""
    values, names = np.unique(text, return_inverse=True)
    if not len(values):
        return _Named(names, np.empty(0, np.int64), length)
    found = np.full(len(corpus), NONE)
    known = np.flatnonzero(corpus != NONE)
    places = np.searchsorted(values, corpus[known]).clip(max=len(values) - 1)
    found[known] = np.where(values[places] == corpus[known], places, NONE)
    return _Named(names, found, length)


def _code_points(text: str) -> Numbers:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)
