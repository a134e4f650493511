"""Torchrun: its options as environment variables, and what its last words say about the worker that failed first."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt.errors import UserError

# One thread a process: with another number of threads the CPU computes other bits.
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")
# Who sets one of these has a group of several machines in mind, which is then described in full by them.
RENDEZVOUS = ("PET_RDZV_ENDPOINT", "PET_RDZV_BACKEND", "PET_MASTER_ADDR", "PET_NODE_RANK")


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


def exit_code(code: int, box: str, received: Sequence[int]) -> int:
    """The code to end with. Torchrun ends with 1 whatever happened; the worker's own code stands in its box of text."""
    worker = re.search(r"exitcode\s*:\s*(-?\d+)", box.rpartition("Root Cause")[2])
    if worker:
        code = int(worker[1])
    elif box and received:  # asked to stop, torchrun shows no box
        code = -received[-1]
    return code if code >= 0 else 128 - code
