"""Generate text with a trained model: print it while it is generated, or write all samples to a file."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gpt.core.cli import LOG_FILE, Changes, LogFile, log, logging_to
from gpt.core.errors import UserError, printable
from gpt.core.files import atomic_write, prepare_output, sha256_file
from gpt.core.params import check_section, read_section
from gpt.generation.text import GenerateParams, generate_texts, samples_document
from gpt.model.checkpoint import Checkpoint, load_checkpoint


def _option(key: str, description: str, *names: str) -> Any:
    """The option that overrides a key of the section `generate`, with the default and the bounds of that key."""
    field = GenerateParams.model_fields[key]
    default = ", ".join(map(repr, field.default)) if isinstance(field.default, list) else field.default
    bounds = {
        name: getattr(rule, name) for rule in field.metadata for name in ("ge", "gt", "le") if hasattr(rule, name)
    }
    return typer.Option(
        *names,
        help=description,
        show_default=str(default or "off"),
        min=bounds.get("ge", bounds.get("gt")),
        max=bounds.get("le"),
    )


def command(
    checkpoint: Annotated[Path, typer.Option(metavar="FILE", help="Trained model.")],
    params: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Params file whose section generate replaces the defaults below."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Output file; without it, print the text.")] = None,
    prompts: Annotated[list[str] | None, _option("prompts", "Text to continue; repeatable.", "--prompt")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 file with a prompt, in addition to those of --prompt.")
    ] = None,
    samples: Annotated[int | None, _option("samples", "Number of samples per prompt.")] = None,
    max_new_tokens: Annotated[int | None, _option("max_new_tokens", "Number of tokens to generate.")] = None,
    temperature: Annotated[float | None, _option("temperature", "Lower is less random; 0 is greedy.")] = None,
    top_k: Annotated[int | None, _option("top_k", "Keep the k most probable tokens.")] = None,
    top_p: Annotated[float | None, _option("top_p", "Keep the fewest tokens with this total probability.")] = None,
    min_p: Annotated[float | None, _option("min_p", "Keep tokens with this part of the highest probability.")] = None,
    repetition_penalty: Annotated[
        float | None, _option("repetition_penalty", "Above 1, tokens already in the text become less probable.")
    ] = None,
    stop: Annotated[list[str] | None, _option("stop", "End the text before this string; repeatable.")] = None,
    seed: Annotated[int | None, _option("seed", "Random seed; the same seed gives the same text.")] = None,
    cache: Annotated[bool, typer.Option(help="Keep keys and values instead of recomputing them.")] = True,
    changes: Changes = [],  # noqa: B006 (Typer copies it)
    log_file: LogFile = LOG_FILE,
) -> None:
    """Combine defaults, params file and options, then generate."""
    options = locals()
    if prompt_file is not None:
        options["prompts"] = [*(prompts or []), _read_prompt(prompt_file)]
    if changes and params is None:
        raise UserError(f"--set {changes[0]}: expected --params as well, found none; name the params file")
    section = read_section(params, "generate", GenerateParams, changes) if params else GenerateParams()
    overrides = {key: options[key] for key in GenerateParams.model_fields if options[key] is not None}
    values = {"generate": {**section.model_dump(), **overrides}}
    settings = check_section(params or Path("command line"), "generate", GenerateParams, values)
    generate(settings=settings, checkpoint=checkpoint, out=out, cached=cache, log_files=log_file)


def generate(
    *, settings: GenerateParams, checkpoint: Path, out: Path | None, cached: bool, log_files: Sequence[Path]
) -> None:
    """Generate all samples and print them, or write them to the file `out`."""
    loaded = load_checkpoint(checkpoint)
    digest = sha256_file(checkpoint)
    with logging_to(log_files, "generate", digest[:8]):
        log.info("%s", settings)
        if out is None:
            _print(loaded, settings, cached=cached)
            return
        prepare_output(out)
        content = samples_document(loaded, settings, digest, cached=cached)
        with atomic_write(out) as file:
            file.write(content.encode())
        print(f"{len(settings.prompts) * settings.samples} samples -> {out}")


def _read_prompt(path: Path) -> str:
    try:
        return path.read_bytes().decode()  # keeps line endings
    except OSError as error:
        raise UserError(f"--prompt-file {path}: expected a text, found: {error.strerror}; correct the path") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt-file {path}: expected UTF-8, found {error.reason} at byte {error.start:,}; convert it"
        ) from None


def _print(checkpoint: Checkpoint, settings: GenerateParams, *, cached: bool) -> None:
    """Print the samples while they are generated; on a terminal with control characters escaped."""
    shown = printable if sys.stdout.isatty() else str
    for index, (prompt, _, chunks) in enumerate(generate_texts(checkpoint, settings, cached=cached)):
        if index:
            print("\n" + "-" * 40)
        print(shown(prompt), end="", flush=True)
        for chunk in chunks:
            print(shown(chunk), end="", flush=True)
        print(flush=True)
