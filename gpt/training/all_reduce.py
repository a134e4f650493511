"""All-reduce by recursive doubling: each rank sums with the peer at distance 1, then 2, 4, …

That takes log2(ranks) exchanges and sums in one fixed binary tree, where a + b has the bits of b + a (Thakur,
Rabenseifner, Gropp 2005, "Optimization of Collective Communication Operations in MPICH", section 4.5).

Two ranks on one machine exchange through shared memory. Gloo would send the gradients through the loopback interface,
which costs a sixth of a small step.
"""

import mmap
import os
import secrets
import select
import socket
import struct
import sys
import time
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]  # public, but not in its __all__

CHUNK_BYTES = 1 << 22  # size of an exchange: more than a small model's gradients, less than a processor's cache
PEER = struct.Struct("3i")  # process, user and group of the other end of a Unix socket (man 7 unix)
SPIN_S = 0.005  # of polling before the process sleeps: a wake-up takes longer than most waits


class Peer(Protocol):
    """The connection of this rank to one other."""

    rank: int

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum the tensors of the two ranks, in place; both call this with tensors of the same size.

        Raises:
            OSError, RuntimeError: the peer died or does not answer in time.
        """

    def close(self) -> None:
        """End the connection; the peer's next exchange fails."""


class NetworkPeer:
    """A peer on another machine, or on a GPU: a process group of two."""

    def __init__(self, rank: int, peer: int, timeout: timedelta) -> None:
        self.rank = peer
        self._group = dist.new_group(sorted((rank, peer)), timeout=timeout, use_local_synchronization=True)

    def all_reduce(self, tensor: Tensor) -> None:
        """See `Peer`."""
        dist.all_reduce(tensor, group=self._group)

    def close(self) -> None:
        """See `Peer`; `destroy_process_group` ends all groups together."""


class SharedMemoryPeer:
    """A peer on this machine (Linux only): two ranks write to shared memory and signal through a socket.

    There are two slots, used alternately, each with a buffer per rank. The peer's signal for one slot shows that it has
    read the other slot, which may then be overwritten. The system calls of the socket order the memory accesses around
    them on every processor, and a peer that dies is noticed at once.
    """

    def __init__(self, store: Store, rank: int, peer: int, timeout: timedelta) -> None:
        self.rank = peer
        self._timeout_s = timeout.total_seconds()
        self._side = int(rank > peer)
        connect = _attach_memory if self._side else _create_memory
        self._socket, memory = connect(store, f"pair {min(rank, peer)} {max(rank, peer)}", self._timeout_s)
        self._slots = torch.frombuffer(memory, dtype=torch.uint8).view(2, 2, CHUNK_BYTES)
        self._slot = 0
        self._socket.setblocking(False)
        self._readable = select.poll()
        self._readable.register(self._socket, select.POLLIN)

    def all_reduce(self, tensor: Tensor) -> None:
        """See `Peer`."""
        for chunk in torch.split(tensor.view(-1), CHUNK_BYTES // tensor.element_size()):
            buffers = self._slots[self._slot, :, : chunk.nbytes].view(chunk.dtype)
            self._slot = 1 - self._slot
            buffers[self._side].copy_(chunk)
            self._synchronize()
            chunk.add_(buffers[1 - self._side])

    def close(self) -> None:
        """See `Peer`."""
        self._socket.close()

    def _synchronize(self) -> None:
        """Signal that this rank has written; wait until the peer has."""
        self._socket.send(b".")
        spin_until = time.monotonic() + SPIN_S
        while not self._readable.poll(0):
            if time.monotonic() < spin_until:
                os.sched_yield()
            elif not self._readable.poll(1000 * self._timeout_s):
                raise TimeoutError(f"rank {self.rank} did not answer for {self._timeout_s:.0f} s")
        if not self._socket.recv(1):
            raise ConnectionResetError(f"rank {self.rank} closed the connection")


def _create_memory(store: Store, key: str, timeout_s: float) -> tuple[socket.socket, mmap.mmap]:
    """Create the shared memory and pass it to the peer; it has no name, so nothing is left after a kill."""
    with os.fdopen(os.memfd_create("chargpt"), "r+b") as file, socket.socket(socket.AF_UNIX) as listener:
        file.truncate(4 * CHUNK_BYTES)
        address = f"chargpt {secrets.token_hex(16)}"
        listener.settimeout(timeout_s)
        listener.bind(f"\0{address}")  # in Linux's abstract namespace: no file
        listener.listen(1)
        store.set(key, address)
        connection = accept_own(listener)
        socket.send_fds(connection, [b"."], [file.fileno()])
        return connection, mmap.mmap(file.fileno(), 0)


def accept_own(listener: socket.socket) -> socket.socket:
    """Accept a connection of this user; others can see the address, and are refused."""
    while True:
        connection, _ = listener.accept()
        _, user, _ = PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
        if user == os.geteuid():
            return connection
        connection.close()


def _attach_memory(store: Store, key: str, timeout_s: float) -> tuple[socket.socket, mmap.mmap]:
    """Receive the shared memory that the peer created."""
    address = store.get(key).decode()
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout_s)
    connection.connect(f"\0{address}")
    _, (descriptor,), _, _ = socket.recv_fds(connection, 1, 1)
    with os.fdopen(descriptor, "r+b") as file:
        return connection, mmap.mmap(file.fileno(), 0)


def connect_peer(store: Store, rank: int, peer: int, device: torch.device, timeout: timedelta) -> Peer:
    """Connect two ranks: through shared memory if both are on this machine and compute on its CPU."""
    first = rank - int(os.environ.get("LOCAL_RANK", "0"))  # of this machine, as torchrun tells
    local = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if peer in local and device.type == "cpu" and sys.platform == "linux":
        return SharedMemoryPeer(store, rank, peer, timeout)
    return NetworkPeer(rank, peer, timeout)
