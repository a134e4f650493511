"""The tokenizers whose tokens are parts of words: learned ones (Hugging Face `tokenizers`), and GPT-2's (`tiktoken`).

The libraries are imported when a text is learned or encoded, so that whoever only decodes does without.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gpt.core.errors import UserError
from gpt.tokenizers.base import Kind, Tokenizer, invalid_tokenizer, is_token_list

if TYPE_CHECKING:
    import tiktoken
from gpt.tokenizers.subword import BYTE_TO_CHARACTER, bytes_to_text, text_to_bytes

# Where GPT-2 cuts a text before it looks for tokens (Radford et al. 2019): endings after an apostrophe, words, numbers
# and signs with a space before them, spaces. Every character is in one of the parts.
GPT2_PARTS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class TiktokenTokenizer(Tokenizer):
    """The byte pair encoding that OpenAI learned for GPT-2 (Radford et al. 2019), without its sign for a text's end.

    Any text can be encoded.

    Args:
        ranks: the tokens, bytes written as GPT-2 does (a space is `Ġ`); a token's rank is its number.
    """

    ranks: tuple[str, ...]

    kind: ClassVar[Kind] = "tiktoken"

    @classmethod
    def from_tiktoken(cls, content: bytes) -> Self:
        """Read the ranks in tiktoken's own format: in each line the bytes of a token in base64, and its rank.

        Raises:
            UserError: the content has another format.
        """
        try:
            lines = [line.split() for line in content.splitlines()]
            ranks = {int(rank): base64.b64decode(token, validate=True) for token, rank in lines}
            return cls.from_json({"ranks": [bytes_to_text(ranks[rank]) for rank in range(len(lines))]})
        except (ValueError, KeyError, UserError):
            raise UserError(
                "tokenize.ranks: expected lines of base64 and rank, each rank once and each single byte among the "
                "tokens, found something else; name another source and its digest"
            ) from None

    @property
    def alphabet(self) -> None:
        """Any text can be encoded."""

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes of each token."""
        return tuple(map(text_to_bytes, self.ranks))

    def _encode(self, text: str) -> list[int]:
        """What tiktoken's encoder gives."""
        return self._engine.encode_ordinary(text)

    def to_json(self) -> dict[str, Any]:
        """The tokens by rank."""
        return {"kind": self.kind, "ranks": list(self.ranks)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Check that the tokens are bytes, and that each single byte is among them."""
        ranks, single = value.get("ranks"), set(BYTE_TO_CHARACTER.values())
        if not (is_token_list(ranks) and single <= set(value["ranks"]) and set("".join(value["ranks"])) <= single):
            raise invalid_tokenizer(cls.kind, "distinct tokens made of bytes, each single byte among them")
        return cls(tuple(value["ranks"]))

    @cached_property
    def _engine(self) -> "tiktoken.Encoding":
        import tiktoken  # noqa: PLC0415

        ranks = {token: rank for rank, token in enumerate(self.token_bytes)}
        return tiktoken.Encoding("gpt2", pat_str=GPT2_PARTS, mergeable_ranks=ranks, special_tokens={})
