"""Character tokenizer."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from gpt.tokenizers.base import Kind, Tokenizer, Tokens

UNKNOWN = np.uint32(0xFFFFFFFF)  # in place of a token ID


@dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """Each distinct character is a token; its ID is its index in the sorted vocabulary."""

    vocabulary: str

    kind: ClassVar[Kind] = "char"
    expected: ClassVar[str] = "a vocabulary of distinct characters in sorted order"

    @property
    def alphabet(self) -> str:
        """The vocabulary."""
        return self.vocabulary

    def encode(self, text: str) -> Tokens:
        """Convert text to token IDs, as in the base class; the characters are looked up and checked at once."""
        tokens = self._encode(text)
        if tokens.max(initial=0) == UNKNOWN:
            self._check(text)
        return tokens

    def _encode(self, text: str) -> Tokens:
        return self._ids.take(code_points(text), mode="clip")

    @cached_property
    def _ids(self) -> Tokens:
        """The token ID of each code point up to the last one of the vocabulary; then `UNKNOWN` for all others."""
        points = code_points(self.vocabulary)
        ids = np.full(int(points.max(initial=0)) + 2, UNKNOWN)
        ids[points] = np.arange(len(points), dtype=np.uint32)
        return ids


def code_points(text: str) -> Tokens:
    """The Unicode code point of each character."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
