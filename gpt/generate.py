"""Let a trained model write: continue prompts, as it comes to the screen or whole into a file."""

import io
from collections.abc import Iterator, Sequence
from itertools import count, tee
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import Field

from gpt.checkpoint import Checkpoint, load_checkpoint
from gpt.command import LOG_FILE, Changes, LogFile, log, logging_to
from gpt.device import CPU_THREADS
from gpt.errors import UserError
from gpt.files import atomic_write, prepare_output, sha256_file
from gpt.params import check_section, read_section
from gpt.sampling import SamplingParams, sample

SIDE_BY_SIDE = 16  # texts written at once; more take more memory and hardly less time


class GenerateParams(SamplingParams):
    """The section `generate`; in a params file every key is required, as everywhere."""

    prompts: list[str] = Field(default=[""], min_length=1)
    samples: int = Field(default=1, ge=1)
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[])


def texts(
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
    encoded = [_encode(checkpoint, prompt) if prompt else [tokenizer.start] for prompt in params.prompts]
    wanted = [(number, turn) for number in range(len(encoded)) for turn in range(params.samples)]
    for first in range(0, len(wanted), SIDE_BY_SIDE):
        chosen = wanted[first : first + SIDE_BY_SIDE]
        seeds = range(params.seed + first, params.seed + first + len(chosen))
        drawn = sample(model, [encoded[number] for number, _ in chosen], params, seeds, cached=cached)
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


def command(
    checkpoint: Annotated[Path, typer.Option(metavar="FILE", help="Trained model that writes.")],
    params: Annotated[Path | None, typer.Option(metavar="FILE", help="Params file with a section generate.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File for the samples; without it, the screen.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to continue; repeatable. An empty one starts a new line.", show_default=False),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text to continue, beside those of --prompt.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples of each prompt.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Length of a continuation.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Below 1 bolder, above 1 wilder; 0 takes the likeliest token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among the k likeliest tokens only.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Choose among the likeliest that have this share together."),
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Leave out what is this much less likely than the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=0.0, help="Above 1: make less likely what the text holds already.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End a text before this string; repeatable.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Same seed, same text.")] = None,
    cache: Annotated[bool, typer.Option(help="Keep keys and values, or compute all anew at every token.")] = True,
    changes: Changes = [],  # noqa: B006 (Typer copies it)
    log_file: LogFile = LOG_FILE,
) -> None:
    """Read the settings and the checkpoint, write the samples."""
    if changes and params is None:
        raise UserError(f"--set {changes[0]}: expected --params beside it, found none; name the params file")
    if prompt_file is not None:
        prompt = [*(prompt or []), _read(prompt_file)]
    options = {
        "prompts": prompt,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop,
        "seed": seed,
    }
    section = read_section(params, "generate", GenerateParams, changes) if params else GenerateParams()
    given = {key: value for key, value in options.items() if value is not None}
    chosen = {"generate": {**section.model_dump(), **given}}
    settings = check_section(params or Path("command line"), "generate", GenerateParams, chosen)
    loaded = load_checkpoint(checkpoint)
    digest = sha256_file(checkpoint)
    with logging_to(log_file, "generate", digest[:8]):
        log.info("%s", settings)
        if out is None:
            _print(loaded, settings, cached=cache)
        else:
            prepare_output(out)
            content = _sheet(loaded, settings, digest, cached=cache)
            with atomic_write(out) as file:
                file.write(content.encode())
            print(f"{len(settings.prompts) * settings.samples} samples -> {out}")


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


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()  # line ends as they are
    except OSError as error:
        raise UserError(f"--prompt-file {path}: expected a text, found: {error.strerror}; correct the path") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt-file {path}: expected UTF-8, found {error.reason} at byte {error.start:,}; convert it"
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


def _print(checkpoint: Checkpoint, settings: GenerateParams, *, cached: bool) -> None:
    """Let a person read along."""
    for number, (prompt, _, pieces) in enumerate(texts(checkpoint, settings, cached=cached)):
        if number:
            print("\n" + "-" * 40)
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


def _sheet(checkpoint: Checkpoint, settings: GenerateParams, digest: str, *, cached: bool) -> str:
    """All samples as one text, headed by what made them: by content, so that text leads back to model and corpus."""
    sheet = io.StringIO()
    print(f"checkpoint SHA-256 {digest}", file=sheet)
    print(f"corpus     SHA-256 {checkpoint.about['corpus_sha256']}", file=sheet)
    print(_drawn_with(settings), file=sheet)
    for prompt, turn, pieces in texts(checkpoint, settings, cached=cached):
        print(f"\n{'=' * 80}\nprompt {prompt!r}, sample {turn} of {settings.samples}\n{'=' * 80}", file=sheet)
        print(prompt + "".join(pieces), file=sheet)
    return sheet.getvalue()
