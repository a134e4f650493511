"""The run folder of a model that was not trained in this workspace, built from `dvc.lock`.

Such a model comes from DVC's run cache, `dvc pull`, `dvc exp apply` or `dvc checkout`. If it is trained here later,
that training replaces what is written here, since both have the same run key.
"""

import csv
import json
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from gpt.core.errors import UserError
from gpt.core.files import atomic_write, read_json, sha256_file
from gpt.core.params import read_params
from gpt.training.fingerprint import run_key
from stages.execution.command_line import CommandLine
from stages.runs import run_record
from stages.runs.provenance import SECTIONS, logged_params, provenance
from stages.runs.run_record import Record


def restore_run(root: Path) -> None:
    """Create the run folder of the model that the `dvc.lock` of the current folder names.

    Nothing happens if there is one already, if `dvc status` finds a change of the training, or if another dvc runs.
    """
    lock: dict[str, Any] = {}
    unchanged: list[str] = []
    with suppress(subprocess.CalledProcessError, UserError, OSError, KeyError, TypeError):  # there is no such pipeline
        lock = YAML(typ="safe", pure=True).load(Path("dvc.lock"))["stages"]
        unchanged = [] if _is_known(root, lock) else _unchanged_stages()
    if "train" not in unchanged:
        return
    command = _command(lock, "train")
    run = root / ".runs" / run_key(read_params(command.path("--params")), command.path("--tokens"))
    with run_record.lock(run, wait=False) as locked:
        if locked:
            sha256 = sha256_file(command.path("--checkpoint"))
            _save_train(run, lock, sha256)
            for stage in unchanged:
                if stage != "train":
                    _save(run, lock, stage, {"tags": {"checkpoint.sha256": sha256}})


def _is_known(root: Path, lock: dict[str, Any]) -> bool:
    """Whether a run folder has the training of the checkpoint in `dvc.lock`, or the workspace lacks the file."""
    records = [run_record.read(run, "train") for run in run_record.runs(root)]
    md5 = _checkpoint_md5(lock)
    return any(record and record.checkpoint_md5 == md5 for record in records) or not (
        _command(lock, "train").path("--checkpoint").is_file()
    )


def _checkpoint_md5(lock: dict[str, Any]) -> str:
    checkpoint = _command(lock, "train").path("--checkpoint")
    return str({Path(out["path"]): out["md5"] for out in lock["train"]["outs"]}[checkpoint])


def _unchanged_stages() -> list[str]:
    """The stages whose inputs and outputs are those in `dvc.lock`."""
    command = [sys.executable, "-m", "dvc", "status", "--json", *SECTIONS]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    changed = json.loads(found.stdout)
    return [stage for stage in SECTIONS if stage not in changed]


def _save_train(run: Path, lock: dict[str, Any], sha256: str) -> None:
    """Write the record of the training, and its history from the tables without times."""
    command, now = _command(lock, "train"), time.time()
    points = [
        {"time": now, **{name: float(value) for name, value in row.items()}}
        for option in ("--history", "--validation")
        for row in csv.DictReader(command.path(option).read_text(encoding="utf-8").splitlines())
    ]
    with atomic_write(run / "history.jsonl") as file:
        file.write("".join(f"{json.dumps(point)}\n" for point in points).encode())
    tags = provenance()[1] | {"run.key": run.name, "checkpoint.sha256": sha256}
    checkpoint = {"checkpoint": sha256, "checkpoint_md5": _checkpoint_md5(lock)}
    checkpoint["checkpoint_file"] = str(command.path("--checkpoint"))
    dataset = read_json(command.path("--tokens") / "meta.json")
    params = logged_params(command, "train")
    _save(run, lock, "train", {"tags": tags, "params": params, "dataset": dataset, **checkpoint})


def _save(run: Path, lock: dict[str, Any], stage: str, results: dict[str, Any]) -> None:
    """Write the record of a stage, with the metrics and the small artifacts among its outputs."""
    command, now = _command(lock, stage), time.time()
    outputs = {Path(out["path"]) for out in lock[stage]["outs"]} - {command.optional_path("--checkpoint")}
    metrics = {
        name: float(value) for path in outputs if path.suffix == ".json" for name, value in read_json(path).items()
    }
    params: dict[str, Path | str] = (
        {"params.yaml": command.path("--params")}
        if stage == "train"
        else {f"params/{stage}.json": json.dumps(logged_params(command, stage), indent=2)}
    )
    about: dict[str, Any] = {"stage": stage, "name": provenance()[0], "restored": True, "metrics": metrics}
    record = Record(**about, experiment=run_record.experiment_name(), began=now, ended=now, **results)
    run_record.save(run, record, {**params, **{path.name: path for path in outputs}})


def _command(lock: dict[str, Any], stage: str) -> CommandLine:
    return CommandLine(shlex.split(lock[stage]["cmd"]))
