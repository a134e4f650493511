"""The token folder: `train.bin` and `val.bin` (little-endian token IDs), `tokenizer.json` and `meta.json`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from gpt.core.errors import UserError
from gpt.core.files import read_json
from gpt.core.params import Section
from gpt.tokenizers import tokenizer_from_json
from gpt.tokenizers.base import Kind, Tokenizer

Split = np.ndarray[tuple[int], np.dtype[Any]]


class Meta(Section):
    """The content of `meta.json`."""

    kind: Kind
    vocab_size: int
    dtype: Literal["<u2", "<u4"]
    train_tokens: int
    val_tokens: int
    train_characters: int
    val_characters: int
    corpus_sha256: str


@dataclass(frozen=True)
class TokenData:
    """Both splits, each of shape (tokens,), with their tokenizer and metadata."""

    train: Split
    val: Split
    tokenizer: Tokenizer
    meta: Meta


def load_tokens(folder: Path) -> TokenData:
    """Load a token folder; the splits are memory-mapped. A missing, truncated or invalid file is a UserError."""
    try:
        meta = Meta.model_validate(read_json(folder / "meta.json"))
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{folder / 'meta.json'}: {key}: {error.errors()[0]['msg']}; tokenize again") from None
    train = _map(folder / "train.bin", meta.train_tokens, meta.dtype)
    val = _map(folder / "val.bin", meta.val_tokens, meta.dtype)
    return TokenData(train, val, tokenizer_from_json(read_json(folder / "tokenizer.json")), meta)


def _map(path: Path, tokens: int, dtype: str) -> Split:
    expected = tokens * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.exists() else 0
    if found != expected:
        raise UserError(f"{path}: expected {expected:,} bytes ({tokens:,} tokens), found {found:,}; tokenize again")
    return np.memmap(path, dtype=dtype, mode="r")
