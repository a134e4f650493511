"""Character tokenizer."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from gpt.tokenizers.base import Kind, Tokenizer, Tokens


@dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """Each distinct character is a token; its ID is its index in the sorted vocabulary."""

    vocabulary: str

    kind: ClassVar[Kind] = "char"
    expected: ClassVar[str] = "a vocabulary of distinct characters in sorted order"

    @classmethod
    def from_chunks(cls, chunks: Iterable[str]) -> Self:
        """Create the tokenizer with the characters of a text that is given in chunks."""
        return cls("".join(sorted({character for chunk in chunks for character in set(chunk)})))

    @property
    def alphabet(self) -> str:
        """The vocabulary."""
        return self.vocabulary

    def _encode(self, text: str) -> Tokens:
        return np.searchsorted(code_points(self.vocabulary), code_points(text)).astype(np.uint32)


def code_points(text: str) -> Tokens:
    """The Unicode code point of each character."""
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
