"""Show how a model reads a text: one head's scores as a textbook prints them, and pictures of all heads."""

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from gpt.core.errors import UserError
from gpt.core.files import prepare_output
from gpt.evaluation.interpretability import Attention, Insight, Numbers, look
from gpt.evaluation.plots import write_pictures
from gpt.model.checkpoint import Checkpoint, load_checkpoint
from gpt.model.config import ModelConfig
from gpt.model.device import CPU_THREADS

PRINTED, DRAWN = 8, 16  # tokens
CELL, LONGEST = 7, 6  # characters of a column, and of a token in it


def command(
    checkpoint: Annotated[Path, typer.Option(metavar="FILE", help="Trained model to look into.")],
    text: Annotated[str, typer.Option(help=f"What it reads; {PRINTED} tokens are printed, {DRAWN} drawn.")],
    layer: Annotated[int, typer.Option(min=1, help="Layer whose scores are printed, the first is 1.")] = 1,
    head: Annotated[int, typer.Option(min=1, help="Head whose scores are printed, the first is 1.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Draw PNGs there: attention maps, positions, which symbols are alike."),
    ] = None,
) -> None:
    """Print the three matrices; draw."""
    loaded = load_checkpoint(checkpoint)
    torch.set_num_threads(CPU_THREADS)
    tokens = _tokens(loaded, text)
    model, decode = loaded.build(), loaded.tokenizer.decode
    _check(loaded.model, layer, head)
    if out:
        prepare_output(out / "attention.png")
    length = min(len(tokens), PRINTED, loaded.model.block_size)
    seen = look(model, tokens[:length], decode)
    for part in explain(seen, loaded.model, layer, head):
        print(part)
    if seen.attention and length < len(tokens):
        print(
            f"\nThese are the first {length} of {len(tokens)} tokens; what comes later changes nothing in their rows."
        )
    if out:
        for path in write_pictures(out, look(model, tokens[: min(DRAWN, loaded.model.block_size)], decode)):
            print(f"-> {path}")


def explain(seen: Insight, params: ModelConfig, layer: int, head: int) -> Iterator[str]:
    """What a person reads: one head's scores before the mask, after it, and after softmax, a sentence before each.

    Args:
        layer: from 1, as `head`.
    """
    if not seen.attention:
        yield f"model.kind {seen.kind}: no attention. What comes next is read off a table, by the last token alone."
        return
    yield _headline(seen, params, layer, head)
    one = Attention(*(part[layer - 1, head - 1] for part in _parts(seen.attention)))
    for sentence, values_TT in zip(_sentences(seen, params, one), _parts(one), strict=True):
        yield f"\n{sentence}\n\n{table(values_TT, seen.labels)}"


def table(values_TT: Numbers, labels: tuple[str, ...]) -> str:
    """A matrix as text: each row says who asks, each column who is asked, both by number and token."""
    names = [label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…" for label in labels]
    margin = 3 + max(map(_width, names))
    lines = ["".join([" " * margin, *(f"{number:>{CELL}}" for number in range(1, len(names) + 1))])]
    lines.append("".join([" " * margin, *(_right(name, CELL) for name in names)]))
    for number, (name, row_T) in enumerate(zip(names, values_TT, strict=True), start=1):
        cells = (f"{value + 0.0:{CELL}.2f}" for value in np.round(row_T.astype(float), 2))
        lines.append("".join([f"{number:>2} ", name, " " * (margin - 3 - _width(name)), *cells]))
    return "\n".join(lines)


def _headline(seen: Insight, params: ModelConfig, layer: int, head: int) -> str:
    asks = "A row asks, a column is asked."
    if seen.kind == "average":
        return f"model.kind average: no queries and keys, so that every score is 0. {asks}"
    layers, heads = _size(params)
    return f"Layer {layer} of {layers}, head {head} of {heads}, positions {params.position}. {asks}"


def _sentences(seen: Insight, params: ModelConfig, one: Attention) -> Iterator[str]:
    """What one sees in the scores, in the masked scores, and in the weights."""
    added = {"relative": " + q · r / √D of the distance", "alibi": " - slope · distance"}.get(params.position, "")
    row, column = np.unravel_index(one.raw.argmax(), one.raw.shape)
    later = ", which comes later" if column > row else ""
    if seen.kind == "average":
        yield "Scores: all the same, no token is worth more than another."
    else:
        yield (
            f"Scores q · k / √D{added}: how well query and key fit. Highest where {_named(seen, row)} asks "
            f"{_named(seen, column)}{later}."
        )
    yield "After the mask: -inf for what comes later, since it is what the model shall guess."
    if seen.kind == "average":
        yield "After softmax: equal parts; each row adds up to 1. This triangle times the vectors is their mean so far."
        return
    last_T = one.weights[-1]
    yield (
        f"After softmax: parts; each row adds up to 1. {_named(seen, len(last_T) - 1)} takes most from "
        f"{_named(seen, last_T.argmax())}: {last_T.max():.2f}."
    )


def _parts(attention: Attention) -> tuple[Numbers, Numbers, Numbers]:
    return attention.raw, attention.masked, attention.weights


def _named(seen: Insight, place: int | np.intp) -> str:
    return f"{int(place) + 1} {seen.labels[place]}"


def _size(params: ModelConfig) -> tuple[int, int]:
    """Layers and heads that the model really has."""
    return (params.n_layer, params.n_head) if params.kind == "gpt" else (1, 1)


def _check(params: ModelConfig, layer: int, head: int) -> None:
    for name, found, most in zip(("layer", "head"), (layer, head), _size(params), strict=True):
        if found > most:
            raise UserError(f"--{name}: expected 1 to {most}, which is what the model has, found {found}; choose one")


def _tokens(checkpoint: Checkpoint, text: str) -> list[int]:
    try:
        tokens = [int(token) for token in checkpoint.tokenizer.encode(text)]
    except UserError as error:
        raise UserError(f"--text {text!r}: {error}") from None
    if not tokens:
        raise UserError("--text: expected at least one character, found none; give a few that the model knows")
    return tokens


def _width(text: str) -> int:
    """Columns that a text takes on a screen."""
    return sum(1 + (unicodedata.east_asian_width(one) in "WF") for one in text)


def _right(text: str, width: int) -> str:
    return " " * (width - _width(text)) + text
