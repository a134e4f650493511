"""The files of a run folder that belong to the wrappers, from which the run in MLflow can be rebuilt at any time.

.runs/<key>/history.jsonl      of the training command: metrics by step
.runs/<key>/resume-*.pt        of the training command: states to resume from, until DVC has recorded the result
.runs/<key>/logs/<stage>.log   of the commands: the log of this run
.runs/<key>/row/train.json     a Record; also evaluate.json, generate.json and lock.json (of `stages.sync`)
.runs/<key>/row/train/…        the small artifacts of that stage, under their MLflow names
.runs/<key>/row.lock           see `lock`; row.owner names the process that holds it
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from gpt.core.errors import UserError
from gpt.core.files import canonical_json, read_json, sha256_file, write_json

RUNS_KEPT = 20
EXPERIMENT = "chargpt"
COMMIT, DIRTY = "mlflow.source.git.commit", "git.changed"  # tags: of the code, and its files with uncommitted changes
STATES = "resume-*.pt"
STAGES = ("train", "evaluate", "generate", "lock")  # the last is no stage of DVC: `stages.sync` adds dvc.lock

Point = dict[str, float]  # "step", "time" (seconds since 1970) and the metrics of that step


class Record(BaseModel):
    """All that one stage contributes to its MLflow run, except for the history and the artifacts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    began: float  # seconds since 1970, as `ended`
    ended: float
    status: str = "FINISHED"
    name: str = ""  # of the MLflow run, if this stage creates it
    experiment: str = EXPERIMENT  # of MLflow
    parent: str = ""  # the name of the MLflow run that groups this one with others
    checkpoint: str = ""  # SHA-256
    checkpoint_file: str = ""  # its path in the workspace; the file is too large to be copied
    checkpoint_md5: str = ""  # its hash in dvc.lock and in DVC's cache
    changes: list[str] = []  # overrides of the params file, as `section.key=value`
    tags: dict[str, str] = {}
    params: dict[str, str] = {}
    metrics: dict[str, float] = {}
    dataset: dict[str, Any] = {}  # meta.json of the stage tokenize
    restored: bool = False  # built from dvc.lock, see stages/runs/restored.py


class HistoryReader:
    """Reads `history.jsonl` while the training appends to it; a partial last line is read when it is complete."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def new_points(self) -> list[Point]:
        """The points of the lines completed since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [point for line in complete.splitlines() if (point := _parse(line))]


def _parse(line: bytes) -> Point | None:
    try:
        return {name: float(value) for name, value in json.loads(line).items() if value is not None}
    except (ValueError, TypeError, AttributeError):
        return None  # cut by a power failure; the training removes such a line when it resumes


def main_workspace() -> Path:
    """The folder of store, log and run folders: DVC's main workspace, also for experiments in temporary copies."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).absolute()


def experiment_name() -> str:
    """The MLflow experiment of new runs."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def md5_file(path: Path) -> str:
    """MD5 of a file, the hash that DVC uses."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def dvc_cache(root: Path) -> Path | None:
    """DVC's cache folder, from `dvc cache dir`; None outside a DVC repository."""
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return None if found.returncode else Path(found.stdout.strip())


def runs(root: Path) -> list[Path]:
    """All run folders, the last modified first."""
    folders = [path for path in (root / ".runs").glob("*") if len(path.name) == 64 and path.is_dir()]
    return sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)


def run_of_checkpoint(root: Path, sha256: str) -> Path | None:
    """The newest run folder whose training produced the checkpoint with this SHA-256."""
    return next((run for run in runs(root) if (train := read(run, "train")) and train.checkpoint == sha256), None)


def is_named(train: Record, lock: str) -> bool:
    """Whether the text of a dvc.lock names the checkpoint of a training."""
    return bool(train.checkpoint_md5) and train.checkpoint_md5 in lock


def drop_states(root: Path) -> None:
    """Delete the resume states of trainings whose result is recorded in the dvc.lock of this folder.

    Earlier would be wrong: if dvc is killed before it writes dvc.lock, the stage runs again and must not train again.
    Later too: after that, `dvc repro -f` is meant to train again. Equal bytes have equal hashes, so the dvc.lock of a
    fresh clone names the checkpoint before anything has run: dvc.lock must be newer than the training.
    """
    file = Path("dvc.lock")
    text, written = (file.read_text(encoding="utf-8"), file.stat().st_mtime) if file.exists() else ("", 0)
    for run in runs(root):
        states, train = list(run.glob(STATES)), read(run, "train")
        if states and train and train.ended < written and is_named(train, text):
            with lock(run, wait=False) as locked:
                for state in states if locked else ():
                    state.unlink()


def prune(root: Path, *, current: Path, keep: int = RUNS_KEPT) -> None:
    """Delete the oldest run folders, except the current one and those in use."""
    for run in runs(root)[keep:]:
        if run != current:
            with lock(run, wait=False) as locked:
                if locked:
                    shutil.rmtree(run, ignore_errors=True)


def save(run: Path, record: Record, artifacts: Mapping[str, Path | str]) -> None:
    """Write a stage's record, and its artifacts, each copied from a file or given as text."""
    folder = run / "row" / record.stage
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in artifacts.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            target.write_text(content, encoding="utf-8")
        elif content.is_file():
            shutil.copyfile(content, target)
    write_json(run / "row" / f"{record.stage}.json", record.model_dump())


def read(run: Path, stage: str) -> Record | None:
    """A stage's record; None if it is missing or invalid."""
    try:
        return Record.model_validate(read_json(run / "row" / f"{stage}.json"))
    except (UserError, ValidationError):
        return None


@contextmanager
def lock(run: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock for writing train.json and publishing it; yields whether it is held, with `wait` always True.

    A training's wrapper holds it until MLflow has all of the training. So for another holder, a record that says
    RUNNING is that of a killed wrapper. The lock of the training command cannot serve for this: it is free while the
    wrapper publishes, and testing it could delay a training.
    """
    run.mkdir(parents=True, exist_ok=True)
    file, owner = FileLock(run / "row.lock"), run / "row.owner"
    try:
        file.acquire(timeout=0)
    except Timeout:
        if not wait:
            yield False
            return
        holder = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        print(f"waiting for the run {run.name[:8]}, which is trained or published by {holder}", flush=True)
        file.acquire()
    try:
        owner.write_text(f"PID {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield True
    finally:
        file.release()


def mark_killed(run: Path) -> None:
    """Set the status KILLED if the record says RUNNING, since its wrapper was killed; requires the lock."""
    train = read(run, "train")
    if train and train.status == "RUNNING":
        history = run / "history.jsonl"
        ended = history.stat().st_mtime if history.exists() else train.ended
        killed = train.model_copy(update={"status": "KILLED", "ended": ended})
        write_json(run / "row" / "train.json", killed.model_dump())


def artifacts(run: Path, stage: str) -> Iterator[tuple[str, Path]]:
    """The small artifacts that a stage saved: MLflow names and files."""
    folder = run / "row" / stage
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def checksums(run: Path, stage: str) -> list[tuple[str, Path]]:
    """A line of `sha256sum` and the file, of each artifact that a stage saved."""
    return [(f"{sha256_file(path)}  {name}", path) for name, path in artifacts(run, stage)]


def flatten(params: Mapping[str, Any], sections: Sequence[str]) -> dict[str, str]:
    """`section.key` and the value as text, for some sections of the params file."""
    return {
        f"{section}.{key}": value if isinstance(value, str) else canonical_json(value)
        for section in sections
        for key, value in (params.get(section) or {}).items()
    }
