"""Sums between two ranks: the right bits whoever is faster, and a partner that is gone or silent is named in time."""

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not in its __all__

from gpt.training.all_reduce import CHUNK_BYTES, LostPartnerError, MemoryPair

Pairs = Callable[..., list[MemoryPair]]
Result = TypeVar("Result")


def at_once(work: Callable[[int], Result], ranks: int = 2) -> list[Result]:
    """What each rank does, all at the same time."""
    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(work, range(ranks)))


@pytest.fixture
def two() -> Iterator[Pairs]:
    """Both ends of one pair, in this process."""
    made: list[MemoryPair] = []

    def make(timeout_s: float = 20) -> list[MemoryPair]:
        store = HashStore()
        made.extend(at_once(lambda rank: MemoryPair(store, rank, 1 - rank, timedelta(seconds=timeout_s))))
        return made

    yield make
    for pair in made:
        pair.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("surplus", [None, -1, 0, 1])
def test_both_ends_get_the_bits_of_the_sum(two: Pairs, dtype: torch.dtype, surplus: int | None) -> None:
    """One number, and just less, as much and more than fits in at once."""
    count = 1 if surplus is None else CHUNK_BYTES // dtype.itemsize + surplus
    tensors = [torch.randn(count).mul(50).to(dtype) for _ in range(2)]
    expected = tensors[0] + tensors[1]
    pairs = two()
    at_once(lambda rank: pairs[rank].add(tensors[rank]))
    assert torch.equal(tensors[0], expected)
    assert torch.equal(tensors[1], expected)


def test_whoever_is_faster_every_sum_is_right(two: Pairs) -> None:
    """Now one end waits, now the other, now none: none reads a number too early or overwrites one too early."""
    pairs = two()
    rounds = 300

    def work(rank: int) -> list[Tensor]:
        chance = random.Random(rank)
        found = []
        for turn in range(rounds):
            tensor = torch.full((1 + turn % 7 * 1000,), float(turn + 1000 * rank))
            if chance.random() < 0.1:
                time.sleep(chance.random() * 0.01)
            pairs[rank].add(tensor)
            found.append(tensor)
        return found

    for found in at_once(work):
        assert [set(tensor.tolist()) for tensor in found] == [{2.0 * turn + 1000} for turn in range(rounds)]


def test_four_ranks_add_up_as_a_tree() -> None:
    store = HashStore()
    tensors = [torch.randn(1000) for _ in range(4)]
    expected = (tensors[0] + tensors[1]) + (tensors[2] + tensors[3])

    def work(rank: int) -> None:
        pairs = [MemoryPair(store, rank, rank ^ distance, timedelta(seconds=20)) for distance in (1, 2)]
        for pair in pairs:
            pair.add(tensors[rank])
        for pair in pairs:
            pair.close()

    at_once(work, 4)
    for tensor in tensors:
        assert torch.equal(tensor, expected)


def test_a_partner_that_is_gone_is_noticed_at_once(two: Pairs) -> None:
    left, right = two()
    right.close()
    began = time.monotonic()
    with pytest.raises(LostPartnerError, match="rank 1 is lost"):
        left.add(torch.zeros(1))
    assert time.monotonic() - began < 1


def test_a_partner_that_is_silent_is_waited_for_until_the_time_is_up(two: Pairs) -> None:
    left, _right = two(timeout_s=0.5)
    began = time.monotonic()
    with pytest.raises(LostPartnerError, match="rank 1 is lost: no word for 0 s"):
        left.add(torch.zeros(1))
    assert 0.5 <= time.monotonic() - began < 2


def test_a_partner_that_never_comes_is_named() -> None:
    with pytest.raises(LostPartnerError, match="rank 1 is lost"):
        MemoryPair(HashStore(), 0, 1, timedelta(seconds=0.2))
