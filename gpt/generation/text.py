"""Let a trained model write: continue prompts, as it comes to the screen or whole into a file."""

import io
from collections.abc import Iterator, Sequence
from itertools import count, tee
from typing import Annotated

import torch
from pydantic import Field

from gpt.core.errors import UserError
from gpt.generation.decoding import generate_tokens
from gpt.generation.sampling import SamplingParams
from gpt.model.checkpoint import Checkpoint
from gpt.model.device import CPU_THREADS

SIDE_BY_SIDE = 16  # texts written at once; more take more memory and hardly less time


class GenerateParams(SamplingParams):
    """The section `generate`; in a params file every key is required, as everywhere."""

    prompts: list[str] = Field(default=[""], min_length=1)
    samples: int = Field(default=1, ge=1)
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[])


def generate_texts(
    checkpoint: Checkpoint, params: GenerateParams, *, cached: bool = True
) -> Iterator[tuple[str, int, Iterator[str]]]:
    """Every sample of every prompt: the prompt, the sample's number from 1, and the pieces of its continuation.

    An empty prompt starts after a line end, which is where a new speaker or line begins; where the vocabulary has no
    line end, after its first symbol.

    Raises:
        UserError: a prompt holds characters that the model does not know.
    """
    torch.set_num_threads(CPU_THREADS)  # no GPU: one token at a time is too little work for it, and its bits differ
    model, tokenizer = checkpoint.build(), checkpoint.tokenizer
    encoded = [_encode(checkpoint, prompt) if prompt else [tokenizer.start_token] for prompt in params.prompts]
    wanted = [(number, turn) for number in range(len(encoded)) for turn in range(params.samples)]
    for first in range(0, len(wanted), SIDE_BY_SIDE):
        chosen = wanted[first : first + SIDE_BY_SIDE]
        seeds = range(params.seed + first, params.seed + first + len(chosen))
        drawn = generate_tokens(model, [encoded[number] for number, _ in chosen], params, seeds, cached=cached)
        rows = tee(drawn, len(chosen))  # the first text comes as it is drawn, the others have come with it
        for (number, turn), tokens in zip(chosen, map(_column, rows, count()), strict=True):
            yield params.prompts[number], turn + 1, until(tokenizer.stream(tokens), params.stop)


def until(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """Pass a text on up to the first of these strings, which is left out; what may become one is held back."""
    longest = max(map(len, stops), default=1)
    held = ""
    for piece in pieces:
        held += piece
        found = [at for at in (held.find(stop) for stop in stops) if at >= 0]
        if found:
            yield held[: min(found)]
            return
        ready = len(held) - longest + 1
        if ready > 0:
            yield held[:ready]
            held = held[ready:]
    yield held


def _column(rows: Iterator[list[int]], column: int) -> Iterator[int]:
    return (row[column] for row in rows)


def _encode(checkpoint: Checkpoint, prompt: str) -> list[int]:
    try:
        return [int(token) for token in checkpoint.tokenizer.encode(prompt)]
    except UserError as error:
        raise UserError(
            f"prompt {prompt!r}: {error}, or choose another prompt: generate.prompts in the params file, or --prompt; "
            "an empty one always works"
        ) from None


def _drawn_with(settings: GenerateParams) -> str:
    """The settings of the drawing as a line: those that are always there, and those that are in use."""
    used = {
        "top_p": settings.top_p,
        "min_p": settings.min_p,
        "repetition_penalty": settings.repetition_penalty if settings.repetition_penalty != 1 else None,
        "stop": settings.stop or None,
    }
    more = "".join(f", {name} {value}" for name, value in used.items() if value is not None)
    return f"temperature {settings.temperature}, top_k {settings.top_k or 'all'}{more}, seed {settings.seed}"


def samples_document(checkpoint: Checkpoint, settings: GenerateParams, digest: str, *, cached: bool) -> str:
    """All samples as one text, headed by what made them: by content, so that text leads back to model and corpus."""
    sheet = io.StringIO()
    print(f"checkpoint SHA-256 {digest}", file=sheet)
    print(f"corpus     SHA-256 {checkpoint.about['corpus_sha256']}", file=sheet)
    print(_drawn_with(settings), file=sheet)
    for prompt, turn, pieces in generate_texts(checkpoint, settings, cached=cached):
        print(f"\n{'=' * 80}\nprompt {prompt!r}, sample {turn} of {settings.samples}\n{'=' * 80}", file=sheet)
        print(prompt + "".join(pieces), file=sheet)
    return sheet.getvalue()
