"""The run folder: the lock, the live history and the last two resume states of one training run."""

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt.core.errors import UserError
from gpt.core.files import read_json, write_json
from gpt.model.checkpoint import read_tensors, write_tensors
from gpt.training.history import History

KEPT_STATES = 2
LOCK_POLL_S = 0.5


class RunFolder:
    """Only the rank that holds the lock may write here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.history = History(path / "history.jsonl")

    @contextmanager
    def locked(self, say: Callable[[str], None]) -> Iterator[None]:
        """Hold the folder for the whole block; wait, and say for whom, while another run of the same key holds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / "lock")
        holder = self.path / "lock.json"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting: this very run is already under way, {_describe(holder)}")
            lock.acquire(poll_interval=LOCK_POLL_S)
        try:
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def save(self, step: int, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """Write the resume state of a step; of the older ones only the newest stays, in case this one gets damaged."""
        self.history.flush()
        write_tensors(self.path / f"resume-{step:09d}.pt", metadata, tensors)
        for old in self._states()[:-KEPT_STATES]:
            old.unlink()

    def newest(
        self, digests: Mapping[str, object], say: Callable[[str], None]
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The newest sound resume state of a run with these digests, if there is one."""
        for path in reversed(self._states()):
            try:
                metadata, tensors = read_tensors(path)
            except UserError as error:
                say(f"passing over a damaged resume state: {error}")
                continue
            if metadata.get("digests") == digests:
                return metadata, tensors
            say(f"passing over {path}: it belongs to other params, tokens or code")
        return None

    def _states(self) -> list[Path]:
        return sorted(path for path in self.path.glob("resume-*.pt") if re.fullmatch(r"resume-\d{9}\.pt", path.name))


def _describe(holder: Path) -> str:
    try:
        found = read_json(holder)
        return f"PID {found['pid']} on {found['host']} since {found['since']}"
    except (UserError, KeyError, json.JSONDecodeError):
        return "by a process that just started"
