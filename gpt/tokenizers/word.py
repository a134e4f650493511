"""The tokenizers that need no library, characters and words, and the way back from `tokenizer.json` to any kind."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

from gpt.tokenizers.base import Kind, Tokenizer, check_vocab_size, invalid_tokenizer, is_alphabet, is_token_list

WORD = re.compile(r"\w+|\W")  # a word, or one character of anything else: space, line end, punctuation

LEAST_OCCURRENCES = 2  # of a word with a token of its own; those that occur once teach how words are spelled


@dataclass(frozen=True)
class WordTokenizer(Tokenizer):
    """Words that are frequent are tokens; others fall into their characters, which are tokens, too.

    The numbers of the characters come first, in their order; then the words, the most frequent first.
    """

    characters: str
    words: tuple[str, ...]

    kind: ClassVar[Kind] = "word"

    @classmethod
    def train(cls, pieces: Iterable[str], alphabet: str, vocab_size: int) -> Self:
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

    def _encode(self, text: str) -> list[int]:
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
        if not (is_alphabet(characters) and isinstance(words, list) and is_token_list([*str(characters), *words])):
            raise invalid_tokenizer(cls.kind, "its characters in order and distinct words")
        if not set("".join(words)) <= set(str(characters)):
            raise invalid_tokenizer(cls.kind, "words made of its characters")
        return cls(value["characters"], tuple(words))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {token: number for number, token in enumerate((*self.characters, *self.words))}
