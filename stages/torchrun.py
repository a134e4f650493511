"""Torchrun: its options as environment variables, and what its last words say about the worker that failed first."""

import os
import re
import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.core.errors import UserError

# One thread a process: with another number of threads the CPU computes other bits.
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
# Who sets one of these has a group of several machines in mind, which is then described in full by them.
RENDEZVOUS = ("PET_RDZV_ENDPOINT", "PET_RDZV_BACKEND", "PET_MASTER_ADDR", "PET_NODE_RANK")

_WORKER = re.compile(r"\brank\s*: (\d+).*?exitcode\s*: (-?\d+) \(pid: (\d+)\)", re.DOTALL)
_NOTES = re.compile(r"^[A-Z]\d{4} \S+ \d+ \S*torch/distributed/elastic/.*\n", re.MULTILINE)
_END = re.compile(r"^E\d{4} .*failed \(exitcode: ", re.MULTILINE)  # then come torchrun's own traceback and its box


def nodes() -> int:
    """How many machines train together: what the person said with PET_NNODES.

    Raises:
        UserError: it is no power of two.
    """
    said = os.environ.get("PET_NNODES", "1")
    if not said.isdecimal() or int(said) & (int(said) - 1) or said == "0":
        raise UserError(f"PET_NNODES: expected 1, 2, 4, … machines, found {said!r}")
    return int(said)


def training_environment(processes: int) -> dict[str, str]:
    """Torchrun's options as its `PET_*` variables, and the thread counts; what the person set of `PET_*` stands.

    On several machines this one is node 0, so that rank 0, which writes the files, is here.
    """
    torchrun = {"PET_NPROC_PER_NODE": str(processes)}
    if nodes() > 1:
        torchrun |= {"PET_RDZV_BACKEND": "static", "PET_NODE_RANK": "0"}
    elif not any(name in os.environ for name in RENDEZVOUS):
        torchrun |= {"PET_STANDALONE": "1"}
    return THREADS | {name: os.environ.get(name, value) for name, value in torchrun.items()}


def lines_for_other_nodes(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """What to type on the other machines, which have the project and the tokens, if there are any; they write nothing.

    Raises:
        UserError: the address at which they meet is missing.
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
    words = [command[0], *(f"{name}={value}" for name, value in options.items()), *command[1:]]
    intro = f"type this on the other machines, each with its own --node-rank (1 to {nodes() - 1}):"
    return f"stages.train: {intro}\nOMP_NUM_THREADS=1 {shlex.join(words)}"


def is_torchrun(command: Sequence[str]) -> bool:
    """Whether a command starts through torchrun."""
    return Path(command[0]).name == "torchrun"


@dataclass(frozen=True)
class Worker:
    """The worker that failed first, as torchrun's box names it; a code below zero is the signal that killed it."""

    rank: int
    pid: int
    code: int

    def __str__(self) -> str:
        """Who it is and what became of it."""
        known = {each.value: each.name for each in signal.Signals}
        end = f"ended with exit code {self.code}"
        if self.code < 0:
            end = f"was killed by {known.get(-self.code, f'signal {-self.code}')}"
        return f"rank {self.rank} (PID {self.pid}) {end}"


def failed_first(words: str) -> Worker | None:
    """The worker that torchrun's box of text names as the root cause."""
    found = _WORKER.search(words.rpartition("Root Cause")[2])
    return Worker(rank=int(found[1]), code=int(found[2]), pid=int(found[3])) if found else None


def without_box(words: str) -> str:
    """What the workers themselves wrote on stderr."""
    return _NOTES.sub("", _END.split(words)[0])


def exit_code(code: int, words: str, received: Sequence[int]) -> int:
    """The code to end with. Torchrun ends with 1 whatever happened; the worker's own code stands in its box of text."""
    if worker := failed_first(words):
        code = worker.code
    elif words and received:  # asked to stop, torchrun shows no box
        code = -received[-1]
    return code if code >= 0 else 128 - code
