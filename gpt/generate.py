"""Let a trained model write: continue prompts, as it comes to the screen or whole into a file."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import Field

from gpt.checkpoint import Checkpoint, load_checkpoint
from gpt.command import LOG_FILE, Changes, LogFile, log, logging_to
from gpt.device import CPU_THREADS
from gpt.errors import UserError
from gpt.files import atomic_write, prepare_output, sha256_file
from gpt.params import read_section
from gpt.sampling import SamplingParams, sample


class GenerateParams(SamplingParams):
    """The section `generate`; in a params file every key is required, as everywhere."""

    prompts: list[str] = Field(default=[""], min_length=1)
    samples: int = Field(default=1, ge=1)


def texts(checkpoint: Checkpoint, params: GenerateParams) -> Iterator[tuple[str, int, Iterator[str]]]:
    """Every sample of every prompt: the prompt, the sample's number from 1, and the pieces of its continuation.

    An empty prompt starts after a line end, which is where a new speaker or line begins; where the vocabulary has no
    line end, after its first symbol.

    Raises:
        UserError: a prompt holds characters that the model does not know.
    """
    torch.set_num_threads(CPU_THREADS)  # no GPU: one token at a time is too little work for it, and its bits differ
    model, tokenizer = checkpoint.build(), checkpoint.tokenizer
    encoded = [_encode(checkpoint, prompt) if prompt else [tokenizer.start] for prompt in params.prompts]
    for number, (prompt, tokens) in enumerate(zip(params.prompts, encoded, strict=True)):
        first = params.seed + number * params.samples
        drawn = sample(model, [int(token) for token in tokens], params, range(first, first + params.samples))
        kept: list[list[int]] = []
        for turn in range(params.samples):
            yield prompt, turn + 1, (tokenizer.decode([row[turn]]) for row in _again(kept, drawn))


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
    samples: Annotated[int | None, typer.Option(min=1, help="Samples of each prompt.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Length of a continuation.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Below 1 bolder, above 1 wilder; 0 takes the likeliest token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among the k likeliest tokens only.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Same seed, same text.")] = None,
    changes: Changes = [],  # noqa: B006 (Typer copies it)
    log_file: LogFile = LOG_FILE,
) -> None:
    """Read the settings and the checkpoint, write the samples."""
    if changes and params is None:
        raise UserError(f"--set {changes[0]}: expected --params beside it, found none; name the params file")
    options = {
        "prompts": prompt,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "seed": seed,
    }
    section = read_section(params, "generate", GenerateParams, changes) if params else GenerateParams()
    given = {key: value for key, value in options.items() if value is not None}
    settings = GenerateParams.model_validate({**section.model_dump(), **given})
    loaded = load_checkpoint(checkpoint)
    digest = sha256_file(checkpoint)
    with logging_to(log_file, "generate", digest[:8]):
        log.info("%s", settings)
        if out is None:
            _print(loaded, settings)
        else:
            prepare_output(out)
            content = _sheet(loaded, settings, digest)
            with atomic_write(out) as file:
                file.write(content.encode())
            print(f"{len(settings.prompts) * settings.samples} samples -> {out}")


def _again(kept: list[list[int]], more: Iterator[list[int]]) -> Iterator[list[int]]:
    """What was drawn before, then what is drawn now: the first sample comes as it is drawn, the others with it."""
    yield from kept
    for row in more:
        kept.append(row)
        yield row


def _encode(checkpoint: Checkpoint, prompt: str) -> Any:
    try:
        return checkpoint.tokenizer.encode(prompt)
    except UserError as error:
        raise UserError(
            f"prompt {prompt!r}: {error}, or choose another prompt: generate.prompts in the params file, or --prompt; "
            "an empty one always works"
        ) from None


def _print(checkpoint: Checkpoint, settings: GenerateParams) -> None:
    """Let a person read along."""
    for number, (prompt, _, pieces) in enumerate(texts(checkpoint, settings)):
        if number:
            print("\n" + "-" * 40)
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


def _sheet(checkpoint: Checkpoint, settings: GenerateParams, digest: str) -> str:
    """All samples as one text, headed by what made them: by content, so that text leads back to model and corpus."""
    sheet = io.StringIO()
    top_k = settings.top_k or "all"
    print(f"checkpoint SHA-256 {digest}", file=sheet)
    print(f"corpus     SHA-256 {checkpoint.about['corpus_sha256']}", file=sheet)
    print(f"temperature {settings.temperature}, top_k {top_k}, seed {settings.seed}", file=sheet)
    for prompt, turn, pieces in texts(checkpoint, settings):
        print(f"\n{'=' * 80}\nprompt {prompt!r}, sample {turn} of {settings.samples}\n{'=' * 80}", file=sheet)
        print(prompt + "".join(pieces), file=sheet)
    return sheet.getvalue()
