"""Detection of edits to a stage's params and code while it runs.

DVC hashes params and code again when the stage has ended, and records those hashes with the result in dvc.lock and in
its run cache. After an edit the result would be recorded under inputs that did not produce it.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from gpt.core.files import sha256_file
from gpt.core.params import read_params
from stages.command_line import CommandLine
from stages.run_record import flatten

Main = Callable[[Sequence[str]], int]


def refuse_edited_inputs(stage: str, main: Main) -> Main:
    """Wrap a stage's `main`: under DVC it fails with exit code 2 if the stage's params or code changed while it ran."""
    name = os.environ.get("DVC_STAGE")
    if not name:
        return main

    def checked(command: Sequence[str]) -> int:
        before = _inputs(name, command)
        if code := main(command):
            return code
        after = _inputs(name, command)
        changed = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
        if changed:
            text = (
                f"{', '.join(changed)} changed while the stage ran, so DVC would record the result under wrong inputs"
            )
            advice = "run dvc repro again; to edit while a stage runs, use dvc exp run --temp"
            print(f"stages.{stage}: {text}; {advice}", file=sys.stderr)
        return 2 if changed else 0

    return checked


def _inputs(stage: str, command: Sequence[str]) -> dict[str, str]:
    """Params by `section.key`, and SHA-256 of code by path, as far as `dvc.yaml` declares them for the stage."""
    stages: dict[str, Any] = YAML(typ="safe", pure=True).load(Path("dvc.yaml"))["stages"]
    outputs = {out for entry in stages.values() for out in entry.get("outs", [])}
    params_file = CommandLine(command).optional_path("--params")
    sections = [section for section in stages[stage].get("params", []) if isinstance(section, str)]
    params = flatten(read_params(params_file), sections) if params_file else {}
    code = [path for dep in stages[stage].get("deps", []) if dep not in outputs for path in _files(Path(dep))]
    return params | {path.as_posix(): sha256_file(path) for path in code}


def _files(dep: Path) -> list[Path]:
    """The file itself, or all files of a folder without compiled ones."""
    found = sorted(dep.rglob("*")) if dep.is_dir() else [dep]
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]
