"""What a stage leaves in the run folder for MLflow, so that its row can be rebuilt from files at any time.

.runs/<key>/history.jsonl      the child's
.runs/<key>/resume-*.pt        the child's: what it continues from, until dvc has filed its result
.runs/<key>/system.jsonl       the wrapper's: what the machine was doing
.runs/<key>/row/train.json     a Record; also evaluate.json, generate.json and lock.json (of `stages.sync`)
.runs/<key>/row/train/…        the small artifacts of that stage, under the names they have in MLflow
.runs/<key>/row/unpublished    there from the row's opening until MLflow has all of the training
.runs/<key>/row.lock           held by the wrapper that writes train.json, in that same time: see `claim`
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from gpt.core.errors import UserError
from gpt.core.files import canonical_json, read_json, sha256_file, write_json

RUNS_KEPT = 20
HISTORIES = ("history.jsonl", "system.jsonl")  # figures by step
STATES = "resume-*.pt"
STAGES = ("train", "evaluate", "generate", "lock")  # the last is not DVC's: what `stages.sync` adds


class Record(BaseModel):
    """All that one stage contributes to its row, beside the history and the files in its folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    began: float  # seconds since 1970, as `ended`
    ended: float
    status: str = "FINISHED"
    name: str = ""  # the row's; of the stage that opens it
    checkpoint: str = ""  # SHA-256
    checkpoint_file: str = ""  # where it lay, seen from the workspace; too large to be kept a second time
    checkpoint_md5: str = ""  # DVC's name for that content, in its cache and in dvc.lock
    changes: list[str] = []  # what the command was given beside the params file, as `section.key=value`
    tags: dict[str, str] = {}
    params: dict[str, str] = {}
    metrics: dict[str, float] = {}
    dataset: dict[str, Any] = {}  # what tokenize's meta.json says


def main_workspace() -> Path:
    """Where the store, the log and the run folders lie: DVC's main workspace, also seen from temporary copies of it."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).absolute()


def runs(root: Path) -> list[Path]:
    """All run folders, the one that changed last first."""
    folders = [path for path in (root / ".runs").glob("*") if len(path.name) == 64 and path.is_dir()]
    return sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)


def run_of_checkpoint(root: Path, sha256: str) -> Path | None:
    """The newest run folder whose training ended in the checkpoint with this SHA-256."""
    return next((run for run in runs(root) if (train := read(run, "train")) and train.checkpoint == sha256), None)


def is_named(train: Record, lock: str) -> bool:
    """Whether the text of a dvc.lock names the checkpoint that a training ended in."""
    return bool(train.checkpoint_md5) and train.checkpoint_md5 in lock


def drop_states(root: Path) -> None:
    """Delete the resume states of the trainings whose result dvc has filed in the dvc.lock of this folder.

    Not sooner: when dvc is killed before that, it runs the stage again, which shall not train again. Not later either:
    from then on, running it again by `dvc repro -f` is meant. Equal bytes have equal names: a fresh clone's dvc.lock
    names the checkpoint before anything has run, so it must have been written since.
    """
    lock = Path("dvc.lock")
    text, written = (lock.read_text(encoding="utf-8"), lock.stat().st_mtime) if lock.exists() else ("", 0)
    for run in runs(root):
        states, train = list(run.glob(STATES)), read(run, "train")
        if states and train and train.ended < written and is_named(train, text) and not is_held(run):
            for state in states:
                state.unlink(missing_ok=True)


def prune(root: Path, *, current: Path, keep: int = RUNS_KEPT) -> None:
    """Delete the oldest run folders; never this one, never one that a running command holds."""
    for run in runs(root)[keep:]:
        if run != current and not is_held(run) and (owned := claim(run)):
            with owned:
                shutil.rmtree(run, ignore_errors=True)


def is_held(run: Path) -> bool:
    """Whether some process is training in this run folder now."""
    try:
        with FileLock(run / "lock").acquire(timeout=0):
            return False
    except Timeout:
        return True


def save(run: Path, record: Record, artifacts: Mapping[str, Path | str | bytes]) -> None:
    """Write a stage's record, and its artifacts, each copied from a file or given as it is."""
    folder = run / "row" / record.stage
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in artifacts.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str | bytes):
            target.write_bytes(content.encode() if isinstance(content, str) else content)
        elif content.is_file():
            shutil.copyfile(content, target)
    write_json(run / "row" / f"{record.stage}.json", record.model_dump())


def read(run: Path, stage: str) -> Record | None:
    """A stage's record, or nothing where there is none that can be read."""
    try:
        return Record.model_validate(read_json(run / "row" / f"{stage}.json"))
    except (UserError, ValidationError):
        return None


def claim(run: Path, *, wait_s: float = 0) -> AbstractContextManager[object] | None:
    """The right to write train.json and to publish it, or nothing while another process has it.

    A wrapper takes it before its record says RUNNING and keeps it until MLflow has the last word of the training, so
    that whoever gets it knows: the wrapper behind a record that says RUNNING is dead. The lock of the training itself
    tells less, for it is free when the wrapper still publishes, and looking at it could make a training wait.
    """
    try:
        return FileLock(run / "row.lock").acquire(timeout=wait_s)
    except Timeout:
        return None


def expect_publication(run: Path) -> None:
    """Note that the row of this run is about to be behind the run; needs the claim."""
    (run / "row").mkdir(parents=True, exist_ok=True)
    _note(run).touch()


def confirm_publication(run: Path) -> None:
    """Note that MLflow has all of this run; needs the claim."""
    _note(run).unlink(missing_ok=True)


def unpublished(root: Path) -> list[Path]:
    """The run folders whose training is under way, or was left by its wrapper before MLflow had all of it."""
    return [run for run in runs(root) if _note(run).exists()]


def settle(run: Path) -> None:
    """Correct the record of a training whose wrapper was killed: it still says running. Needs the claim."""
    train = read(run, "train")
    if train and train.status == "RUNNING":
        history = run / "history.jsonl"
        ended = history.stat().st_mtime if history.exists() else train.ended
        killed = train.model_copy(update={"status": "KILLED", "ended": ended})
        write_json(run / "row" / "train.json", killed.model_dump())


def _note(run: Path) -> Path:
    return run / "row" / "unpublished"


def artifacts(run: Path, stage: str) -> Iterator[tuple[str, Path]]:
    """The small artifacts that a stage saved: their names in MLflow and the files."""
    folder = run / "row" / stage
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def digest(run: Path, stage: str) -> str:
    """SHA-256 of all artifacts that a stage saved, with their names."""
    content = {name: sha256_file(path) for name, path in artifacts(run, stage)}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def places_of_checkpoint(record: Record) -> list[Path]:
    """The files that may still hold a training's checkpoint: the one it wrote, and DVC's copy in its cache."""
    md5 = record.checkpoint_md5
    cached = main_workspace() / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
    return [path for path in (Path(record.checkpoint_file), cached) if path.is_file()]


def flatten(params: Mapping[str, Any], sections: Sequence[str]) -> dict[str, str]:
    """`section.key` and the value as text, for some sections of the params file."""
    return {
        f"{section}.{key}": value if isinstance(value, str) else canonical_json(value)
        for section in sections
        for key, value in (params.get(section) or {}).items()
    }
