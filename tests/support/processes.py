"""Commands of `python -m gpt` as forked processes, which start in a tenth of a second and can kill themselves.

They are forked from a process that has imported what they need; a fresh import of torch takes seconds.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
from multiprocessing.forkserver import set_forkserver_preload
from pathlib import Path

from gpt.__main__ import main
from tests.support.common import free_port

CONTEXT = multiprocessing.get_context("forkserver")
set_forkserver_preload(["gpt.commands.train", "torch._dynamo", __name__])  # the first optimizer imports _dynamo
WRITING = os.O_WRONLY | os.O_RDWR


class Running:
    """A running command; its output goes to files beside its results."""

    def __init__(self, folder: Path, arguments: list[str], variables: dict[str, str], kill_at: int | None) -> None:
        self._output, self._errors = folder / f"output{variables.get('RANK', '')}.txt", folder / "errors.txt"
        for path in (self._output, self._errors):
            path.write_text("")
        details = (folder, arguments, variables, self._output, self._errors, kill_at)
        self._process = CONTEXT.Process(target=_run, args=details)
        self._process.start()
        self.pid = self._process.pid or 0

    def poll(self) -> int | None:
        """The exit code, negative after a signal; None while it runs."""
        return self._process.exitcode

    def output(self) -> str:
        return self._output.read_text()

    def wait(self, timeout: float = 60) -> tuple[int, str]:
        """Wait for its end; returns exit code and stderr."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "it still runs"
        return self._process.exitcode, self._errors.read_text()

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def start(
    folder: Path, arguments: list[str], *, ranks: int = 1, local_ranks: int | None = None, kill_at: int | None = None
) -> list[Running]:
    """Start a command in a folder, on several ranks with the variables that torchrun would set.

    Args:
        local_ranks: how many ranks are told that they share a machine; default: all.
        kill_at: the command kills itself before this file operation, counted from 0.
    """
    variables: list[dict[str, str]] = [{}]
    if ranks > 1:
        local = local_ranks or ranks
        common = {**rendezvous(), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(local)}
        variables = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank % local)} for rank in range(ranks)]
    return [Running(folder, arguments, each, kill_at) for each in variables]


def operations(folder: Path, rank: str = "") -> list[str]:
    """The file operations of a command in a folder, in order; of a rank, if there were several."""
    return (folder / f"operations{rank}.txt").read_text().splitlines()


def rendezvous() -> dict[str, str]:
    """Variables with an address and a free port for a process group."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def _run(
    folder: Path, arguments: list[str], variables: dict[str, str], output: Path, errors: Path, kill_at: int | None
) -> None:
    os.environ.update(variables)
    os.chdir(folder)
    for path, descriptor in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.argv = ["gpt", *arguments]
    operations = os.open(f"operations{variables.get('RANK', '')}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    count = 0

    def count_writes(event: str, details: tuple[object, ...]) -> None:
        nonlocal count
        writes = event in ("os.rename", "os.remove") or (event == "open" and WRITING & int(str(details[2])))
        if writes and not str(details[0]).startswith(("/dev", "/proc")):
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            os.write(operations, f"{event} {details[0]}\n".encode())

    sys.addaudithook(count_writes)
    main()
