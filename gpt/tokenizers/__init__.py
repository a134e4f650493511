"""The tokenizers by kind, and `tokenizer_from_json` to load one of any kind."""

from typing import Any

from gpt.core.errors import UserError
from gpt.tokenizers.base import Tokenizer
from gpt.tokenizers.char import CharTokenizer
from gpt.tokenizers.subword import BpeTokenizer, WordPieceTokenizer
from gpt.tokenizers.tiktoken import TiktokenTokenizer
from gpt.tokenizers.word import WordTokenizer

TOKENIZERS: dict[str, type[Tokenizer]] = {
    cls.kind: cls for cls in (CharTokenizer, WordTokenizer, BpeTokenizer, WordPieceTokenizer, TiktokenTokenizer)
}


def tokenizer_from_json(value: Any) -> Tokenizer:
    """Create a tokenizer from the result of `Tokenizer.to_json`.

    Raises:
        UserError: the value is not a valid tokenizer.
    """
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in TOKENIZERS:
        raise UserError(f"tokenizer: expected one of the kinds {', '.join(TOKENIZERS)}, found {kind!r}; tokenize again")
    return TOKENIZERS[kind].from_json(value)
