"""The interface of all tokenizers: a vocabulary of tokens, each of which is a sequence of UTF-8 bytes."""

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt

from gpt.core.errors import UserError

Kind = Literal["char", "word", "bpe", "wordpiece", "tiktoken"]
Tokens = npt.NDArray[np.uint32]

MIN_FREQUENCY = 2  # occurrences of a word or pair that becomes a token
MAX_LISTED = 20  # characters in an error message
SURROGATE = re.compile("[\ud800-\udfff]")  # code points that UTF-8 cannot encode


@dataclass(frozen=True)
class Tokenizer(ABC):
    """Converts text to token IDs and back.

    A subclass is a dataclass whose fields are its vocabulary and the content of `tokenizer.json`: an alphabet (a string
    of distinct characters in sorted order) or a list of distinct tokens each. Equal fields make equal tokenizers.
    """

    kind: ClassVar[Kind]
    expected: ClassVar[str]  # what the fields have to be, for an error message

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The UTF-8 bytes of each token, indexed by token ID; tokens of byte-level kinds may split a character."""
        return tuple(token.encode() for field in fields(self) for token in getattr(self, field.name))

    @abstractmethod
    def _encode(self, text: str) -> Iterable[int]:
        """Encode text whose characters are all in the alphabet."""

    def _check(self, text: str) -> None:
        """Raise a UserError if the text contains characters that cannot be encoded."""
        alphabet = self.alphabet
        if alphabet is None:
            if unknown := set(SURROGATE.findall(text)):
                raise UserError(f"expected valid Unicode text, found {format_characters(unknown)}; remove them")
        elif unknown := set(text) - set(alphabet):
            raise UserError(
                f"expected only the {len(alphabet)} characters of the training text, found "
                f"{format_characters(unknown)}; remove them (known: {alphabet[:100]!r})"
            )

    def _is_valid(self) -> bool:
        """Whether the fields, each valid by itself, fit together."""
        return True

    @property
    def alphabet(self) -> str | None:
        """The characters that can be encoded, sorted; None: all characters."""
        return None

    @property
    def vocab_size(self) -> int:
        """Number of distinct tokens."""
        return len(self.token_bytes)

    @property
    def start_token(self) -> int:
        """The token that precedes text generated without a prompt: a line feed, or token 0 if there is none."""
        return self.token_bytes.index(b"\n") if b"\n" in self.token_bytes else 0

    def encode(self, text: str) -> Tokens:
        """Convert text to token IDs, shape (tokens,).

        Raises:
            UserError: the text contains characters that cannot be encoded; the message lists them.
        """
        self._check(text)
        return np.asarray(self._encode(text), dtype=np.uint32)

    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[Tokens]:
        """Encode the chunks of a long text, each by itself; the results are those of `encode`."""
        return map(self.encode, chunks)

    def decode(self, tokens: Iterable[int]) -> str:
        """Convert token IDs to text; invalid UTF-8, which a model may generate, becomes U+FFFD."""
        token_bytes = self.token_bytes
        return b"".join([token_bytes[token] for token in tokens]).decode("utf-8", "replace")

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Decode incrementally: yields each character as soon as all of its bytes are there. Joined, it is `decode`."""
        token_bytes, decoder = self.token_bytes, codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            if text := decoder.decode(token_bytes[token]):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def to_json(self) -> dict[str, Any]:
        """The content of `tokenizer.json`: the kind and the vocabulary."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {"kind": self.kind, **{name: value if isinstance(value, str) else list(value) for name, value in values}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Create a tokenizer from the result of `to_json`.

        Raises:
            UserError: the value is not a valid tokenizer of this kind.
        """
        found: dict[str, Any] = {field.name: value.get(field.name) for field in fields(cls)}
        if value.keys() - {"kind"} == found.keys() and all(
            _is_vocabulary(found[field.name], field.type) for field in fields(cls)
        ):
            tokenizer = cls(**{name: one if isinstance(one, str) else tuple(one) for name, one in found.items()})
            if tokenizer._is_valid():
                return tokenizer
        raise UserError(
            f"tokenizer: expected kind {cls.kind!r} with {cls.expected}, found something else; tokenize again"
        )


def format_characters(characters: Iterable[str]) -> str:
    """List characters for an error message: sorted, escaped, at most `MAX_LISTED`."""
    names = [repr(character) for character in sorted(characters)]
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def check_vocab_size(vocab_size: int, minimum: int, reason: str) -> None:
    """Raise a UserError if `tokenize.vocab_size` is below the minimum of the tokenizer kind."""
    if vocab_size < minimum:
        raise UserError(
            f"tokenize.vocab_size: expected at least {minimum:,} ({reason}), found {vocab_size:,}; increase it"
        )


def _is_vocabulary(value: Any, field_type: object) -> bool:
    """Whether a JSON value is an alphabet, for a field of type `str`, or else a list of distinct tokens."""
    if field_type is str:
        return _is_token(value) and list(value) == sorted(set(value))
    return isinstance(value, list) and all(map(_is_token, value)) and len(set(value)) == len(value)


def _is_token(value: object) -> bool:
    return isinstance(value, str) and value != "" and not SURROGATE.search(value)
