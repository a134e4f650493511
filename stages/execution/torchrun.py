"""Torchrun: its options as environment variables, and the worker that failed first according to its stderr."""

import os
import re
import shlex
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.core.errors import UserError

# One thread per process: another number of threads gives other bits on the CPU.
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
LOOPBACK, CONNECT_S = "127.0.0.1", 5
JOIN_S = 600  # as long as torchrun on node 0 waits for the others
# Each of these describes a group of machines; without PET_NNODES every machine would train, and write, on its own.
RENDEZVOUS = ("PET_RDZV_ENDPOINT", "PET_MASTER_ADDR", "PET_MASTER_PORT", "PET_NODE_RANK")

# Torchrun's summary of a failure; its error file (TORCHELASTIC_ERROR_FILE) says nothing of a worker that was killed.
_WORKER = re.compile(r"\brank\s*: (\d+).*?exitcode\s*: (-?\d+) \(pid: (\d+)\)", re.DOTALL)
_ALONE = re.compile(r"Timed out after (\d+) seconds waiting for clients\. (\d+)/(\d+) clients joined")
_LOG_LINES = re.compile(r"^[A-Z]\d{4} \S+ \d+ \S*torch/distributed/elastic/.*\n", re.MULTILINE)
_SUMMARY = re.compile(r"^E\d{4} .*failed \(exitcode: ", re.MULTILINE)  # with torchrun's own traceback


@dataclass(frozen=True)
class Nodes:
    """The machines that train together, and the place of this one among them."""

    count: int = 1
    rank: int = 0  # node 0 runs rank 0, which writes the files
    endpoint: str = ""  # HOST:PORT of node 0; empty for a single machine


def nodes() -> Nodes:
    """The machines that train together, as the user or a launcher describes them.

    The variables are PET_NNODES, PET_NODE_RANK and either PET_RDZV_ENDPOINT or PET_MASTER_ADDR with PET_MASTER_PORT.
    With PET_NNODES=1 the others are ignored.

    Raises:
        UserError: a variable is missing or wrong.
    """
    given = next((name for name in RENDEZVOUS if name in os.environ), "")
    if given and "PET_NNODES" not in os.environ:
        raise UserError(f"PET_NNODES: expected beside {given}, found nothing; set it, or unset {given}")
    value, rank = os.environ.get("PET_NNODES", "1"), os.environ.get("PET_NODE_RANK", "0")
    if not value.isdecimal() or int(value) & (int(value) - 1) or value == "0":
        raise UserError(f"PET_NNODES: expected 1, 2, 4, … machines, found {value!r}")
    if value == "1":
        return Nodes()
    if not rank.isdecimal() or int(rank) >= int(value):
        raise UserError(f"PET_NODE_RANK: expected 0 to {int(value) - 1}, found {rank!r}")
    if (backend := os.environ.get("PET_RDZV_BACKEND", "static")) != "static":  # node 0 might not get rank 0
        raise UserError(f"PET_RDZV_BACKEND: expected static, found {backend!r}; unset it")
    return Nodes(int(value), int(rank), _endpoint())


def _endpoint() -> str:
    """The address of node 0; of both forms PET_RDZV_ENDPOINT takes precedence, as in torchrun."""
    pair = {name: os.environ.get(name, "") for name in ("PET_MASTER_ADDR", "PET_MASTER_PORT")}
    endpoint = os.environ.get("PET_RDZV_ENDPOINT")
    missing = [name for name, value in pair.items() if not value]
    if not endpoint and missing:
        known = "PET_NNODES" if len(missing) == 2 else next(name for name in pair if name not in missing)
        raise UserError(f"{missing[0]}: expected beside {known}, found nothing; set it, or PET_RDZV_ENDPOINT=HOST:PORT")
    name, endpoint = ("PET_RDZV_ENDPOINT", endpoint) if endpoint else ("PET_MASTER_PORT", ":".join(pair.values()))
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"{name}: expected {'HOST:PORT' if 'RDZV' in name else 'a port'}, found {os.environ[name]!r}")
    return endpoint


def training_environment(processes: int) -> dict[str, str]:
    """Torchrun's options as `PET_*` variables, and the thread counts; `PET_*` variables of the user take precedence."""
    group, given = nodes(), os.environ.get("PET_NPROC_PER_NODE", "auto")
    torchrun = {"PET_NPROC_PER_NODE": str(processes) if given == "auto" else given}
    if group.count > 1:
        torchrun |= {"PET_RDZV_BACKEND": "static", "PET_RDZV_ENDPOINT": group.endpoint}
        torchrun |= {"PET_NODE_RANK": str(group.rank), "PET_STANDALONE": "0"}
    else:
        torchrun |= {"PET_STANDALONE": "1", "PET_LOCAL_ADDR": LOOPBACK}  # the host name may not resolve
        _check_loopback()
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup, torchrun must ignore it, too
        torchrun["PET_SIGNALS_TO_HANDLE"] = os.environ.get("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    return THREADS | torchrun


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


def command_for_other_nodes(words: Sequence[str]) -> str:
    """The message with the command to run on the other machines; empty if there are none, or if a launcher runs it."""
    group = nodes()
    if group.count == 1 or "PET_NODE_RANK" in os.environ:
        return ""
    variables = f"PET_NNODES={group.count} PET_NODE_RANK=1 PET_RDZV_ENDPOINT={group.endpoint}"
    command = shlex.join(["-m", "stages.join", *([] if "DVC_STAGE" in os.environ else words)])
    intro = f"run this on the other machines, each with its own PET_NODE_RANK (1 to {group.count - 1}):"
    return f"stages.train: {intro}\n{variables} python {command}"


def wait_for_node_0(endpoint: str) -> None:
    """Wait until torchrun on node 0 accepts connections.

    Raises:
        UserError: it did not within `JOIN_S` seconds.
    """
    host, _, port = endpoint.rpartition(":")
    print(f"stages.join: waiting for node 0 at {endpoint}", flush=True)
    deadline = time.monotonic() + JOIN_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                found = f"expected node 0 at this address, found: {error}"
                raise UserError(f"{endpoint}: {found}; start it, or correct the address") from error
        time.sleep(1)


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


def missing_nodes(stderr: str) -> str:
    """The message for a node 0 that waited in vain; empty if that is not what happened."""
    found = _ALONE.search(stderr)
    remedy = "start python -m stages.join on the others"
    return f"expected {found[3]} machines within {found[1]} s, found {found[2]}; {remedy}" if found else ""


def without_summary(stderr: str) -> str:
    """What the workers themselves wrote on stderr."""
    return _LOG_LINES.sub("", _SUMMARY.split(stderr)[0])
