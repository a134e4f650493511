"""The command line of a wrapper: its entry point, and the options of the wrapped command.

The entry point also detects edits to a stage's inputs while it runs. DVC hashes params and code again when the stage
has ended, and records those hashes with the result in dvc.lock and in its run cache. After an edit the result would be
recorded under inputs that did not produce it.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML

from gpt.core.errors import UserError, printable
from gpt.core.files import sha256_file
from gpt.core.params import read_params
from gpt.fast_import import skip_final_collection
from gpt.training.parent import end_with_parent
from stages.runs.run_record import drop_states, flatten, main_workspace

PATHS = (
    *("--params", "--tokens", "--checkpoint", "--metrics", "--history", "--validation", "--positions", "--blocks"),
    *("--calibration", "--pictures", "--out", "--run-dir", "--timeout", "--log-file"),
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are user errors."""

    def error(self, message: str) -> NoReturn:
        """Raise the message with its remedy."""
        raise UserError(f"{message}; correct the command to run")


class CommandLine:
    """A command and the values of its options, read by the rules of the command's own parser (Click).

    The forms are `--name value`, `--name=value`, `-S value`, `-Svalue`.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [*words]
        parser = Parser(add_help=False, allow_abbrev=False)
        for names in (*((name,) for name in PATHS), ("--set", "-S")):
            parser.add_argument(*names, action="append", default=[], dest=names[0])
        self._values: dict[str, list[str]] = vars(parser.parse_known_args(self.words)[0])

    @property
    def changes(self) -> list[str]:
        """The overrides of the params file, as `section.key=value`."""
        return self._values["--set"]

    def all_paths(self, name: str) -> list[Path]:
        """All values of an option."""
        return [Path(value) for value in self._values[name]]

    def optional_path(self, name: str) -> Path | None:
        """The value of an option, the last one if it is repeated; None if it is missing."""
        return self.all_paths(name)[-1] if self._values[name] else None

    def path(self, name: str) -> Path:
        """The value of a required option.

        Raises:
            UserError: the option is missing.

        """
        value = self.optional_path(name)
        if value is None:
            found = " ".join(self.words) or "no command"
            raise UserError(f"{name}: expected this option in the command to run, found: {found}")
        return value

    def with_default(self, name: str, value: object) -> "CommandLine":
        """The command with this option appended, unless it is there."""
        return self if self._values[name] else self.with_option(name, value)

    def with_option(self, name: str, value: object) -> "CommandLine":
        """The command with this option appended."""
        return CommandLine([*self.words, name, str(value)])


def enter(stage: str, main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a stage on this process's arguments and exit; a user's mistake becomes one line and exit code 2."""
    if "DVC_STAGE" in os.environ:
        end_with_parent(signal.SIGTERM)  # if dvc is killed, a second `dvc repro` must not run beside this stage
        if os.getpgid(os.getppid()) != os.getpgrp():  # dvc was killed before the line above
            sys.exit(1)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        drop_states(main_workspace())
        code = run_checked(main, sys.argv[1:])
    except UserError as error:
        print(printable(f"stages.{stage}: {error}"), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    skip_final_collection()
    sys.exit(code)


def run_checked(main: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    """Run a stage's `main`; returns its exit code.

    Raises:
        UserError: under DVC, the stage's params or code changed while it ran.
    """
    name = os.environ.get("DVC_STAGE")
    before = _inputs(name, words) if name else {}
    code = main(words)
    after = _inputs(name, words) if name and not code else before
    if changed := [key for key in sorted(before | after) if before.get(key) != after.get(key)]:
        text = f"{', '.join(changed)} changed while the stage ran, so DVC would record the result under wrong inputs"
        raise UserError(f"{text}; run dvc repro again; to edit while a stage runs, use dvc exp run --temp")
    return code


def _inputs(stage: str, words: Sequence[str]) -> dict[str, str]:
    """Params by `section.key`, and SHA-256 of code by path, as far as `dvc.yaml` declares them for the stage."""
    stages: dict[str, Any] = YAML(typ="safe", pure=True).load(Path("dvc.yaml"))["stages"]
    outputs = {out for entry in stages.values() for out in entry.get("outs", [])}
    params_file = CommandLine(words).optional_path("--params")
    sections = [section for section in stages[stage].get("params", []) if isinstance(section, str)]
    params = flatten(read_params(params_file), sections) if params_file else {}
    code = [path for dep in stages[stage].get("deps", []) if dep not in outputs for path in _files(Path(dep))]
    return params | {path.as_posix(): sha256_file(path) for path in code}


def _files(dep: Path) -> list[Path]:
    """The file itself, or all files of a folder without compiled ones."""
    found = sorted(dep.rglob("*")) if dep.is_dir() else [dep]
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]
