"""Sums over all ranks, made of sums between two: first the neighbour, then the neighbouring pair, and so on.

That is recursive doubling (Thakur, Rabenseifner, Gropp 2005, "Optimization of Collective Communication Operations in
MPICH", section 4.5): log2(ranks) exchanges, and a sum in one fixed binary tree, where a + b has the bits of b + a.

Two ranks on one machine write into memory that both see. Gloo would send the gradients through the machine's own
network, which costs a sixth of a small step.
"""

import mmap
import os
import secrets
import select
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]  # public, but not in its __all__

CHUNK_BYTES = 1 << 22  # exchanged at once: more than a small model's gradients, less than a processor's cache
SPIN_S = 0.005  # of looking for the partner's word without sleeping: to be woken up takes longer than most waits


class LostPartnerError(RuntimeError):
    """The other rank of a pair died or does not answer."""


class Pair(Protocol):
    """This rank and one other."""

    def add(self, tensor: Tensor) -> None:
        """Add the other's tensor to this one, in place; the other calls this too, with a tensor of the same size.

        Raises:
            RuntimeError: the other died or does not answer in time.
        """

    def close(self) -> None:
        """Part from the other, who hears of it when it adds again."""


class NetworkPair:
    """Two ranks on two machines, or on GPUs."""

    def __init__(self, ranks: Sequence[int], timeout: timedelta) -> None:
        self._group = dist.new_group([*ranks], timeout=timeout, use_local_synchronization=True)

    def add(self, tensor: Tensor) -> None:
        """See `Pair`."""
        dist.all_reduce(tensor, group=self._group)

    def close(self) -> None:
        """See `Pair`; torch takes its groups apart all together."""


class MemoryPair:
    """Two ranks on one machine (Linux), which write into one memory and tell each other when they have.

    There are two slots in turn, each with a place for both. A rank that has heard the other's word for one slot knows
    that the other has read the slot before, and may write there again. The words go through a socket: the system calls
    put the writes before them in order on every processor, and a partner that dies is noticed at once.
    """

    def __init__(self, store: Store, rank: int, partner: int, timeout: timedelta) -> None:
        self._partner, self._timeout_s = partner, timeout.total_seconds()
        self._side = int(rank > partner)
        connect = _receive if self._side else _offer
        try:
            self._socket, memory = connect(store, f"pair {min(rank, partner)} {max(rank, partner)}", self._timeout_s)
        except OSError as error:
            raise self._lost(error) from error
        self._slots = torch.frombuffer(memory, dtype=torch.uint8).view(2, 2, CHUNK_BYTES)
        self._slot = 0
        self._socket.setblocking(False)
        self._heard = select.poll()
        self._heard.register(self._socket, select.POLLIN)

    def add(self, tensor: Tensor) -> None:
        """See `Pair`."""
        for chunk in torch.split(tensor.view(-1), CHUNK_BYTES // tensor.element_size()):
            both = self._slots[self._slot, :, : chunk.nbytes].view(chunk.dtype)
            self._slot = 1 - self._slot
            both[self._side].copy_(chunk)
            self._meet()
            chunk.add_(both[1 - self._side])

    def close(self) -> None:
        """See `Pair`."""
        self._socket.close()

    def _meet(self) -> None:
        """Say that this rank has written; wait until the other has."""
        try:
            self._socket.send(b".")
            spin_until = time.monotonic() + SPIN_S
            while (word := self._word()) is None:
                if time.monotonic() < spin_until:
                    os.sched_yield()
                elif not self._heard.poll(1000 * self._timeout_s):
                    raise TimeoutError(f"no word for {self._timeout_s:.0f} s")
        except OSError as error:
            raise self._lost(error) from error
        if not word:
            raise self._lost("it has closed the connection")

    def _word(self) -> bytes | None:
        """What has come from the partner; empty when it is gone, nothing when it has not spoken."""
        try:
            return self._socket.recv(1)
        except BlockingIOError:
            return None

    def _lost(self, why: object) -> LostPartnerError:
        return LostPartnerError(f"rank {self._partner} is lost: {why}")


def _offer(store: Store, name: str, timeout_s: float) -> tuple[socket.socket, mmap.mmap]:
    """Make the memory and give it to the partner; nameless, so that nothing of it outlives the two."""
    with os.fdopen(os.memfd_create("chargpt"), "r+b") as file, socket.socket(socket.AF_UNIX) as listener:
        file.truncate(4 * CHUNK_BYTES)
        address = f"chargpt {secrets.token_hex(16)}"
        listener.settimeout(timeout_s)
        listener.bind(f"\0{address}")  # of Linux's abstract names: no file
        listener.listen(1)
        store.set(name, address)
        connection, _ = listener.accept()
        socket.send_fds(connection, [b"."], [file.fileno()])
        return connection, mmap.mmap(file.fileno(), 0)


def _receive(store: Store, name: str, timeout_s: float) -> tuple[socket.socket, mmap.mmap]:
    address = store.get(name).decode()
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout_s)
    connection.connect(f"\0{address}")
    _, (descriptor,), _, _ = socket.recv_fds(connection, 1, 1)
    with os.fdopen(descriptor, "r+b") as file:
        return connection, mmap.mmap(file.fileno(), 0)


def pairs_of_rank(rank: int, size: int, device: torch.device, store: Store, timeout: timedelta) -> list[Pair]:
    """This rank's pairs, in the order of the exchanges."""
    near = _ranks_here(rank) if device.type == "cpu" and sys.platform == "linux" else range(0)
    found: list[Pair] = []
    distance = 1
    while distance < size:
        partner = rank ^ distance
        if partner in near:
            found.append(MemoryPair(store, rank, partner, timeout))
        elif partner < size:  # otherwise there are not 2, 4, 8, … ranks, and the command is about to refuse
            found.append(NetworkPair(sorted((rank, partner)), timeout))
        distance *= 2
    return found


def _ranks_here(rank: int) -> range:
    """The ranks on this machine, as torchrun tells; without it, only this one."""
    first = rank - int(os.environ.get("LOCAL_RANK", "0"))
    return range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
