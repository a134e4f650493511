"""Memorization: how much of a generated text occurs verbatim in the training text.

All windows of one length are compared at once, by prefix doubling (Karp, Miller and Rosenberg 1972): equal windows get
equal IDs, and the IDs of windows of 2, 4, 8, … characters follow from those of half the length. Only windows of the
generated texts get IDs, from 1; all other windows of the much longer corpus get 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from gpt.tokenizers.base import Tokens
from gpt.tokenizers.char import code_points

WINDOW = 30  # characters; a longer match is rarely a coincidence
BORDER = -1  # stands between two texts; it is no character, so no copy continues across it

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Copies:
    """The share of the texts' windows that occur in the corpus (0 without windows), and the first longest copy."""

    share: float
    longest: str


def find_copies(texts: Sequence[str], corpus: str, window: int = WINDOW) -> Copies:
    """Search the corpus for substrings of the texts."""
    parts = [part for text in texts for part in (code_points(text), np.array([BORDER]))][:-1]
    characters = _assign_ids(np.concatenate([np.empty(0, np.int64), *parts]), code_points(corpus), 1)
    windows = characters
    while windows.length < window:
        windows = windows.extend(min(2 * windows.length, window))
    total = sum(max(len(text) - window + 1, 0) for text in texts)
    return Copies(int(windows.copied().sum()) / max(total, 1), _longest_copy("\0".join(texts), characters))


@dataclass(frozen=True)
class _Windows:
    """The IDs of all windows of one length, by the index of their first character in the joined texts or the corpus."""

    text: Numbers
    corpus: Numbers
    length: int

    def extend(self, length: int) -> "_Windows":
        """The windows of another length, at most twice as long.

        A longer window is identified by the shorter ones at its start and at its end. Example: the windows of length 2
        of the text `abcab` are ab, bc, ca, ab with the IDs 1, 2, 3, 1. From length 2 to 3 the shift is 1, so that
        abc, bca, cab are the pairs (1, 2), (2, 3), (3, 1): as numbers 1·5 + 2, 2·5 + 3, 3·5 + 1, as IDs 1, 2, 3.
        A pair with a 0 occurs in the corpus only, so that its ID is 0 again.
        """
        shift, base = length - self.length, len(self.text) + 1
        text, corpus = (ids[:-shift] * base + ids[shift:] for ids in (self.text, self.corpus))
        return _assign_ids(text, corpus, length)

    def copied(self) -> npt.NDArray[np.bool_]:
        """Whether the corpus contains each window of the texts."""
        return np.isin(self.text, self.corpus)


def _longest_copy(text: str, windows: _Windows) -> str:
    """Double the length while any window is copied, then find the longest by bisection."""
    if not windows.copied().any():
        return ""
    while (longer := windows.extend(2 * windows.length)).copied().any():
        windows = longer
    longest, step = windows, windows.length // 2
    while step:
        longer = windows.extend(longest.length + step)
        longest = longer if longer.copied().any() else longest
        step //= 2
    start = int(longest.copied().argmax())
    return text[start : start + longest.length]


def _assign_ids(text: Numbers, corpus: Numbers | Tokens, length: int) -> _Windows:
    """Number the distinct values of the text from 1; values of the corpus that are not in the text get 0."""
    ids, values = pd.factorize(text)
    return _Windows(ids + 1, pd.Index(values).get_indexer(pd.Index(corpus)) + 1, length)
