"""The tokenizers that need no library, characters and words, and the way back from `tokenizer.json` to any kind."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np

from gpt.tokenizers.base import Kind, Tokenizer, Tokens, invalid_tokenizer, is_alphabet


@dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """Each distinct character is a token; its number is its place in the sorted vocabulary."""

    vocabulary: str

    kind: ClassVar[Kind] = "char"

    @classmethod
    def from_chunks(cls, pieces: Iterable[str]) -> Self:
        """Collect the vocabulary of a text that comes in pieces."""
        characters: set[str] = set()
        for piece in pieces:
            characters.update(piece)
        return cls("".join(sorted(characters)))

    @property
    def alphabet(self) -> str:
        """The vocabulary."""
        return self.vocabulary

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The characters, each in UTF-8."""
        return tuple(character.encode() for character in self.vocabulary)

    def _encode(self, text: str) -> Tokens:
        """The place of each character."""
        return np.searchsorted(_code_points(self.vocabulary), _code_points(text)).astype(np.uint32)

    def to_json(self) -> dict[str, Any]:
        """The vocabulary as one text."""
        return {"kind": self.kind, "vocabulary": self.vocabulary}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Check that the characters are distinct and in order."""
        if not is_alphabet(value.get("vocabulary")):
            raise invalid_tokenizer(cls.kind, "its vocabulary, distinct characters in order")
        return cls(value["vocabulary"])


def _code_points(text: str) -> Tokens:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
