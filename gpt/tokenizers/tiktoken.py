"""GPT-2's pretrained tokenizer. The library `tiktoken` is imported only to encode; decoding does not need it."""

import base64
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Self

from gpt.core.errors import UserError
from gpt.tokenizers.base import Kind, Tokenizer
from gpt.tokenizers.subword import CHARACTER_TO_BYTE, bytes_to_text, text_to_bytes

if TYPE_CHECKING:
    import tiktoken

# GPT-2's pre-tokenization (Radford et al. 2019): English contractions; words, numbers and punctuation with a leading
# space; whitespace. It matches every character.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class TiktokenTokenizer(Tokenizer):
    """GPT-2's byte pair encoding (Radford et al. 2019), without the token `<|endoftext|>`. Any text can be encoded.

    Args:
        ranks: the tokens in the order of their IDs; bytes as in `bytes_to_text` (a space is `Ġ`).
    """

    ranks: tuple[str, ...]

    kind: ClassVar[Kind] = "tiktoken"
    expected: ClassVar[str] = "distinct sequences of bytes, all 256 single bytes among them"

    @classmethod
    def from_tiktoken(cls, content: bytes) -> Self:
        """Read a file in tiktoken's format: on each line the bytes of a token in base64, and its rank.

        Raises:
            UserError: the content has another format.
        """
        try:
            lines = [line.split() for line in content.splitlines()]
            ranks = {int(rank): base64.b64decode(token, validate=True) for token, rank in lines}
            return cls.from_json({"ranks": [bytes_to_text(ranks[rank]) for rank in range(len(lines))]})
        except (ValueError, KeyError, UserError):
            raise UserError(
                "tokenize.ranks: expected lines of a base64 token and its rank, each rank once and all 256 single "
                "bytes, found something else; set another source and its SHA-256"
            ) from None

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes of each token."""
        return tuple(map(text_to_bytes, self.ranks))

    def _encode(self, text: str) -> list[int]:
        return self._engine.encode_ordinary(text)

    def _is_valid(self) -> bool:
        return set(CHARACTER_TO_BYTE) <= set(self.ranks) and set("".join(self.ranks)) <= set(CHARACTER_TO_BYTE)

    @cached_property
    def _engine(self) -> "tiktoken.Encoding":
        import tiktoken  # noqa: PLC0415

        ranks = {token: rank for rank, token in enumerate(self.token_bytes)}
        return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
