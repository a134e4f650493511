"""The command line: `python -m gpt VERB` or `chargpt VERB`. A verb's module is imported only when it is called."""

import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

try:
    import typer
except ModuleNotFoundError as error:
    sys.exit(f"gpt: {error} for {sys.executable}; activate the environment: . .venv/bin/activate")

from gpt.core.errors import OneLineError, printable
from gpt.fast_import import fast_import, skip_final_collection

VERBS = {
    "download": "Download the corpus and verify it by its SHA-256.",
    "tokenize": "Encode the corpus into tokens: the tokenizer, the training and the validation split.",
    "train": "Train the model; torchrun starts it in several processes. Their number does not change the checkpoint.",
    "evaluate": "Evaluate a checkpoint: loss on the validation split, calibration and memorization.",
    "generate": "Generate text from a checkpoint.",
    "explain": "Print the attention scores of a checkpoint for a text; plot its attention, positions and embeddings.",
    "export": "Export a checkpoint: as safetensors, or for the library transformers.",
    "serve": "Serve checkpoints over HTTP: OpenAI's completions API, and a page to explore them.",
    "check-params": "Check all sections of a params file.",
}
CONSOLE_SCRIPT = "chargpt"


def main() -> None:
    """Run one verb; print an error that the user can correct as one line on stderr and exit with its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # the encoding may lack characters of the corpus
    arguments = sys.argv[1:] or ["--help"]
    verb = next((argument for argument in _completed_arguments() or arguments if argument in VERBS), "")
    program = CONSOLE_SCRIPT if Path(sys.argv[0]).stem == CONSOLE_SCRIPT else "python -m gpt"
    try:
        code = _app(verb, completion=program == CONSOLE_SCRIPT)(arguments, prog_name=program, standalone_mode=False)
        sys.stdout.flush()
    except OneLineError as error:
        code = _print_error(verb, str(error), error.exit_code)
    except typer.TyperException as error:
        message = error.format_message().rstrip(".")
        end = "" if message.endswith("?") else "."
        code = _print_error(verb, f"{message}{end} Try: {program} {f'{verb} ' if verb else ''}--help", error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit succeeds
        code = 1
    skip_final_collection()
    sys.exit(code)


def _completed_arguments() -> list[str]:
    """Return the arguments typed so far when the shell requests completions, else none."""
    typed = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    return typed.split()[1:] if f"_{CONSOLE_SCRIPT.upper()}_COMPLETE" in os.environ else []


def _app(called: str, *, completion: bool) -> typer.Typer:
    """Build the command line: the called verb with its options, only the help text of the others."""
    app = typer.Typer(help="Train, evaluate and sample a small GPT.", add_completion=completion)
    app.callback()(_options)
    for verb, text in VERBS.items():
        name = "gpt.commands." + verb.replace("-", "_")
        app.command(verb, help=text)(fast_import(name).command if verb == called else _not_called)
    return app


def _print_version(requested: bool) -> None:
    if requested:
        from gpt import __version__  # noqa: PLC0415 (reading it takes 20 ms)

        print(f"chargpt {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _not_called() -> None:
    raise AssertionError("the verb that is called is always imported")


def _print_error(verb: str, message: str, code: int) -> int:
    line = f"{f'gpt {verb}' if verb else 'gpt'}: {printable(' '.join(message.split()))}\n"
    sys.stderr.write(line)  # in one call, so that the lines of several ranks do not mix
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    main()
