"""`python -m stages.mend`: mend what a killed dvc left half done and no dvc can read, and say who is at work.

dvc writes three of its notes in place: who uses what at the moment (`.dvc/tmp/rwlock`), which results it has seen
before (`.dvc/cache/runs`), and `dvc.lock`. A SIGKILL after it has made room and before it has written, and every dvc
after it refuses to work. Nothing is lost by mending: what is taken away, dvc finds out again without running a stage.

`python -m stages.mend install`: from then on every dvc of this environment mends first, also one typed by hand.
"""

import fcntl
import json
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from gpt.files import atomic_write, write_json
from stages.lock_list import GUARD, RWLOCK, at_work, keep, pids

PROJECT = Path(__file__).parents[1]
REPOSITORY_LOCK = Path(".dvc/tmp/lock")  # dvc holds it except while a stage's command runs
RUN_CACHE = Path(".dvc/cache/runs")
LOCK_FILE = Path("dvc.lock")
LAST_WHOLE = Path(".dvc/tmp/dvc.lock")  # ours: dvc.lock as it was when a dvc started
OPEN_LINES = 3  # that stand without their values at the end of a cut dvc.lock, such as `stages:` and a stage's name
CLOCK_S = 1  # as exactly as a process' begin can be compared with a file's time
SETTLE_S = 0.5  # a living dvc fills a new folder within milliseconds
# Python runs the lines of such files when it starts, whatever it is started for, in a virtual environment twice (its
# manual: module `site`).
HOOK = """\
import sys; 'dvc' in [w.rpartition('/')[2] for w in sys.orig_argv[1:3]] and 'stages.mend' not in sys.modules and \
(sys.path.append({project!r}), __import__('stages.mend', fromlist=['mend']).before_dvc())
"""


def mend(root: Path) -> list[str]:
    """Mend the notes of the project in this folder; returns a line for each that needed it."""
    return [
        *_while_nobody_holds(root / GUARD, lambda: _mend_lock_list(root / RWLOCK)),
        *_while_nobody_holds(root / REPOSITORY_LOCK, lambda: _mend_lock_file(root / LOCK_FILE, root / LAST_WHOLE)),
        *_mend_run_cache(root / RUN_CACHE),
    ]


def install() -> Path:
    """Let every dvc of this environment mend before it reads anything; returns the file that sees to it."""
    hook = Path(sysconfig.get_path("purelib")) / "chargpt-mend.pth"
    with atomic_write(hook) as file:
        file.write(HOOK.format(project=str(PROJECT)).encode())
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
    """Act under one of dvc's locks; where somebody holds it, or no dvc has been, nothing is to be mended."""
    with suppress(BlockingIOError, FileNotFoundError), lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return action()
    return []


def _mend_lock_list(path: Path) -> list[str]:
    """Delete the list if it was cut; take out the dead whose PID belongs to a younger process, as after a restart."""
    try:
        written, held = path.stat().st_mtime, json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError:
        path.unlink()
        return [f"{path}: a killed dvc left it half written; deleted"]
    recycled = [pid for pid in pids(held) if _is_younger(pid, written)]
    if recycled:
        keep(held, lambda pid: pid not in recycled)
        write_json(path, held)
    return [f"{path}: PID {pid} is no longer the dvc that was killed; taken out" for pid in recycled]


def _is_younger(pid: int, moment: float) -> bool:
    """Whether a process began after a moment; what is gone, dvc itself knows to be dead."""
    try:
        return psutil.Process(pid).create_time() > moment + CLOCK_S
    except psutil.Error:
        return False


def _mend_lock_file(path: Path, last_whole: Path) -> list[str]:
    """Bring back the last dvc.lock that was whole; what has been added since, dvc takes from its run cache."""
    if not path.exists():
        last_whole.unlink(missing_ok=True)
        return []
    text, before = path.read_bytes(), last_whole.read_bytes() if last_whole.exists() else None
    if text == before:
        return []
    if not _is_cut(text):
        _write(last_whole, text)
        return []
    if before is None:
        path.unlink()
        return [f"{path}: a killed dvc left it half written; deleted"]
    _write(path, before)
    return [f"{path}: a killed dvc left it half written; as it was before again"]


def _is_cut(text: bytes) -> bool:
    """Whether a lock file is sound but for its end; one with the conflicts of a merge, or of a newer dvc, is not."""
    if text.endswith(b"\n") and _can_be_read(text):
        return False
    lines = text.splitlines(keepends=True)
    beginnings = [lines[:-dropped] for dropped in range(1, OPEN_LINES + 1)]
    return any(not beginning or _can_be_read(b"".join(beginning)) for beginning in beginnings)


def _can_be_read(text: bytes) -> bool:
    """Whether dvc takes this for a lock file."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA  # noqa: PLC0415 (a quarter of a second, needed seldom)
    from dvc.utils.serialize import ParseError, parse_yaml  # noqa: PLC0415
    from voluptuous import Invalid  # noqa: PLC0415

    try:
        COMPILED_LOCKFILE_SCHEMA(parse_yaml(text, str(LOCK_FILE)))
    except (ParseError, Invalid):
        return False
    return True


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
