"""What every stage does with the store: reach it while the child runs, survive without it, make rows equal to files."""

import gc
import getpass
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.core.files import sha256_file
from gpt.core.params import read_params
from gpt.download.sources import without_credentials
from stages import launch, log, record
from stages.history import Follower
from stages.page import page
from stages.record import Record

if TYPE_CHECKING:
    from stages.tracking import Row, Store

Draw = Callable[[], Iterable[tuple[str, bytes]]]  # makes pictures: names and PNGs

PAUSE_S = 30  # between two attempts to reach a store that failed
# MLflow's own settings let a silent server block for four minutes.
CLIENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def address(root: Path) -> str:
    """The address of the tracking store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"


def connect(root: Path) -> "Store":
    """Import MLflow, which takes more than a second, and open the store."""
    for name, value in CLIENT.items():
        os.environ.setdefault(name, value)
    gc.disable()  # a fifth of the time of importing
    try:
        from stages.tracking import Store  # noqa: PLC0415 (the child has been started by now)

        return Store.open(address(root), root)
    finally:
        gc.enable()


class Publisher:
    """Does things to the store, or, after one warning, does without: tracking never costs a training."""

    def __init__(self, stage: str, root: Path) -> None:
        self._stage, self._root = stage, root
        self._store: Store | None = None
        self._warned = False
        self._not_before = 0.0

    def attempt(self, action: Callable[["Store"], object] = lambda _store: None, *, last: bool = False) -> None:
        """Do something to the store, reaching it first; whatever fails in it becomes the one warning.

        Args:
            last: there will be no other attempt, so make this one however short ago the one before failed.

        """
        if time.monotonic() < self._not_before and not last:
            return
        with self.surviving(without_password(address(self._root))):
            self._not_before = time.monotonic() + PAUSE_S
            if not self._store:
                self._store = connect(self._root)
                for run in record.unpublished(self._root):
                    settle(self._store, run)
            action(self._store)
            self._not_before = 0.0

    @contextmanager
    def surviving(self, what: object) -> Iterator[None]:
        """Turn whatever fails in the block into the one warning, which names what failed."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:  # MLflow's, requests', the disk's …
            if not self._warned:
                self._warned = True
                text = f"not tracked for now, {what}: {brief(error)}; `python -m stages.sync` publishes later"
                print(f"stages.{self._stage}: {text}", file=sys.stderr, flush=True)


def brief(error: BaseException) -> str:
    """An error of somebody else's on one short line."""
    return without_password(f"{type(error).__name__} {error}".replace("\n", " "))[:200].strip()


def without_password(text: str) -> str:
    """A text that can be shown, if an address in it holds a user's name and password."""
    return re.sub(r"//[^/\s@]+@", "//", text)


def settle(store: "Store", run: Path) -> bool:
    """Publish a run, as killed if its wrapper died, and say whether that was needed; leave it to a living wrapper."""
    changed = False
    if owned := record.claim(run):
        with owned:
            record.settle(run)
            changed = publish_run(store, run)
            record.confirm_publication(run)
    return changed


def publish_run(store: "Store", run: Path) -> bool:
    """Make the row of a run folder equal to the folder; returns whether it was not."""
    train = record.read(run, "train")
    if not train:
        return False
    row = store.row("run.key", run.name, train)
    for history in record.HISTORIES:
        row.replay(Follower(run / history).news())
    for stage in record.STAGES:
        if part := record.read(run, stage):
            row.publish(run, part)
    _describe(store, row, run)
    row.finish(train)
    return row.changed


def _describe(store: "Store", row: "Row", run: Path) -> None:
    """Bring the page up to date; one at a time, so that a command which has read less never has the last word."""
    with store.locked():
        row.describe(page(run, row.id))


@cache  # a person may commit something else while a training goes on
def provenance() -> tuple[str, dict[str, str]]:
    """A row's name, the DVC experiment's or the short commit, and the tags that say where it comes from."""
    experiment, commit = os.environ.get("DVC_EXP_NAME", ""), _git("rev-parse", "HEAD")
    changed = ", ".join(_git("diff", "--name-only", "HEAD", "--", "*.py", "dvc.yaml").splitlines())
    tags = {"git.commit": commit, "mlflow.source.git.commit": commit, "git.changed": changed}
    tags["dvc.exp_name"] = experiment
    with suppress(OSError, KeyError):  # a user without a name
        tags["mlflow.user"] = getpass.getuser()
    return experiment or commit[:7], {name: value for name, value in tags.items() if value}


