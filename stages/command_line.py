"""The options of the command that a wrapper runs, parsed by the rules of the command's own parser (Click)."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from gpt.core.errors import UserError

OPTIONS = (
    *("--params", "--tokens", "--checkpoint", "--metrics", "--history", "--validation", "--positions", "--calibration"),
    *("--pictures", "--out", "--run-dir", "--timeout", "--log-file"),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; correct the command to run")


class CommandLine:
    """A command and the values of its options, in the forms `--name value`, `--name=value`, `-S value`, `-Svalue`."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [*words]
        parser = _Parser(add_help=False, allow_abbrev=False)
        for name in OPTIONS:
            parser.add_argument(name, action="append", default=[], dest=name)
        parser.add_argument("--set", "-S", action="append", default=[], dest="--set")
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
