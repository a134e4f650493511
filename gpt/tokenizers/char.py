"""Character tokenizer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np

from gpt.tokenizers.base import Kind, Tokenizer, Tokens, invalid_tokenizer, is_alphabet


@dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """Each distinct character is a token; its ID is its index in the sorted vocabulary."""

    vocabulary: str

    kind: ClassVar[Kind] = "char"

    @classmethod
    def from_chunks(cls, chunks: Iterable[str]) -> Self:
        """Create the tokenizer with the characters of a text that is given in chunks."""
        characters = set[str]()
        for chunk in chunks:
            characters.update(chunk)
        return cls("".join(sorted(characters)))

    @property
    def alphabet(self) -> str:
        """The vocabulary."""
        return self.vocabulary

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The UTF-8 bytes of each character."""
        return tuple(character.encode() for character in self.vocabulary)

    def _encode(self, text: str) -> Tokens:
        return np.searchsorted(_code_points(self.vocabulary), _code_points(text)).astype(np.uint32)

    def to_json(self) -> dict[str, Any]:
        """The vocabulary as one string."""
        return {"kind": self.kind, "vocabulary": self.vocabulary}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Check that the characters are distinct and sorted."""
        vocabulary = value.get("vocabulary")
        if not is_alphabet(vocabulary):
            raise invalid_tokenizer(cls.kind, "a vocabulary of distinct characters in sorted order")
        return cls(vocabulary)


def _code_points(text: str) -> Tokens:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
