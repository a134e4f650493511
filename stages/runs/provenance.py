"""The origin of a run: name, code version, user, and params."""

import getpass
import os
import subprocess
from contextlib import suppress
from functools import cache

from gpt.core.errors import without_secrets
from gpt.core.params import read_params
from stages.execution.command_line import CommandLine
from stages.runs import run_record

PARENT_VARIABLE = "CHARGPT_PARENT_RUN"  # an environment variable: the name of an MLflow run that groups new runs
# The sections of the params file that are published by stage: those that determine its result.
SECTIONS = {
    "train": ("download", "tokenize", "model", "train"),
    "evaluate": ("evaluate",),
    "generate": ("generate",),
}


@cache  # at the start of the stage: the user may commit while it runs
def provenance() -> tuple[str, dict[str, str]]:
    """The name of a new run (the DVC experiment or the short commit), and tags of its origin."""
    experiment, commit = os.environ.get("DVC_EXP_NAME", ""), _git("rev-parse", "HEAD")
    changed = ", ".join(_git("diff", "--name-only", "HEAD", "--", "*.py", "dvc.yaml").splitlines())
    tags = {run_record.COMMIT: commit, run_record.DIRTY: changed, "dvc.exp_name": experiment}
    tags |= {"mlflow.source.name": "dvc.yaml:train", "mlflow.source.type": "LOCAL"}
    with suppress(OSError, KeyError):  # the user has no name
        tags["mlflow.user"] = getpass.getuser()
    name = os.environ.get("MLFLOW_RUN_NAME") or experiment or commit[:7]
    return name, {tag: value for tag, value in tags.items() if value}


def _git(*arguments: str) -> str:
    """The output of git; empty without git or a repository."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def logged_params(command: CommandLine, stage: str) -> dict[str, str]:
    """The published params of a command with its overrides, flat and as text, without passwords and queries."""
    file = command.optional_path("--params")
    if not file:
        return {}
    params = read_params(file, command.changes)
    if isinstance(params.get("download"), dict) and isinstance(sources := params["download"].get("sources"), list):
        params["download"]["sources"] = [without_secrets(str(source)) for source in sources]
    return run_record.flatten(params, SECTIONS[stage])
