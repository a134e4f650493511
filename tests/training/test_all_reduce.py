"""All-reduce between ranks: correct sums at any timing, and an error that names a lost peer."""

import os
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not in its __all__

from gpt.training.all_reduce import CHUNK_BYTES, SharedMemoryPeer, accept_own
from gpt.training.distributed import Group, LostRankError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks share memory on Linux only; elsewhere gloo")

Connect = Callable[..., list[SharedMemoryPeer]]
Result = TypeVar("Result")


def on_all_ranks(work: Callable[[int], Result], ranks: int = 2) -> list[Result]:
    """Run a function for every rank, in parallel; returns the results by rank."""
    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(work, range(ranks)))


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Connects two ranks in this process; returns both ends."""
    peers: list[SharedMemoryPeer] = []

    def make(timeout_s: float = 20) -> list[SharedMemoryPeer]:
        store = HashStore()
        peers.extend(on_all_ranks(lambda rank: SharedMemoryPeer(store, rank, 1 - rank, timedelta(seconds=timeout_s))))
        return peers

    yield make
    for peer in peers:
        peer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("surplus", [None, -1, 0, 1])
def test_both_ranks_get_the_sum(connect: Connect, dtype: torch.dtype, surplus: int | None) -> None:
    """One element, and one less than a chunk, a chunk, and one more."""
    count = 1 if surplus is None else CHUNK_BYTES // dtype.itemsize + surplus
    tensors = [torch.randn(count).mul(50).to(dtype) for _ in range(2)]
    expected = tensors[0] + tensors[1]
    peers = connect()
    on_all_ranks(lambda rank: peers[rank].all_reduce(tensors[rank]))
    assert torch.equal(tensors[0], expected)
    assert torch.equal(tensors[1], expected)


def test_sums_are_right_at_any_timing(connect: Connect) -> None:
    """Either rank is late at random: no buffer is read or overwritten too early."""
    peers = connect()
    rounds = 300

    def work(rank: int) -> list[Tensor]:
        random_number = random.Random(rank)
        sums = []
        for number in range(rounds):
            tensor = torch.full((1 + number % 7 * 1000,), float(number + 1000 * rank))
            if random_number.random() < 0.1:
                time.sleep(random_number.random() * 0.01)
            peers[rank].all_reduce(tensor)
            sums.append(tensor)
        return sums

    for sums in on_all_ranks(work):
        assert [set(tensor.tolist()) for tensor in sums] == [{2.0 * number + 1000} for number in range(rounds)]


@pytest.fixture
def four_ranks() -> Iterator[list[Group]]:
    """Four ranks in this process, each with two peers."""
    store, timeout = HashStore(), timedelta(seconds=0.5)

    def join(rank: int) -> Group:
        peers = [SharedMemoryPeer(store, rank, rank ^ distance, timeout * distance) for distance in (1, 2)]
        return Group(rank, 4, torch.device("cpu"), 20, store, ["rank 0", "rank 1", "rank 2", "rank 3"], list(peers))

    groups = on_all_ranks(join, 4)
    yield groups
    for group in groups:
        for peer in group.peers:
            peer.close()


def test_four_ranks_sum_in_a_binary_tree(four_ranks: list[Group]) -> None:
    tensors = [torch.randn(1000) for _ in range(4)]
    expected = (tensors[0] + tensors[1]) + (tensors[2] + tensors[3])
    on_all_ranks(lambda rank: four_ranks[rank].all_reduce(tensors[rank]), 4)
    for tensor in tensors:
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("dies", [True, False])
def test_all_ranks_name_the_one_that_died_or_hangs(four_ranks: list[Group], dies: bool) -> None:
    """Rank 3 waits for the lost rank 2, and rank 1 for rank 3."""

    def reduce(rank: int) -> None:
        group = four_ranks[rank]
        try:
            if rank != 2:
                with pytest.raises(LostRankError, match=r"^rank 2 died"):
                    group.all_reduce(torch.zeros(1))
        finally:
            if rank != 2 or dies:
                for peer in group.peers:
                    peer.close()

    on_all_ranks(reduce, 4)


def test_a_closed_peer_is_an_error_without_waiting_for_the_timeout(connect: Connect) -> None:
    left, right = connect(timeout_s=600)
    right.close()
    with pytest.raises(ConnectionError):
        left.all_reduce(torch.zeros(1))


def test_a_silent_peer_is_an_error_after_the_timeout(connect: Connect) -> None:
    left, _right = connect(timeout_s=0.2)
    with pytest.raises(TimeoutError, match="rank 1"):
        left.all_reduce(torch.zeros(1))


def test_a_peer_that_never_connects_is_an_error() -> None:
    with pytest.raises(TimeoutError):
        SharedMemoryPeer(HashStore(), 0, 1, timedelta(seconds=0.2))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_a_process_of_another_user_does_not_get_the_memory() -> None:
    address = f"\0chargpt test {os.getpid()}"
    connect = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({address!r}); print(s.recv(1))"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as own:
        listener.bind(address)
        listener.listen(2)
        foreign = subprocess.Popen(["/usr/bin/env", "python3", "-c", connect], user=65534, stdout=subprocess.PIPE)
        select.select([listener], [], [], 20)  # the other user is first
        own.connect(address)
        with accept_own(listener) as accepted:
            accepted.send(b"!")
            assert own.recv(1) == b"!"
        assert foreign.communicate(timeout=20)[0] == b"b''\n"
