"""`python -m stages.sync`: bring the kept run folders to the tracking store; run twice, it changes and says nothing.

Of each run: figures by step, params, tags, artifacts, description, status. A checkpoint is uploaded where a file with
that content still lies: where it was written, or in DVC's cache. `dvc.lock` goes to the run whose checkpoint it names.
"""

import sys
import time
from pathlib import Path

from stages import launch, record
from stages.publish import address, brief, connect, settle, without_password
from stages.record import Record


def main(_arguments: list[str]) -> int:
    """Publish every run folder; returns 1 when the store failed."""
    root = record.main_workspace()
    record.drop_states(root)
    runs = [run for run in reversed(record.runs(root)) if record.read(run, "train")]
    if not runs:
        return 0
    where = without_password(address(root))
    try:
        keep_lock(root / "dvc.lock", runs)
        store = connect(root)
        changed = sum(settle(store, run) for run in runs)
    except Exception as error:  # MLflow raises of its own, requests', SQLAlchemy's, alembic's …
        print(f"stages.sync: {where}: {brief(error)}; run this again later", file=sys.stderr)
        return 1
    if changed:
        print(f"stages.sync: brought {changed} of {len(runs)} run(s) up to date in {where}")
    return 0


def keep_lock(lock: Path, runs: list[Path]) -> None:
    """Keep dvc.lock with the run that made the checkpoint which it names, the newest of several."""
    text = lock.read_text(encoding="utf-8") if lock.exists() else ""
    for run in reversed(runs):
        train = record.read(run, "train")
        if train and record.is_named(train, text):
            kept = run / "row" / "lock" / lock.name
            if not kept.exists() or kept.read_text(encoding="utf-8") != text:
                now = time.time()
                record.save(run, Record(stage="lock", began=now, ended=now), {lock.name: text})
            return


if __name__ == "__main__":
    launch.enter("sync", main)
