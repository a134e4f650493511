"""The front door: `python -m gpt VERB`. A verb's module is imported only when the verb is called."""

import ast
import gc
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import typer

from gpt.core.errors import OneLineError

VERBS = ("download", "tokenize", "train", "evaluate", "generate", "explain", "check-params")


def main() -> None:
    """Run one verb; turn an error that is meant for a person into one line on stderr and its exit code."""
    called = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    try:
        code = _app(called)(prog_name="python -m gpt", standalone_mode=False)
        sys.stdout.flush()
    except OneLineError as error:
        code = _refuse(called, str(error), error.exit_code)
    except typer.TyperException as error:
        verb = f"{called} " if called in VERBS else ""
        code = _refuse(
            called, f"{error.format_message().rstrip('.')}. Try: python -m gpt {verb}--help", error.exit_code
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to flush into
        code = 1
    sys.exit(code)


def _app(called: str) -> typer.Typer:
    """The whole command line: the called verb for real, of the others only the line in `--help`."""
    app = typer.Typer(help="Train, measure and sample a small GPT.", no_args_is_help=True, add_completion=False)
    app.callback()(lambda: None)
    for verb in VERBS:
        name = "gpt.commands." + verb.replace("-", "_")
        if verb == called:
            module = _imported(name)
            app.command(verb, help=module.__doc__)(module.command)
        else:
            app.command(verb, help=_docstring(name))(_not_called)
    return app


def _imported(name: str) -> ModuleType:
    """A verb's module; no garbage is looked for among all that torch brings along, which takes a sixth of the time."""
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def _docstring(name: str) -> str:
    """A module's docstring, read without importing the module."""
    source = Path(__file__).with_name("commands").joinpath(name.rpartition(".")[2] + ".py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


def _not_called() -> None:
    raise AssertionError("the verb that is called is always imported")


def _refuse(called: str, message: str, code: int) -> int:
    one_line = " ".join(message.split())
    who = f"gpt {called}" if called else "gpt"
    sys.stderr.write(f"{who}: {one_line}\n")  # at once, so that the words of two ranks do not mix
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    main()
