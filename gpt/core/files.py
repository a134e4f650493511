"""Files: atomic writing, hashing, JSON."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gpt.core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS)
DECIMALS = 4  # of a metric: another seed changes the third one of a loss


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: object) -> str:
    """Return a value as JSON with sorted keys and without spaces; equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as file:
        file.write(f"{text}\n".encode())


def write_metrics(path: Path, metrics: Mapping[str, float]) -> None:
    """Write metrics as JSON, rounded to `DECIMALS` decimals."""
    write_json(path, {name: round(value, DECIMALS) for name, value in metrics.items()})


def write_csv(path: Path, table: "pd.DataFrame") -> None:
    """Write a table without its index, the same bytes on every system."""
    with atomic_write(path) as file:
        file.write(table.to_csv(index=False, lineterminator="\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or invalid file is a UserError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: expected a JSON file, found no file; run the stage that writes it") from None
    except ValueError as error:
        raise UserError(f"{path}: expected valid JSON, found {error}; run the stage that writes it again") from None


def prepare_output(path: Path) -> None:
    """Create the folder of an output; a folder that cannot be written is a UserError, before long work starts."""
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = _temporary_name(path)
        probe.touch()
        probe.unlink()


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that gets its final name only when the block ends without an error.

    The bytes go to a temporary file in the same folder, which is flushed to disk and renamed. Then the folder is
    flushed, so that the rename survives a power failure. If the folder cannot be written or the disk is full, a
    UserError is raised and the old file is unchanged.
    """
    temporary = _temporary_name(path)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Flush the directory entries of a folder to disk, where the system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError about writing `path` into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            remedy = f"free some space ({shutil.disk_usage(path.parent).free:,} bytes are free) and run again"
        elif error.errno in NO_ACCESS:
            remedy = "correct the permissions or choose another path"
        else:
            raise
        raise UserError(f"{path}: expected a writable path, found: {error.strerror}; {remedy}") from error


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
