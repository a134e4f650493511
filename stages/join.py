"""`python -m stages.join [COMMAND…]`: train on this machine as one of several; run it on each of them.

Node 0 does what the stage train does, the others train with it and write nothing. Without a command, that of the stage
in dvc.yaml is run; options (`-S train.seed=2`) are appended to it. Launchers set the variables that
`stages.execution.torchrun.nodes` reads.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from ruamel.yaml import YAML

from gpt.core.errors import UserError
from stages import train
from stages.execution.command_line import enter


def main(words: Sequence[str]) -> int:
    """Train; returns the command's exit code."""
    return train.main(words if words and not words[0].startswith("-") else [*_command_of_stage(), *words])


def _command_of_stage() -> list[str]:
    """What the stage's wrapper runs.

    Raises:
        UserError: there is no dvc.yaml.
    """
    file = Path("dvc.yaml")
    if not file.exists():
        raise UserError(f"{file}: expected in the working directory, found nothing; run it in the project's folder")
    words = shlex.split(YAML(typ="safe", pure=True).load(file)["stages"]["train"]["cmd"])
    return words[words.index("stages.train") + 1 :]


if __name__ == "__main__":
    enter("join", main)
