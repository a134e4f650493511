"""The server under load: many clients, and memory that does not grow."""

import asyncio
from pathlib import Path

import pytest

from benchmarks.serving import follow_memory, load, running_server

pytestmark = pytest.mark.proof


def test_clients_are_served_together_without_errors(trained: Path) -> None:
    with running_server(trained / "model.pt") as (_, address):
        _, first_tokens = asyncio.run(load(address, 32, seed=1))
    assert len(first_tokens) == 64


def test_the_memory_does_not_grow_with_the_number_of_requests(trained: Path) -> None:
    with running_server(trained / "model.pt") as (process, address):
        sizes = asyncio.run(follow_memory(address, process, 10_000))
    assert max(sizes.values()) < sizes[1000] + 5  # MB
