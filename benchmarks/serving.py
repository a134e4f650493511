"""`python -m benchmarks.serving CHECKPOINT`: load the server with concurrent clients.

Measures in turns one client and many, each of which streams texts one after another: total tokens per second, time to
the first token. Then sends many short requests and follows the memory of the server.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import typer

CLIENTS, ROUNDS, TOKENS, TEXTS = 32, 5, 200, 2


def main(checkpoint: Path = Path("chargpt_nano.pt"), requests: int = 10_000) -> None:
    """Print tokens per second, latencies and memory."""
    with running_server(checkpoint) as (process, address):
        asyncio.run(measure(address, process, requests))


@contextmanager
def running_server(checkpoint: Path) -> Iterator[tuple[psutil.Process, str]]:
    """A server on a free port: its process and its address."""
    command = [sys.executable, "-m", "gpt", "serve", "--checkpoint", str(checkpoint), "--port", "0"]
    with subprocess.Popen([*command, "--log-file", os.devnull], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            yield psutil.Process(server.pid), server.stdout.readline().rpartition(" ")[2].strip()
        finally:
            server.terminate()


async def measure(address: str, process: psutil.Process, requests: int) -> None:
    """Run all measurements."""
    single, many, first = list[float](), list[float](), list[float]()
    for number in range(ROUNDS):
        for clients, rates in ((1, single), (CLIENTS, many)):
            results = await load(address, clients, seed=1000 * number)
            rates.append(results[0])
            if clients > 1:
                first += results[1]
    ratio = statistics.median(of_many / of_one for of_one, of_many in zip(single, many, strict=True))
    print(f"1 client: {statistics.median(single):,.0f} tokens/s ({min(single):,.0f} to {max(single):,.0f})")
    print(f"{CLIENTS} clients: {statistics.median(many):,.0f} tokens/s ({min(many):,.0f} to {max(many):,.0f})")
    print(f"ratio {ratio:.2f}; time to first token: 95th percentile {statistics.quantiles(first, n=20)[-1]:.3f} s")
    began = time.perf_counter()
    sizes = await follow_memory(address, process, requests)
    print(f"{requests:,} requests in {time.perf_counter() - began:.0f} s without an error; resident memory:")
    print(", ".join(f"{size:.0f} MB after {number:,}" for number, size in sizes.items()))


async def load(address: str, clients: int, seed: int) -> tuple[float, list[float]]:
    """Tokens per second of all clients together, and their times to the first token."""

    async def client(number: int) -> list[float]:
        return [await stream(address, TOKENS, seed + TEXTS * number + text) for text in range(TEXTS)]

    began = time.perf_counter()
    first = await asyncio.gather(*map(client, range(clients)))
    return clients * TEXTS * TOKENS / (time.perf_counter() - began), [each for some in first for each in some]


async def stream(address: str, max_tokens: int, seed: int) -> float:
    """Stream one text; returns the time to its first token."""
    began, first, count = time.perf_counter(), 0.0, 0
    body = {"prompt": "", "max_tokens": max_tokens, "seed": seed, "stream": True}
    async with aclosing(post(address, body)) as lines:
        async for line in lines:
            first = first or time.perf_counter() - began
            count += line.startswith(b'data: {"id"')
    if count != max_tokens:
        raise RuntimeError(f"expected {max_tokens} tokens, found {count}")
    return first


async def post(address: str, body: dict[str, object]) -> AsyncGenerator[bytes, None]:
    """Send a request on its own connection; yields the lines of the answer."""
    content, parts = json.dumps(body).encode(), urlsplit(address)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"expected status 200, found {status!r}")
        await reader.readuntil(b"\r\n\r\n")
        while line := await reader.readline():
            yield line
    finally:
        writer.close()


async def follow_memory(address: str, process: psutil.Process, requests: int) -> dict[int, float]:
    """Send short requests from all clients, of which every tenth disconnects after the first line of the answer.

    Returns the resident memory of the server in MB, by the number of requests.
    """
    sizes, numbers = dict[int, float](), iter(range(1, requests + 1))

    async def client() -> None:
        for number in numbers:
            body = {"prompt": "", "max_tokens": 8, "seed": number, "stream": number % 2 == 0}
            async with aclosing(post(address, body)) as lines:
                async for _ in lines:
                    if number % 10 == 0:
                        break
            if number % (requests // 10) == 0:
                sizes[number] = process.memory_info().rss / 1e6

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return sizes


if __name__ == "__main__":
    typer.run(main)
