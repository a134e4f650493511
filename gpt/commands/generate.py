"""Let a trained model write: continue prompts, as it comes to the screen or whole into a file."""

from pathlib import Path
from typing import Annotated

import typer

from gpt.core.cli import LOG_FILE, Changes, LogFile, log, logging_to
from gpt.core.errors import UserError
from gpt.core.files import atomic_write, prepare_output, sha256_file
from gpt.core.params import check_section, read_section
from gpt.generation.text import GenerateParams, generate_texts, samples_document
from gpt.model.checkpoint import Checkpoint, load_checkpoint


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
            content = samples_document(loaded, settings, digest, cached=cache)
            with atomic_write(out) as file:
                file.write(content.encode())
            print(f"{len(settings.prompts) * settings.samples} samples -> {out}")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()  # line ends as they are
    except OSError as error:
        raise UserError(f"--prompt-file {path}: expected a text, found: {error.strerror}; correct the path") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt-file {path}: expected UTF-8, found {error.reason} at byte {error.start:,}; convert it"
        ) from None


def _print(checkpoint: Checkpoint, settings: GenerateParams, *, cached: bool) -> None:
    """Let a person read along."""
    for number, (prompt, _, pieces) in enumerate(generate_texts(checkpoint, settings, cached=cached)):
        if number:
            print("\n" + "-" * 40)
        print(prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
