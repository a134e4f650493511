"""Commands of `python -m gpt` as processes that start in a tenth of a second, and that can kill themselves on cue.

They are forked from a process that has imported what they need; importing torch anew takes seconds.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
from multiprocessing.forkserver import set_forkserver_preload
from pathlib import Path

from gpt.__main__ import main

CONTEXT = multiprocessing.get_context("forkserver")
set_forkserver_preload(
    ["gpt.commands.train", "torch._dynamo", "tests.support.processes"]
)  # _dynamo comes with the first optimizer
WRITING = os.O_WRONLY | os.O_RDWR


class Running:
    """A command under way; what it says goes to files beside its outputs."""

    def __init__(self, folder: Path, arguments: list[str], variables: dict[str, str], killed_at: int | None) -> None:
        self._said, self._errors = folder / f"said{variables.get('RANK', '')}.txt", folder / "errors.txt"
        for path in (self._said, self._errors):
            path.write_text("")
        self._process = CONTEXT.Process(
            target=_become, args=(folder, arguments, variables, self._said, self._errors, killed_at)
        )
        self._process.start()
        self.pid = self._process.pid or 0

    def poll(self) -> int | None:
        """The exit code, negative after a signal; nothing while it runs."""
        return self._process.exitcode

    def said(self) -> str:
        """What it has written on stdout so far."""
        return self._said.read_text()

    def end(self, timeout: float = 60) -> tuple[int, str]:
        """Wait for its end; returns exit code and stderr."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "it still runs"
        return self._process.exitcode, self._errors.read_text()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def start(
    folder: Path, arguments: list[str], *, ranks: int = 1, ranks_here: int | None = None, killed_at: int | None = None
) -> list[Running]:
    """Start a command in a folder, as several ranks if asked for, each told of the others as torchrun does it.

    Args:
        ranks_here: so many of them are told that they share a machine, the others that they share another.
        killed_at: it kills itself right before this file operation (the first is 0).

    """
    groups: list[dict[str, str]] = [{}]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        here = ranks_here or ranks
        everyone = meeting | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(here)}
        groups = [everyone | {"RANK": str(rank), "LOCAL_RANK": str(rank % here)} for rank in range(ranks)]
    return [Running(folder, arguments, variables, killed_at) for variables in groups]


def _become(
    folder: Path, arguments: list[str], variables: dict[str, str], said: Path, errors: Path, killed_at: int | None
) -> None:
    os.environ.update(variables)
    os.chdir(folder)
    for path, descriptor in ((said, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.argv = ["gpt", *arguments]
    operations = os.open("operations.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    seen = 0

    def count(event: str, details: tuple[object, ...]) -> None:
        nonlocal seen
        writes = event in ("os.rename", "os.remove") or (event == "open" and WRITING & int(str(details[2])))
        if writes and not str(details[0]).startswith(("/dev", "/proc")):
            if seen == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
            os.write(operations, f"{event} {details[0]}\n".encode())

    sys.addaudithook(count)
    main()