def _git(*words: str) -> str:
    """What git answers; nothing where there is no git or no repository."""
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def prepare_drawing() -> None:
    """Import matplotlib, which takes half a second; to be called while a command runs."""
    with suppress(Exception):  # `drawn` will say so
        import_module("stages.pictures")


def drawn(stage: str, pictures: Draw) -> dict[str, bytes]:
    """Pictures by their names in MLflow; one that cannot be drawn costs a line, and those after it."""
    found: dict[str, bytes] = {}
    try:
        for name, content in pictures():
            found[f"pictures/{name}"] = content
    except Exception as error:  # matplotlib's, a table's …
        print(f"stages.{stage}: not all pictures are drawn: {brief(error)}", file=sys.stderr)
    return found


def follow_up(
    stage: str,
    command: list[str],
    *,
    files: Mapping[str, Path],
    metrics: Callable[[], Mapping[str, float]] = dict,
    pictures: Draw | None = None,
) -> int:
    """Run a command that looks at a checkpoint, then publish what it wrote on the row of that checkpoint.

    Args:
        files: the artifacts that the command writes, by their names in MLflow.
        metrics: reads the figures that it wrote.
        pictures: draws what it wrote, by the pictures' names.

    Returns:
        The command's exit code.

    """
    root, began = record.main_workspace(), time.time()
    record.drop_states(root)
    checkpoint = launch.option(command, "--checkpoint")
    sha256 = sha256_file(checkpoint) if checkpoint.is_file() else ""
    command = launch.with_option(command, "--log-file", root / "gpt_nano.log")
    log_file = launch.option(command, "--log-file")
    publisher = Publisher(stage, root)
    read = settings(command, stage)  # now: somebody may edit the file while it runs

    def meanwhile() -> None:
        publisher.attempt()
        if pictures:
            prepare_drawing()

    code = launch.run(command, stage=stage, about=sha256, log_file=log_file, meanwhile=meanwhile)
    if code:
        return code
    with publisher.surviving("its results"), tempfile.TemporaryDirectory() as nowhere:
        found = _record(stage, read, began, sha256, metrics())
        run = record.run_of_checkpoint(root, sha256)
        part = {f"logs/{stage}.log": log.part_of_log(log_file, log.frame(stage, sha256))}
        shown_too = drawn(stage, pictures) if pictures else {}
        record.save(run or Path(nowhere), found, {**files, **part, **shown_too})
        publisher.attempt(lambda store: _publish_follow_up(store, run, Path(nowhere), found), last=True)
    return code


def settings(command: list[str], *sections: str) -> dict[str, str]:
    """Sections of the params file that a command was given, its `--set` applied, flat and as text."""
    files = launch.options(command, "--params")
    if not files:
        return {}
    params = read_params(Path(files[-1]), launch.options(command, "--set", "-S"))
    if isinstance(params.get("download"), dict) and isinstance(sources := params["download"].get("sources"), list):
        params["download"]["sources"] = [without_credentials(str(source)) for source in sources]  # without passwords
    return record.flatten(params, sections)


def _record(stage: str, read: Mapping[str, str], began: float, sha256: str, metrics: Mapping[str, float]) -> Record:
    name, _ = provenance()
    return Record(
        stage=stage,
        name=name or sha256[:7],
        began=began,
        ended=time.time(),
        tags={**read, "checkpoint.sha256": sha256},
        metrics=dict(metrics),
    )


def _publish_follow_up(store: "Store", run: Path | None, nowhere: Path, found: Record) -> None:
    """Publish on the row of the checkpoint's run, opened where it is missing, or on one of the checkpoint alone."""
    sha256 = found.tags["checkpoint.sha256"]
    if run and (row := store.find("run.key", run.name)):
        row.publish(run, found)
        _describe(store, row, run)
    elif run:
        publish_run(store, run)
    elif row := store.find("checkpoint.sha256", sha256):  # of a run whose folder is gone, or of none
        row.publish(nowhere, found)
    else:
        row = store.row("checkpoint.sha256", sha256, found)
        row.finish(found)
        row.publish(nowhere, found)
