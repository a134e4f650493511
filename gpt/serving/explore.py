"""What the page shows of a model: the distribution of the next token, attention, positions, n-grams."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gpt.evaluation.interpretability import Numbers, Positions, inspect_model, ngram_lookups, printable_token
from gpt.generation.sampling import SamplingParams, next_token_probabilities
from gpt.model.gpt import LanguageModel
from gpt.serving.protocol import RequestError
from gpt.tokenizers.base import Tokenizer

MAX_LISTED = 80  # tokens of the distribution
MAX_INSPECTED = 64  # tokens of the attention matrix
MAX_COLUMNS = 128  # positions or distances


@torch.inference_mode()
def next_tokens(model: LanguageModel, tokenizer: Tokenizer, text: str, params: SamplingParams) -> dict[str, Any]:
    """The most probable next tokens, with their probabilities before and after the sampling settings."""
    tokens = _encode(tokenizer, text)
    logits_1V = model(torch.tensor([tokens[-model.config.block_size :]]))[:, -1].float()
    seen_1V = torch.zeros_like(logits_1V, dtype=torch.bool)
    seen_1V[0, tokens] = True
    before_V, after_V = logits_1V.softmax(-1)[0], next_token_probabilities(logits_1V, seen_1V, params)[0]
    order = before_V.argsort(descending=True, stable=True)[:MAX_LISTED].tolist()
    listed = [
        {"text": tokenizer.decode([token]), "before": float(before_V[token]), "after": float(after_V[token])}
        for token in order
    ]
    return {"tokens": listed}


def look_inside(model: LanguageModel, tokenizer: Tokenizer, text: str, layer: int, head: int) -> dict[str, Any]:
    """The attention of one head, the encodings of the positions, and the n-grams that were looked up."""
    tokens = _encode(tokenizer, text)[-min(MAX_INSPECTED, model.config.block_size) :]
    found = inspect_model(model, tokens, tokenizer.decode)
    attention = None
    if found.attention:
        layers, heads = found.attention.raw.shape[:2]
        for name, value, most in (("layer", layer, layers), ("head", head, heads)):
            if value > most:
                raise RequestError(400, f"{name}: expected at most {most}, found {value}", param=name)
        attention = {
            name: _rows(getattr(found.attention, name)[layer - 1, head - 1]) for name in ("raw", "masked", "weights")
        }
    ngrams = [
        {
            "position": lookup.position + 1,
            "n": lookup.n,
            "text": "".join(printable_token(tokenizer.decode([token])) for token in lookup.tokens),
            "row": lookup.row,
            "rows": lookup.rows,
            "shared": lookup.shared,
        }
        for lookup in ngram_lookups(model, tokens)
    ]
    positions = _positions(found.positions) if found.positions else None
    return {"tokens": found.tokens, "attention": attention, "positions": positions, "ngrams": ngrams}


def _positions(positions: Positions) -> dict[str, Any]:
    """The values of the position scheme, one row for each dimension, head or layer."""
    values = positions.values
    if positions.scheme in ("alibi", "relative"):
        rows, columns = ("head" if positions.scheme == "alibi" else "layer"), "distance"
    else:
        values, rows, columns = values.T, "dimension", "position"
    labels = [f"{rows} {number}" for number in range(1, len(values) + 1)]
    return {"scheme": positions.scheme, "rows": labels, "columns": columns, "values": _rows(values[:, :MAX_COLUMNS])}


def _rows(values: Numbers) -> list[list[float | None]]:
    """A matrix for JSON, with 4 digits; infinite values become null."""
    return [[round(float(value), 4) if np.isfinite(value) else None for value in row] for row in values]


def _encode(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    return [int(token) for token in tokenizer.encode(text)] if text else [tokenizer.start_token]
