"""The run folder: the lock, the live history and the last two resume states of one training run."""

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt.core.cli import report
from gpt.core.errors import UserError
from gpt.core.files import read_json, write_json
from gpt.model.checkpoint import read_tensors, write_tensors
from gpt.training.history import History

KEPT_STATES = 2  # the older one is used if the newest is damaged
LOCK_POLL_S = 0.5


class RunFolder:
    """The files of one run; only the process that holds the lock may write them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.history = History(path / "history.jsonl")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock for the block; report which process holds it if that means waiting."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / "lock")
        owner = self.path / "lock.json"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(f"waiting for the run lock: the same run is active, {_describe(owner)}")
            lock.acquire(poll_interval=LOCK_POLL_S)
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            write_json(owner, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def save(self, step: int, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """Write the resume state of a step and delete outdated ones."""
        self.history.flush()
        write_tensors(self.path / f"resume-{step:09d}.pt", metadata, tensors)
        for outdated in self._states()[:-KEPT_STATES]:
            outdated.unlink()

    def newest(self, digests: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return the newest valid resume state with these digests, if there is one; report those that are skipped."""
        for path in reversed(self._states()):
            try:
                metadata, tensors = read_tensors(path)
            except UserError as error:
                report(f"skipping a damaged resume state: {error}")
                continue
            if metadata.get("digests") == digests:
                return metadata, tensors
            report(f"skipping {path}: it belongs to other params, tokens or code")
        return None

    def _states(self) -> list[Path]:
        return sorted(self.path.glob(f"resume-{'[0-9]' * 9}.pt"))


def _describe(owner: Path) -> str:
    try:
        process = read_json(owner)
        return f"PID {process['pid']} on {process['host']} since {process['since']}"
    except (UserError, KeyError):
        return "in a process that just started"
