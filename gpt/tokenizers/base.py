"""What every tokenizer has: a vocabulary of numbered tokens, each a few bytes of UTF-8 text."""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt

from gpt.core.errors import UserError

Kind = Literal["char", "word", "bpe", "wordpiece", "tiktoken"]
Tokens = npt.NDArray[np.uint32]

LISTED = 20  # characters that a message names
SURROGATES = range(0xD800, 0xE000)  # halves of a UTF-16 pair: no characters, and in no UTF-8


class Tokenizer(ABC):
    """Text to token numbers and back. Equal ones have equal vocabularies and cut alike."""

    kind: ClassVar[Kind]

    @property
    @abstractmethod
    def token_bytes(self) -> tuple[bytes, ...]:
        """The UTF-8 bytes of each token by its number; a token of a byte-level kind may be part of a character."""

    @property
    @abstractmethod
    def alphabet(self) -> str | None:
        """The characters that a text may hold, sorted; None: all there are."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All that is needed to make this tokenizer again, as plain values."""

    @classmethod
    @abstractmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Make the tokenizer that `to_json` described; UserError where the value describes none."""

    @abstractmethod
    def _encode(self, text: str) -> Iterable[int]:
        """The token numbers of a text whose characters are known."""

    @property
    def vocab_size(self) -> int:
        """Number of distinct tokens."""
        return len(self.token_bytes)

    @property
    def start_token(self) -> int:
        """The token that a text without a beginning goes on from: a line end, or else the first of the vocabulary."""
        return self.token_bytes.index(b"\n") if b"\n" in self.token_bytes else 0

    def encode(self, text: str) -> Tokens:
        """Turn text into token numbers, shape (tokens,).

        Raises:
            UserError: a character cannot be encoded; all such characters are listed.
        """
        characters, alphabet = set(text), self.alphabet
        if alphabet is None:
            if unknown := {character for character in characters if ord(character) in SURROGATES}:
                raise UserError(f"expected characters of Unicode, found {format_characters(unknown)}; leave them out")
        elif unknown := characters - set(alphabet):
            raise UserError(
                f"expected only the {len(alphabet)} characters of the training text, found "
                f"{format_characters(unknown)}; leave them out (known: {alphabet[:100]!r})"
            )
        return np.asarray(self._encode(text), dtype=np.uint32)

    def decode(self, tokens: Iterable[int]) -> str:
        """Turn token numbers back into text; bytes that are no character, as a model may write them, become U+FFFD."""
        known = self.token_bytes
        return b"".join([known[token] for token in tokens]).decode("utf-8", "replace")

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of token numbers in chunks, each as soon as its characters are complete; joined, it is `decode`."""
        known, decoder = self.token_bytes, codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            if piece := decoder.decode(known[token]):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest


def format_characters(characters: Iterable[str]) -> str:
    """Characters as a message names them: sorted, visible, not too many."""
    names = [repr(character) for character in sorted(characters)]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def check_vocab_size(found: int, least: int, because: str) -> None:
    """Refuse a `tokenize.vocab_size` that is smaller than what a kind starts from.

    Raises:
        UserError: it is smaller than `least`.
    """
    if found < least:
        raise UserError(f"tokenize.vocab_size: expected at least {least:,} ({because}), found {found:,}; set it higher")


def invalid_tokenizer(kind: str, expected: str) -> UserError:
    """The error for a description that is damaged: what was expected of it."""
    return UserError(f"tokenizer: expected kind {kind!r} with {expected}, found something else; tokenize again")


def is_alphabet(value: object) -> bool:
    """Whether a value from JSON is a text of distinct characters in their order."""
    return isinstance(value, str) and value != "" and list(value) == sorted(set(value)) and is_utf8(value)


def is_token_list(value: object) -> bool:
    """Whether a value from JSON is a list of distinct texts, none of them empty."""
    return (
        isinstance(value, list)
        and all(isinstance(token, str) and token and is_utf8(token) for token in value)
        and len(set(value)) == len(value)
    )


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: whether it holds no half of a UTF-16 pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
