"""`python -m stages.mend`: take away what a killed dvc left half done and no dvc can read, and say who is at work.

Both are dvc's own notes, of which nothing is lost: who uses what at the moment, and which results it has seen before.
"""

import fcntl
import json
from contextlib import suppress
from pathlib import Path

from stages.lock_list import GUARD, RWLOCK, at_work

RUN_CACHE = Path(".dvc/cache/runs")


def mend_lock_list() -> list[Path]:
    """Delete the list of locks if it cannot be read and nobody is writing it; returns what was deleted.

    dvc writes it in place. A SIGKILL in that moment leaves half a file, and every dvc after it refuses to work.
    """
    with suppress(OSError), GUARD.open("rb") as guard:  # no dvc has been here, or one is writing now
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            json.loads(RWLOCK.read_text(encoding="utf-8"))
        except ValueError:
            RWLOCK.unlink()
            return [RWLOCK]
    return []


def mend_run_cache() -> list[Path]:
    """Delete the folders of results that have none; returns what was deleted.

    dvc makes such a folder, then writes into it. A SIGKILL between the two leaves it empty, and every dvc after it that
    would run this stage ends with "join() argument must be str". Nobody may be at work.
    """
    empty = [folder for folder in RUN_CACHE.glob("*/*") if folder.is_dir() and not any(folder.iterdir())]
    for folder in empty:
        folder.rmdir()
    return empty


if __name__ == "__main__":
    mended = mend_lock_list()
    busy = at_work()
    if not busy:
        mended += mend_run_cache()
    for path in mended:
        print(f"{path}: a killed dvc left it half done; deleted")
    for line in busy:
        print(line)
