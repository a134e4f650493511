"""Torchrun: its options as environment variables, and the worker that failed first according to its stderr."""

import os
import re
import shlex
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.core.errors import UserError

# One thread per process: another number of threads gives other bits on the CPU.
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
LOOPBACK, CONNECT_S = "127.0.0.1", 5
# A user who sets one of these describes a group of several machines, and then has to describe it in full.
RENDEZVOUS = ("PET_RDZV_ENDPOINT", "PET_RDZV_BACKEND", "PET_MASTER_ADDR", "PET_NODE_RANK")

# Torchrun's summary of a failure; its error file (TORCHELASTIC_ERROR_FILE) says nothing of a worker that was killed.
_WORKER = re.compile(r"\brank\s*: (\d+).*?exitcode\s*: (-?\d+) \(pid: (\d+)\)", re.DOTALL)
_LOG_LINES = re.compile(r"^[A-Z]\d{4} \S+ \d+ \S*torch/distributed/elastic/.*\n", re.MULTILINE)
_SUMMARY = re.compile(r"^E\d{4} .*failed \(exitcode: ", re.MULTILINE)  # with torchrun's own traceback


def nodes() -> int:
    """The number of machines that train together, from PET_NNODES.

    Raises:
        UserError: it is no power of two.
    """
    value = os.environ.get("PET_NNODES", "1")
    if not value.isdecimal() or int(value) & (int(value) - 1) or value == "0":
        raise UserError(f"PET_NNODES: expected 1, 2, 4, … machines, found {value!r}")
    return int(value)


def training_environment(processes: int) -> dict[str, str]:
    """Torchrun's options as `PET_*` variables, and the thread counts; `PET_*` variables of the user take precedence.

    On several machines this one is node 0, so that rank 0, which writes the files, runs here.
    """
    torchrun = {"PET_NPROC_PER_NODE": str(processes)}
    if nodes() > 1:
        torchrun |= {"PET_RDZV_BACKEND": "static", "PET_NODE_RANK": "0"}
    elif not any(name in os.environ for name in RENDEZVOUS):
        torchrun |= {"PET_STANDALONE": "1", "PET_LOCAL_ADDR": LOOPBACK}  # the host name may not resolve
        _check_loopback()
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup, torchrun must ignore it, too
        torchrun |= {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGQUIT"}
    return THREADS | {name: os.environ.get(name, value) for name, value in torchrun.items()}


def _check_loopback() -> None:
    """Refuse to train without a loopback interface, on which torchrun would wait for its own answer.

    Raises:
        UserError: a connection on this machine failed.
    """
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=CONNECT_S).close()
    except OSError as error:
        raise UserError(f"{LOOPBACK}: expected a loopback interface, found: {error}; ip link set lo up") from error


def command_for_other_nodes(words: Sequence[str], environment: Mapping[str, str]) -> str:
    """The message with the command to run on the other machines; empty for a single machine.

    Raises:
        UserError: the rendezvous address is missing.
    """
    if nodes() == 1:
        return ""
    endpoint = os.environ.get("PET_RDZV_ENDPOINT")
    if not endpoint:
        raise UserError(
            "PET_RDZV_ENDPOINT: expected HOST:PORT of this machine beside PET_NNODES, found nothing; set it"
        )
    options = {
        "--nnodes": str(nodes()),
        "--node-rank": "1",
        "--nproc-per-node": environment["PET_NPROC_PER_NODE"],
        "--rdzv-backend": "static",
        "--rdzv-endpoint": endpoint,
    }
    command = [words[0], *(f"{name}={value}" for name, value in options.items()), *words[1:]]
    intro = f"run this on the other machines, each with its own --node-rank (1 to {nodes() - 1}):"
    return f"stages.train: {intro}\nOMP_NUM_THREADS=1 {shlex.join(command)}"


def is_torchrun(words: Sequence[str]) -> bool:
    """Whether a command starts through torchrun."""
    return Path(words[0]).name == "torchrun"


@dataclass(frozen=True)
class Worker:
    """A worker process; a code below zero is the number of the signal that killed it."""

    rank: int
    pid: int
    code: int

    def __str__(self) -> str:
        """Rank, PID and how the process ended."""
        known = {each.value: each.name for each in signal.Signals}
        end = f"ended with exit code {self.code}"
        if self.code < 0:
            end = f"was killed by {known.get(-self.code, f'signal {-self.code}')}"
        return f"rank {self.rank} (PID {self.pid}) {end}"


def first_failure(stderr: str) -> Worker | None:
    """The worker that torchrun's summary names as the root cause."""
    found = _WORKER.search(stderr.rpartition("Root Cause")[2])
    return Worker(rank=int(found[1]), code=int(found[2]), pid=int(found[3])) if found else None


def without_summary(stderr: str) -> str:
    """What the workers themselves wrote on stderr."""
    return _LOG_LINES.sub("", _SUMMARY.split(stderr)[0])
