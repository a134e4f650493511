"""`python -m stages.sync`: publish all run folders to the tracking store; run twice, it changes and prints nothing.

Of each run: metrics by step, params, tags, artifacts, description, status. A checkpoint is uploaded if its output path
or DVC's cache still has that content. `dvc.lock` becomes an artifact of the run whose checkpoint it names.
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from stages.execution.command_line import enter
from stages.runs import run_record
from stages.runs.publish import DeletedRunError, brief, connect, publish_run, tracking_uri, without_credentials
from stages.runs.restored import restore_run
from stages.runs.run_record import Record

if TYPE_CHECKING:
    from stages.tracking.store import Store


def main(_arguments: Sequence[str]) -> int:
    """Publish every run folder; returns 1 if the store failed."""
    root = run_record.main_workspace()
    address = without_credentials(tracking_uri(root))
    try:
        restore_run(root)
        runs = [run for run in reversed(run_record.runs(root)) if run_record.read(run, "train")]
        save_lock_file(root / "dvc.lock", runs)
        connect_once = cache(partial(connect, root))
        changed = sum(publish_if_unlocked(connect_once, run) for run in runs)
    except Exception as error:  # of MLflow, requests, SQLAlchemy, the disk …
        print(f"stages.sync: {address}: {brief(error)}; run this again later", file=sys.stderr)
        return 1
    if changed:
        print(f"stages.sync: published {changed} of {len(runs)} run(s) to {address}")
    return 0


def publish_if_unlocked(connect: Callable[[str], "Store"], run: Path) -> bool:
    """Publish a run, as killed if its wrapper died, unless a live wrapper does; returns whether MLflow changed.

    A run that a user deleted in MLflow stays deleted. This is reported once, and the run folder keeps that.
    """
    with run_record.lock(run, wait=False) as locked:
        if not locked:
            return False
        run_record.mark_killed(run)
        train, reported = run_record.read(run, "train"), run / "row" / "deleted"
        assert train
        try:
            changed = publish_run(connect(train.experiment), run)
            reported.unlink(missing_ok=True)
        except DeletedRunError as error:
            if not reported.exists():
                print(f"stages.sync: {error}")
            reported.touch()
            changed = False
        return changed


def save_lock_file(lock: Path, runs: list[Path]) -> None:
    """Save dvc.lock in the folder of the newest run whose checkpoint it names."""
    text = lock.read_text(encoding="utf-8") if lock.exists() else ""
    for run in reversed(runs):
        train = run_record.read(run, "train")
        if train and run_record.is_named(train, text):
            saved = dict(run_record.artifacts(run, "lock")).get(lock.name)
            if not saved or saved.read_text(encoding="utf-8") != text:
                now = time.time()
                run_record.save(run, Record(stage="lock", began=now, ended=now), {lock.name: text})
            return


if __name__ == "__main__":
    enter("sync", main)
