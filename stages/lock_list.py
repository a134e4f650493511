"""dvc's list of who uses what, `.dvc/tmp/rwlock`: read, and signed with where and since when.

dvc refuses a second command on the same files with a line for each entry of the list that stands in its way: PID and
command. A stage therefore adds an entry of its own, within what dvc has locked for it, whose "command" says the rest.
"""

import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from gpt.core.errors import UserError
from gpt.core.files import write_json

RWLOCK = Path(".dvc/tmp/rwlock")
GUARD = Path(".dvc/tmp/rwlock.lock")  # whoever changes the list holds it, for milliseconds
GUARD_S = 1
CLOCK_S = 1  # as exactly as a process' begin can be compared with a file's time


def at_work() -> list[str]:
    """One line for each living dvc that holds a lock."""
    with suppress(OSError, ValueError):
        return [line for pid in pids(json.loads(RWLOCK.read_text(encoding="utf-8"))) if (line := _of_process(pid))]
    return []


def sign(stage: str) -> None:
    """Say in the list that this process is that stage of its parent, on which host, since when.

    After a SIGKILL the entry stays, like dvc's own. Those of the dead are thrown away here: dvc does so only with what
    stands in its way, and the longer the list, the longer the moment in which a SIGKILL of dvc cuts it (`stages.mend`).
    """
    parent = os.getppid()

    def add(held: dict[str, Any]) -> None:
        since = _since(psutil.Process(parent))
        keep(held, may_hold)
        where = f"stage {stage} of PID {parent}, on {socket.gethostname()} since {since}"
        entry = {"pid": os.getpid(), "cmd": where}
        for path in [path for path, user in held["write"].items() if user["pid"] == parent]:
            held["write"][f"{path}/{stage}"] = entry  # one entry a path: a path within it is as good
        for users in held["read"].values():
            if parent in {user["pid"] for user in users}:
                users.append(entry)

    _change(add)


def withdraw() -> None:
    """Take this process's entry away."""
    own = os.getpid()
    _change(lambda held: keep(held, lambda pid: pid != own))


def pids(held: Mapping[str, Any]) -> list[int]:
    """The processes that a list names."""
    readers = (user for users in held.get("read", {}).values() for user in users)
    return sorted({int(user["pid"]) for user in (*held.get("write", {}).values(), *readers)})


def may_hold(pid: int, written: float = math.inf) -> bool:
    """Whether this process may be the one that an entry of the list means.

    dvc takes a PID for living when there is any such process: a dead one that its parent has not waited for, as in
    containers, or another one that has been given the number since, as after a restart.

    Args:
        written: when the list was written, in seconds since 1970; a process that is younger is not meant, unless it is
            a dvc or a stage: the clock may have been set.

    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.create_time() < written + CLOCK_S or (pid != os.getpid() and _is_of_dvc(process))
    except psutil.Error:
        return psutil.pid_exists(pid)


def keep(held: dict[str, Any], stays: Callable[[int], bool]) -> None:
    """Throw the entries of the other processes out of a list."""
    held["write"] = {path: user for path, user in held.get("write", {}).items() if stays(user["pid"])}
    remaining = {path: [user for user in users if stays(user["pid"])] for path, users in held.get("read", {}).items()}
    held["read"] = {path: users for path, users in remaining.items() if users}


def _change(edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the list; where that fails a person reads a line less, which must not end a stage."""
    with (
        suppress(OSError, ValueError, LookupError, TypeError, AttributeError, UserError, psutil.Error),
        GUARD.open("rb") as guard,
    ):
        _hold(guard.fileno())
        text = RWLOCK.read_text(encoding="utf-8")
        held = json.loads(text)
        edit(held)
        if held != json.loads(text):
            write_json(RWLOCK, held)


def _hold(guard: int) -> None:
    """Lock the list; not for ever, since a dvc that was stopped in that moment would stop the stage as well."""
    until = time.monotonic() + GUARD_S
    while True:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
        else:
            return


def _of_process(pid: int) -> str:
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        names = [Path(word).name for word in process.cmdline()]
        if "dvc" in names[:3]:
            who = f"{' '.join(names[names.index('dvc') :])}, PID {pid}"
            return f"at work here: {who} on {socket.gethostname()} since {_since(process)}; wait for its end"
    return ""


def _is_of_dvc(process: psutil.Process) -> bool:
    """Whether a process is a dvc (`dvc`, `python dvc`, `python -m dvc`) or a stage of ours."""
    return any(word.startswith("stages.") or Path(word).name == "dvc" for word in process.cmdline()[:3])


def _since(process: psutil.Process) -> str:
    return f"{datetime.fromtimestamp(process.create_time()):%Y-%m-%d %H:%M:%S}"
