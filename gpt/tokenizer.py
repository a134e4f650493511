"""Text to integers and back: one symbol of the vocabulary for each character."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gpt.errors import UserError

Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class CharTokenizer:
    """Each distinct character is a token; its number is its place in the sorted vocabulary."""

    vocabulary: str

    @classmethod
    def of_text(cls, pieces: Iterable[str]) -> Self:
        """Collect the vocabulary of a text that comes in pieces."""
        characters: set[str] = set()
        for piece in pieces:
            characters.update(piece)
        return cls("".join(sorted(characters)))

    @property
    def vocab_size(self) -> int:
        """Number of distinct tokens."""
        return len(self.vocabulary)

    @property
    def start(self) -> int:
        """The token that a text without a beginning goes on from: a line end, or else the first symbol."""
        return max(self.vocabulary.find("\n"), 0)

    def encode(self, text: str) -> Tokens:
        """Turn text into token numbers, shape (characters,).

        Raises:
            UserError: a character is not in the vocabulary; all such characters are listed.
        """
        code_points = _code_points(text)
        places = np.searchsorted(self._known, code_points).clip(max=self.vocab_size - 1)
        if not np.array_equal(self._known[places], code_points):
            unknown = sorted(set(text) - set(self.vocabulary))
            listed = ", ".join(repr(character) for character in unknown[:20])
            more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
            raise UserError(
                f"expected only the {self.vocab_size} characters of the training text, found {listed}{more}; "
                f"leave them out (known: {self.vocabulary[:100]!r})"
            )
        return places.astype(np.uint32)

    def decode(self, tokens: Iterable[int]) -> str:
        """Turn token numbers back into text."""
        return "".join(self.vocabulary[token] for token in tokens)

    def to_json(self) -> dict[str, str]:
        """All that is needed to make this tokenizer again, as plain values."""
        return {"kind": "char", "vocabulary": self.vocabulary}

    @property
    def _known(self) -> Tokens:
        return _code_points(self.vocabulary)


def tokenizer_from_json(value: Any) -> CharTokenizer:
    """Make the tokenizer that `to_json` described.

    Raises:
        UserError: the value describes no tokenizer.
    """
    if not isinstance(value, dict) or value.get("kind") != "char" or not isinstance(value.get("vocabulary"), str):
        raise UserError("tokenizer: expected kind 'char' with its vocabulary, found something else; tokenize again")
    vocabulary = value["vocabulary"]
    if not vocabulary or list(vocabulary) != sorted(set(vocabulary)):
        raise UserError("tokenizer: expected distinct characters in order, found others; tokenize again")
    return CharTokenizer(vocabulary)


def _code_points(text: str) -> Tokens:
    # surrogatepass: a lone surrogate must end in the list of unknown characters, not in a traceback.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
