"""`python -m stages.mend`: mend what a killed dvc left half done and no dvc can read, and say who is at work.

dvc writes three of its notes in place: who uses what at the moment (`.dvc/tmp/rwlock`), which results it has seen
before (`.dvc/cache/runs`), and `dvc.lock`. A SIGKILL after it has made room and before it has written, and every dvc
after it refuses to work. Nothing is lost by mending: what is taken away, dvc finds out again from its run cache.

`python -m stages.mend install`: from then on every dvc of this environment mends first, also one typed by hand.
"""

import fcntl
import json
import os
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt.core.files import atomic_write, write_json
from stages.lock_list import GUARD, RWLOCK, at_work, keep, may_hold, pids

PROJECT = Path(__file__).parents[1]
REPOSITORY_LOCK = Path(".dvc/tmp/lock")  # dvc holds it except while a stage's command runs
RUN_CACHE = Path(".dvc/cache/runs")
LOCK_FILE = Path("dvc.lock")
LAST_WHOLE = Path(".dvc/tmp/dvc.lock")  # ours: dvc.lock as it was when a dvc started
SET_ASIDE = Path(".dvc/tmp/dvc.lock.cut")  # ours: in case it was a person's work after all
OPEN_LINES = 4  # that at the end of a cut dvc.lock lack what belongs to them, such as `stages:` and a stage's name
SETTLE_S = 0.5  # a living dvc fills a new folder within milliseconds
# An older commit, checked out later, may have nothing to import.
MEND_FIRST = """\
sys.path.append({project!r})
try:
    from stages.mend import before_dvc
except ImportError:
    pass
else:
    before_dvc()
"""
FOR_DVC = "'dvc' in [word.rpartition('/')[2] for word in sys.orig_argv[1:3]] and 'stages.mend' not in sys.modules"


def mend(root: Path) -> list[str]:
    """Mend the notes of the project in this folder; returns a line for each that needed it."""
    return [
        *_mend_run_cache(root / RUN_CACHE),
        *_while_nobody_holds(root / GUARD, lambda: _mend_lock_list(root / RWLOCK)),
        *_while_nobody_holds(root / REPOSITORY_LOCK, lambda: _mend_lock_file(root)),
    ]


def install() -> Path:
    """Let every dvc of this environment mend before it reads anything; returns the file that sees to it.

    Python runs the lines of such a file when it starts, whatever it is started for, in a virtual environment twice
    (its manual: module `site`).
    """
    hook = Path(sysconfig.get_path("purelib")) / "chargpt-mend.pth"
    mend_first = MEND_FIRST.format(project=str(PROJECT))
    _write(hook, f"import sys; {FOR_DVC} and exec({mend_first!r})\n".encode())
    return hook


def before_dvc() -> None:
    """Mend the project that a dvc is about to work in; whatever fails here must not keep dvc from its work."""
    try:
        here = Path.cwd()
        root = next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), None)
        _report(mend(root) if root else [])
    except Exception as error:  # there is no end to what a start-up file may run into
        _report([f"dvc's notes were not looked at: {error}"])


def _while_nobody_holds(lock: Path, action: Callable[[], list[str]]) -> list[str]:
    """Act under one of dvc's locks, which dvc, too, makes where it is missing; nothing where somebody holds it."""
    with suppress(BlockingIOError, FileNotFoundError, PermissionError):  # held, no dvc project, not ours
        lock.parent.mkdir(exist_ok=True)
        with lock.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 1:  # with dvc's `hardlink_lock`, whoever holds it makes a second
                return action()
    return []


def _mend_lock_list(path: Path) -> list[str]:
    """Delete the list if it was cut; take out the dead for whom dvc waits."""
    try:
        written, held = path.stat().st_mtime, json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError:
        path.unlink()
        return [f"{path}: a killed dvc left it half written; deleted"]
    dead = [pid for pid in pids(held) if not may_hold(pid, written)]
    if dead:
        keep(held, lambda pid: pid not in dead)
        write_json(path, held)
    return [f"{path}: PID {pid} was killed; taken out" for pid in dead]


def _mend_lock_file(root: Path) -> list[str]:
    """Bring back the last dvc.lock that was whole; what has been added since, dvc takes from its run cache."""
    path, last_whole = root / LOCK_FILE, root / LAST_WHOLE
    if not path.exists():
        last_whole.unlink(missing_ok=True)
        return []
    text, before = path.read_bytes(), last_whole.read_bytes() if last_whole.exists() else None
    if text == before:
        return []
    if not _is_cut(text):
        _write(last_whole, text)
    elif before is not None or not _read(text):
        _write(root / SET_ASIDE, text)
        _write(path, before) if before is not None else path.unlink()
        now = "deleted" if before is None else "as it was before again"
        return [f"{path}: a killed dvc left it half written; {now} (what it was: {SET_ASIDE})"]
    return []


def _is_cut(text: bytes) -> bool:
    """Whether a lock file is sound but for its end; one with the conflicts of a merge, or of a newer dvc, is not."""
    if _is_whole(text):
        return False
    lines = text.splitlines(keepends=True)
    beginnings = [lines[:-dropped] for dropped in range(1, OPEN_LINES + 1)]
    return any(not beginning or _is_whole(b"".join(beginning)) for beginning in beginnings)


def _is_whole(text: bytes) -> bool:
    """Whether dvc can read a lock file, and its last line ends, and what it says of a file is complete."""
    if not (text.endswith(b"\n") and (found := _read(text))):
        return False
    stages = found.get("stages", {}).values()
    hashed = [file for stage in stages for file in (*stage.get("deps", []), *stage.get("outs", [])) if "md5" in file]
    return all("size" in file and ("nfiles" in file or not file["md5"].endswith(".dir")) for file in hashed)


def _read(text: bytes) -> dict[str, Any] | None:
    """What dvc reads in a lock file, or nothing where it cannot."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA  # noqa: PLC0415 (a quarter of a second, needed seldom)
    from dvc.utils.serialize import ParseError, parse_yaml  # noqa: PLC0415
    from voluptuous import Invalid  # noqa: PLC0415

    try:
        found: dict[str, Any] = COMPILED_LOCKFILE_SCHEMA(parse_yaml(text, str(LOCK_FILE)))
    except (ParseError, Invalid):
        return None
    return found


def _mend_run_cache(folder: Path) -> list[str]:
    """Delete the folders of results that hold none and stay so: dvc makes such a folder, then writes into it."""
    empty = _empty_folders(folder)
    if empty:
        time.sleep(SETTLE_S)
    mended = []
    for path in set(empty).intersection(_empty_folders(folder)):
        with suppress(OSError):  # no longer empty
            path.rmdir()
            mended.append(f"{path}: a killed dvc left it empty; deleted")
    return mended


def _empty_folders(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*/*") if path.is_dir() and not any(path.iterdir())]


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def _report(lines: list[str]) -> None:
    for line in lines:
        print(f"stages.mend: {line}", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:] == ["install"]:
        print(f"every dvc of this environment mends first: {install()}")
    else:
        _report(mend(Path.cwd()))
        for line in at_work():
            print(line)
