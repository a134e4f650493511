"""The tokenizers that need no library, characters and words, and the way back from `tokenizer.json` to any kind."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np

from gpt.errors import UserError
from gpt.subwords import BpeTokenizer, TiktokenTokenizer, WordPieceTokenizer
from gpt.vocabulary import (
    Kind,
    Tokenizer,
    Tokens,
    are_tokens,
    check_vocab_size,
    is_alphabet,
    no_tokenizer,
)

WORD = re.compile(r"\w+|\W")  # a word, or one character of anything else: space, line end, punctuation
LEAST_OCCURRENCES = 2  # of a word with a token of its own; those that occur once teach how words are spelled


@dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """Each distinct character is a token; its number is its place in the sorted vocabulary."""

    vocabulary: str

    kind: ClassVar[Kind] = "char"

    @classmethod
    def of_text(cls, pieces: Iterable[str]) -> Self:
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

    def cut(self, text: str) -> Tokens:
        """The place of each character."""
        return np.searchsorted(_code_points(self.vocabulary), _code_points(text)).astype(np.uint32)

    def to_json(self) -> dict[str, Any]:
        """The vocabulary as one text."""
        return {"kind": self.kind, "vocabulary": self.vocabulary}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Check that the characters are distinct and in order."""
        if not is_alphabet(value.get("vocabulary")):
            raise no_tokenizer(cls.kind, "its vocabulary, distinct characters in order")
        return cls(value["vocabulary"])


@dataclass(frozen=True)
class WordTokenizer(Tokenizer):
    """Words that are frequent are tokens; others fall into their characters, which are tokens, too.

    The numbers of the characters come first, in their order; then the words, the most frequent first.
    """

    characters: str
    words: tuple[str, ...]

    kind: ClassVar[Kind] = "word"

    @classmethod
    def learn(cls, pieces: Iterable[str], alphabet: str, vocab_size: int) -> Self:
        """Count the words of a text that comes in pieces and keep the most frequent, as many as fit.

        Raises:
            UserError: not even the characters fit.
        """
        check_vocab_size(vocab_size, len(alphabet), "each character of the training text has a token")
        occurrences = Counter(word for piece in pieces for word in WORD.findall(piece) if len(word) > 1)
        ranked = sorted((-count, word) for word, count in occurrences.items() if count >= LEAST_OCCURRENCES)
        return cls(alphabet, tuple(word for _, word in ranked[: vocab_size - len(alphabet)]))

    @property
    def alphabet(self) -> str:
        """The characters that are tokens."""
        return self.characters

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """Characters and words, each in UTF-8."""
        return tuple(token.encode() for token in (*self.characters, *self.words))

    def cut(self, text: str) -> list[int]:
        """The number of each word, or of each of its characters."""
        numbers, found = self._numbers, list[int]()
        for word in WORD.findall(text):
            if word in numbers:
                found.append(numbers[word])
            else:
                found += [numbers[character] for character in word]
        return found

    def to_json(self) -> dict[str, Any]:
        """The characters as one text and the list of words."""
        return {"kind": self.kind, "characters": self.characters, "words": list(self.words)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Check that characters and words are distinct, and the words made of the characters."""
        characters, words = value.get("characters"), value.get("words")
        if not (is_alphabet(characters) and isinstance(words, list) and are_tokens([*str(characters), *words])):
            raise no_tokenizer(cls.kind, "its characters in order and distinct words")
        if not set("".join(words)) <= set(str(characters)):
            raise no_tokenizer(cls.kind, "words made of its characters")
        return cls(value["characters"], tuple(words))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {token: number for number, token in enumerate((*self.characters, *self.words))}


KINDS: dict[str, type[Tokenizer]] = {
    kind.kind: kind for kind in (CharTokenizer, WordTokenizer, BpeTokenizer, WordPieceTokenizer, TiktokenTokenizer)
}


def tokenizer_from_json(value: Any) -> Tokenizer:
    """Make the tokenizer that `to_json` described.

    Raises:
        UserError: the value describes no tokenizer.
    """
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"tokenizer: expected one of the kinds {', '.join(KINDS)}, found {kind!r}; tokenize again")
    return KINDS[kind].from_json(value)


def _code_points(text: str) -> Tokens:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
