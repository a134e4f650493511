"""The tokenizers by kind, and the way back from `tokenizer.json` to a tokenizer of any kind."""

from typing import Any

from gpt.core.errors import UserError
from gpt.tokenizers.base import Tokenizer
from gpt.tokenizers.char import CharTokenizer
from gpt.tokenizers.subword import BpeTokenizer, WordPieceTokenizer
from gpt.tokenizers.tiktoken import TiktokenTokenizer
from gpt.tokenizers.word import WordTokenizer

TOKENIZERS: dict[str, type[Tokenizer]] = {
    kind.kind: kind for kind in (CharTokenizer, WordTokenizer, BpeTokenizer, WordPieceTokenizer, TiktokenTokenizer)
}


def tokenizer_from_json(value: Any) -> Tokenizer:
    """Make the tokenizer that `to_json` described.

    Raises:
        UserError: the value describes no tokenizer.
    """
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in TOKENIZERS:
        raise UserError(f"tokenizer: expected one of the kinds {', '.join(TOKENIZERS)}, found {kind!r}; tokenize again")
    return TOKENIZERS[kind].from_json(value)
