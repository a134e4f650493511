"""`python -m stages.repair`: repair the files that dvc can no longer read after it was killed while it wrote them.

DVC writes `.dvc/tmp/rwlock`, `dvc.lock` and its run cache in place. After a kill at that moment every `dvc repro`
fails. No result is lost: DVC finds it in its run cache. While a dvc is active, nothing is changed.
"""

import fcntl
import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from gpt.core.files import atomic_write
from stages.runs.run_record import dvc_cache

REPOSITORY_LOCK, RWLOCK_GUARD = Path(".dvc/tmp/lock"), Path(".dvc/tmp/rwlock.lock")  # dvc locks them by flock
RWLOCK = Path(".dvc/tmp/rwlock")
LOCK_FILE = Path("dvc.lock")
BROKEN = Path(".dvc/tmp/dvc.lock.broken")  # the previous content, for the user
CONFLICT_MARKERS = (b"<<<<<<<", b">>>>>>>")


def repair(root: Path) -> Iterator[str]:
    """Repair the DVC repository in this folder; yields a line for each repair."""
    if not (root / ".dvc").is_dir():
        return
    (root / RWLOCK.parent).mkdir(exist_ok=True)
    with ExitStack() as stack:
        for path in (REPOSITORY_LOCK, RWLOCK_GUARD):
            file = stack.enter_context((root / path).open("ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield f"a dvc is active (it holds {path}); nothing was checked, run this again when it has ended"
                return
        yield from _repair_rwlock(root / RWLOCK)
        yield from _repair_lock_file(root)
        yield from _repair_run_cache(root)


def _repair_rwlock(path: Path) -> Iterator[str]:
    """Delete the lock list if it is no JSON; entries of dead processes are ignored by dvc itself."""
    try:
        json.loads(path.read_text(encoding="utf-8") if path.exists() else "{}")
    except ValueError:
        path.unlink()
        yield f"deleted {RWLOCK}: it was no valid JSON"


def _repair_lock_file(root: Path) -> Iterator[str]:
    """Restore dvc.lock from git, or delete it if git has none; merge conflicts are left to the user."""
    path = root / LOCK_FILE
    content = path.read_bytes() if path.exists() else None
    if content is None or _is_readable(content):
        return
    if any(line.startswith(CONFLICT_MARKERS) for line in content.splitlines()):
        return
    _write(root / BROKEN, content)
    committed = subprocess.run(["git", "show", f"HEAD:./{LOCK_FILE}"], cwd=root, capture_output=True, check=False)
    if committed.returncode == 0 and _is_readable(committed.stdout):
        _write(path, committed.stdout)
        action = "restored dvc.lock from git HEAD"
    else:
        path.unlink()
        action = "deleted dvc.lock (git has none)"
    yield f"{action}: dvc could not read it; the previous content is in {BROKEN}"


def _is_readable(content: bytes) -> bool:
    """Whether dvc can read the content of a dvc.lock."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA  # noqa: PLC0415 (slow import)
    from dvc.utils.serialize import ParseError, parse_yaml  # noqa: PLC0415
    from voluptuous import Invalid  # noqa: PLC0415

    try:
        COMPILED_LOCKFILE_SCHEMA(parse_yaml(content, str(LOCK_FILE)))
    except (ParseError, Invalid):
        return False
    return True


def _repair_run_cache(root: Path) -> Iterator[str]:
    """Delete empty entries of the run cache."""
    cache = dvc_cache(root)
    for entry in sorted((cache / "runs").glob("*/*")) if cache else []:
        if entry.is_dir() and not any(entry.iterdir()):
            entry.rmdir()
            yield f"deleted {entry}: an empty entry of the run cache"


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


if __name__ == "__main__":
    for line in repair(Path.cwd()):
        print(f"stages.repair: {line}")
