"""`python -m stages.mend`: take away dvc's list of who uses what, where a killed dvc has left it cut short.

dvc writes `.dvc/tmp/rwlock` in place. A SIGKILL in that moment leaves half a file, and every dvc after it refuses to
work. The list holds nothing but the locks of running commands, so that without it nothing is lost.
"""

import fcntl
import json
from contextlib import suppress
from pathlib import Path

RWLOCK = Path(".dvc/tmp/rwlock")
GUARD = Path(".dvc/tmp/rwlock.lock")  # dvc holds it while it writes the list


def mend() -> bool:
    """Delete the list if it cannot be read and nobody is writing it; returns whether it was deleted."""
    with suppress(OSError), GUARD.open("rb") as guard:  # no dvc has been here, or one is writing now
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            json.loads(RWLOCK.read_text(encoding="utf-8"))
        except ValueError:
            RWLOCK.unlink()
            return True
    return False


if __name__ == "__main__" and mend():
    print(f"{RWLOCK}: a killed dvc left it cut short; deleted")
