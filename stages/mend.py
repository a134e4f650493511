"""`python -m stages.mend`: look at dvc's list of who uses what, before dvc does, and say who is at work.

dvc writes `.dvc/tmp/rwlock` in place. A SIGKILL in that moment leaves half a file, and every dvc after it refuses to
work. The list holds nothing but the locks of running commands, so that without it nothing is lost: it is taken away.
"""

import fcntl
import json
import socket
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import psutil

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


def at_work() -> list[str]:
    """One line for each living dvc that holds a lock: dvc's own refusal names nothing but its PID."""
    with suppress(OSError, ValueError):
        held = json.loads(RWLOCK.read_text(encoding="utf-8"))
        users = [*held.get("write", {}).values(), *(user for users in held.get("read", {}).values() for user in users)]
        return [line for pid in sorted({int(user["pid"]) for user in users}) if (line := _of_process(pid))]
    return []


def _of_process(pid: int) -> str:
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        command = process.cmdline()
        if any("dvc" in word for word in command):
            since = f"{datetime.fromtimestamp(process.create_time()):%Y-%m-%d %H:%M:%S}"
            name = f"dvc {' '.join(command[2:])}"
            return f"at work here: {name}, PID {pid} on {socket.gethostname()} since {since}; wait for it to end"
    return ""


if __name__ == "__main__":
    if mend():
        print(f"{RWLOCK}: a killed dvc left it cut short; deleted")
    for each in at_work():
        print(each)
