"""Memorization: how much of a generated text occurs verbatim in the training text.

All windows of one length are compared at once, by prefix doubling (Karp, Miller and Rosenberg 1972): equal windows get
equal IDs, and the IDs of windows of 2, 4, 8, … characters follow from those of half the length. Only windows of the
generated texts get IDs; all others of the much longer corpus are `NONE` and drop out early.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WINDOW = 30  # characters; a longer match is rarely a coincidence
NONE = -1  # ID of a corpus window that is in none of the texts; as a character: the border between two texts

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Copies:
    """The share of the texts' windows that occur in the corpus (0 without windows), and the first longest copy."""

    share: float
    longest: str


def find_copies(texts: Sequence[str], corpus: str, window: int = WINDOW) -> Copies:
    """Search the corpus for substrings of the texts."""
    characters = _character_windows(texts, corpus)
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
        of the text `abcab` are ab, bc, ca, ab with the IDs 0, 1, 2, 0. From length 2 to 3 the shift is 1, so that
        abc, bca, cab are the pairs (0, 1), (1, 2), (2, 0): as numbers 0·4 + 1, 1·4 + 2, 2·4 + 0, as IDs 0, 1, 2.
        A corpus window whose pair does not occur in the text is NONE.
        """
        shift, size = length - self.length, max(len(self.text), 1)
        text = self.text[: max(len(self.text) - shift, 0)] * size + self.text[shift:]
        first, last = self.corpus[: max(len(self.corpus) - shift, 0)], self.corpus[shift:]
        return _assign_ids(text, np.where((first != NONE) & (last != NONE), first * size + last, NONE), length)

    def copied(self) -> npt.NDArray[np.bool_]:
        """Whether the corpus contains each window of the texts."""
        in_corpus = np.zeros(len(self.text) + 1, dtype=np.bool_)  # by ID; the last element is that of NONE
        in_corpus[self.corpus] = True
        return in_corpus[self.text]


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


def _character_windows(texts: Sequence[str], corpus: str) -> _Windows:
    """The windows of length 1. Between two texts stands NONE, which is no character: no copy continues across it."""
    parts = [part for text in texts for part in (_code_points(text), np.array([NONE]))][:-1]
    return _assign_ids(np.concatenate([np.empty(0, np.int64), *parts]), _code_points(corpus), 1)


def _assign_ids(text: Numbers, corpus: Numbers, length: int) -> _Windows:
    """Number the distinct values of the text from 0 and look up those of the corpus."""
    values, text_ids = np.unique(text, return_inverse=True)
    if not len(values):
        return _Windows(text_ids, np.empty(0, np.int64), length)
    corpus_ids = np.full(len(corpus), NONE)
    known = np.flatnonzero(corpus != NONE)
    ids = np.searchsorted(values, corpus[known]).clip(max=len(values) - 1)
    corpus_ids[known] = np.where(values[ids] == corpus[known], ids, NONE)
    return _Windows(text_ids, corpus_ids, length)


def _code_points(text: str) -> Numbers:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)
