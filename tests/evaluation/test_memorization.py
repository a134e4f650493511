"""Copies of the training text: compared with hand-made cases and with a brute-force search."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.evaluation.memorization import Copies, find_copies


@pytest.mark.parametrize(
    ("texts", "corpus", "window", "expected"),
    [
        (["the cat sat"], "a cat sat down", 4, Copies(5 / 8, " cat sat")),  # " cat", "cat ", "at s", "t sa" and " sat"
        (["abc", "def"], "abcdef", 3, Copies(1.0, "abc")),
        (["ab", "cd"], "abcd", 3, Copies(0.0, "ab")),  # no copy extends over two texts
        (["xyxy"], "abab", 2, Copies(0.0, "")),
        (["abcabc"], "xabcx", 3, Copies(0.5, "abc")),
        (["🙂é🙂"], "é🙂é", 2, Copies(1.0, "🙂é")),
        (["", "ab", ""], "b", 1, Copies(0.5, "b")),
        (["ab"], "", 1, Copies(0.0, "")),
        ([], "ab", 1, Copies(0.0, "")),
    ],
)
def test_by_hand(texts: list[str], corpus: str, window: int, expected: Copies) -> None:
    assert find_copies(texts, corpus, window) == expected


def brute_force(texts: list[str], corpus: str, window: int) -> Copies:
    windows = [text[start : start + window] for text in texts for start in range(len(text) - window + 1)]
    substrings = [t[start:end] for t in texts for start in range(len(t)) for end in range(start + 1, len(t) + 1)]
    longest = max((substring for substring in substrings if substring in corpus), key=len, default="")
    return Copies(sum(each in corpus for each in windows) / max(len(windows), 1), longest)


TEXT = st.text(alphabet="ab\0", max_size=24)


@given(st.lists(TEXT, max_size=3), TEXT, st.integers(1, 7), st.data())
def test_equals_brute_force(texts: list[str], corpus: str, window: int, data: st.DataObject) -> None:
    for text in texts[:1]:  # so that there is a longer copy than by chance
        corpus += text[data.draw(st.integers(0, len(text))) :]
    assert find_copies(texts, corpus, window) == brute_force(texts, corpus, window)


def test_repetitive_text_takes_no_quadratic_time() -> None:
    """It takes half a second; comparing all pairs of windows would take minutes."""
    assert find_copies(["ab" * 500, "x" * 1000], "ab" * 500_000).longest == "ab" * 500
