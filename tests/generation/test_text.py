"""Stop strings and streaming."""

import pytest

from gpt.generation.text import stop_before

TEXT = "to be, or not to be:\nthat"


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ([], TEXT),
        (["xyz"], TEXT),
        (["not"], "to be, or "),
        (["be:", "or"], "to be, "),
        (["\n"], "to be, or not to be:"),
        (["to"], ""),
        (["thatch"], TEXT),
    ],
)
def test_the_text_ends_before_the_first_stop_string(stop: list[str], expected: str, size: int) -> None:
    chunks = (TEXT[start : start + size] for start in range(0, len(TEXT), size))
    assert "".join(stop_before(chunks, stop)) == expected


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    assert list(stop_before(iter("abcde"), ["xyz"])) == ["a", "b", "c", "de"]
