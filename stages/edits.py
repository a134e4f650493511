"""What a person edits while a stage runs: dvc reads params and code again at the end and would file the result there.

Filed so, a model of 300 steps is called one of 50, in `dvc.lock` and in the run cache, for good.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gpt.core.files import sha256_file
from gpt.core.params import read_params
from gpt.training.fingerprint import imported_files, name_of
from stages.launch import options
from stages.record import flatten

Main = Callable[[list[str]], int]
SECTIONS = {"train": ("model", "train"), "evaluate": ("evaluate",), "generate": ("generate",)}  # as in dvc.yaml


def refusing(stage: str, main: Main) -> Main:
    """A stage's `main` that, under dvc, fails when what dvc files its result under is no longer what it read."""
    if "DVC_STAGE" not in os.environ:
        return main
    code_files = imported_files(f"gpt.commands.{stage}")

    def watched(command: list[str]) -> int:
        before = _inputs(stage, command, code_files)
        code = main(command)
        after = _inputs(stage, command, code_files) if not code else before
        edited = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
        if not edited:
            return code
        print(
            f"stages.{stage}: {', '.join(edited)}: edited while this ran; dvc would file the result under what stands "
            "there now, so it is refused: run dvc repro again. To work on while something runs: dvc exp run --temp",
            file=sys.stderr,
        )
        return 2

    return watched


def _inputs(stage: str, command: Sequence[str], code_files: Sequence[Path]) -> dict[str, str]:
    """Params by `section.key` and code files by `gpt/name`: what a stage reads and a person may edit."""
    files = options(command, "--params")
    params = flatten(read_params(Path(files[-1])), SECTIONS[stage]) if files else {}
    return params | {name_of(path): sha256_file(path) if path.exists() else "" for path in code_files}
