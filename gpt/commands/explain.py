"""Show how a model processes a text: the attention scores of one head as matrices, and plots of all heads."""

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from gpt.core.errors import UserError
from gpt.core.files import prepare_output
from gpt.evaluation.interpretability import ModelInspection, Numbers, inspect_model
from gpt.evaluation.plots import render_plots, write_plots
from gpt.model.checkpoint import Checkpoint, load_checkpoint
from gpt.model.config import ModelConfig
from gpt.model.device import CPU_THREADS

PRINTED_TOKENS, PLOTTED_TOKENS = 8, 16
CELL_WIDTH, MAX_LABEL = 7, 6  # characters


def command(
    checkpoint: Annotated[Path, typer.Option(metavar="FILE", help="Checkpoint to inspect.")],
    text: Annotated[
        str,
        typer.Option(help=f"Input; the first {PRINTED_TOKENS} tokens are printed, the first {PLOTTED_TOKENS} plotted."),
    ],
    layer: Annotated[int, typer.Option(min=1, help="Layer whose scores are printed, from 1.")] = 1,
    head: Annotated[int, typer.Option(min=1, help="Head whose scores are printed, from 1.")] = 1,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Output: plots of the whole model, PNG.")] = None,
) -> None:
    """Print three matrices; write the plots."""
    loaded = load_checkpoint(checkpoint)
    torch.set_num_threads(CPU_THREADS)
    tokens = _encode(loaded, text)
    model, decode = loaded.build(), loaded.tokenizer.decode
    _check_layer_and_head(loaded.model, layer, head)
    if out:
        prepare_output(out / "attention.png")
    length = min(len(tokens), PRINTED_TOKENS, loaded.model.block_size)
    inspection = inspect_model(model, tokens[:length], decode)
    for paragraph in explain(inspection, loaded.model, layer=layer, head=head):
        print(paragraph)
    if inspection.attention and length < len(tokens):
        print(f"\nThese are the first {length} of {len(tokens)} tokens; later tokens do not change their rows.")
    if out:
        plotted = inspect_model(model, tokens[: min(PLOTTED_TOKENS, loaded.model.block_size)], decode)
        for path in write_plots(out, render_plots(plotted)):
            print(f"-> {path}")


def explain(inspection: ModelInspection, params: ModelConfig, *, layer: int, head: int) -> Iterator[str]:
    """The scores of one head before the mask, after it, and after softmax: a sentence and a matrix each.

    Args:
        layer: from 1, as `head`.
    """
    if not inspection.attention:
        yield f"model.kind {inspection.kind}: no attention. The next token is predicted from the last one by a table."
        return
    attention, labels = inspection.attention, inspection.tokens
    raw_TT, masked_TT, weights_TT = (
        part[layer - 1, head - 1] for part in (attention.raw, attention.masked, attention.weights)
    )
    rule = "Rows are queries, columns are keys."
    if inspection.kind == "average":
        yield f"model.kind average: no queries and keys, every score is 0. {rule}"
        before, after = "Scores: all equal.", "equal weights. Their product with the embeddings is the running mean."
    else:
        layers, heads = _layers_and_heads(params)
        yield f"Layer {layer} of {layers}, head {head} of {heads}, model.position {params.position}. {rule}"
        bias = {"relative": " + q · r / √D", "alibi": " - slope · distance"}.get(params.position, "")
        query, key = (_name(labels, index) for index in np.unravel_index(raw_TT.argmax(), raw_TT.shape))
        before = f"Scores q · k / √D{bias}. The highest: query {query}, key {key}."
        last_T = weights_TT[-1]
        query, key = _name(labels, len(last_T) - 1), _name(labels, last_T.argmax())
        after = f"the attention weights. The largest of query {query}: key {key}, {last_T.max():.2f}."
    yield f"\n{before}\n\n{table(raw_TT, labels)}"
    yield f"\nAfter the causal mask: -inf for keys that come after the query.\n\n{table(masked_TT, labels)}"
    yield f"\nAfter softmax, each row sums to 1: {after}\n\n{table(weights_TT, labels)}"


def table(values_TT: Numbers, tokens: tuple[str, ...]) -> str:
    """Format a matrix, with the number and the token of each row and column."""
    labels = [token if len(token) <= MAX_LABEL else f"{token[: MAX_LABEL - 1]}…" for token in tokens]
    margin = 3 + max(map(_width, labels))
    lines = ["".join([" " * margin, *(f"{number:>{CELL_WIDTH}}" for number in range(1, len(labels) + 1))])]
    lines.append("".join([" " * margin, *(" " * (CELL_WIDTH - _width(label)) + label for label in labels)]))
    for number, (label, row_T) in enumerate(zip(labels, values_TT, strict=True), start=1):
        cells = (f"{value + 0.0:{CELL_WIDTH}.2f}" for value in np.round(row_T.astype(float), 2))
        lines.append("".join([f"{number:>2} ", label, " " * (margin - 3 - _width(label)), *cells]))
    return "\n".join(lines)


def _name(labels: tuple[str, ...], index: int | np.intp) -> str:
    return f"{int(index) + 1} {labels[index]}"


def _layers_and_heads(params: ModelConfig) -> tuple[int, int]:
    return (params.n_layer, params.n_head) if params.kind == "gpt" else (1, 1)


def _check_layer_and_head(params: ModelConfig, layer: int, head: int) -> None:
    for name, found, available in zip(("layer", "head"), (layer, head), _layers_and_heads(params), strict=True):
        if found > available:
            raise UserError(f"--{name}: expected 1 to {available}, which the model has, found {found}; choose another")


def _encode(checkpoint: Checkpoint, text: str) -> list[int]:
    try:
        tokens = [int(token) for token in checkpoint.tokenizer.encode(text)]
    except UserError as error:
        raise UserError(f"--text {text!r}: {error}") from None
    if not tokens:
        raise UserError("--text: expected at least one character, found none; use characters of the training text")
    return tokens


def _width(text: str) -> int:
    """Columns of the terminal that a text occupies: wide East Asian characters take two."""
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in text)
