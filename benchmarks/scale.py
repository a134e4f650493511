"""How cost grows with the size of the text, the model and the context, and with the number of processes.

    python -m benchmarks.scale

Text is tokenized by the command. Training steps are measured in processes of their own, one thread each, so that each
has its own peak memory. The exponent in a line of the table is that of the growth from the size before: 0 is constant,
1 linear, 2 quadratic. Processes divide the work, so -1 would be ideal for them.
"""

import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.forkserver import set_forkserver_preload
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from benchmarks.races import ROOT
from benchmarks.steps import seconds, trainer
from gpt.data.token_files import load_tokens
from gpt.launch import usable_cores
from gpt.model.device import choose_device
from gpt.model.gpt import count_parameters
from gpt.training.distributed import process_group

CONTEXT = multiprocessing.get_context("forkserver")
RECIPE = "presets/nanogpt-cpu.yaml"
SETTINGS = ("train.windows=shuffled", "train.shards=4", "train.batch_size=16", "train.device=cpu")
MODELS = ((4, 128), (4, 256), (6, 384))  # (layers, width): 0.8, 3 and 10.65 million parameters
CONTEXTS, PROCESSES = (64, 128, 256, 512), (1, 2, 4)
WARM_UP, MIN_STEPS = 3, 5
TIMEOUT_S = 300
PROCESSES_SERIES = "training: processes"


class Steps(NamedTuple):
    """What a process measured: seconds of each step, peak memory in bytes; parameters, and tokens of a step."""

    seconds: list[float]
    memory: int
    parameters: int
    tokens: int


@dataclass(frozen=True)
class Point:
    """One measurement: `seconds` with quartiles, of one step or of the whole text; peak memory of a process."""

    series: str
    size: float
    seconds: float
    low: float
    high: float
    tokens_per_second: float
    memory_gb: float


def main(
    corpus: Annotated[Path, typer.Option(help="The text that is repeated.")] = ROOT / "data" / "shakespeare.txt",
    tokens: Annotated[Path, typer.Option(help="Folder written by the command tokenize.")] = ROOT / "data" / "tokens",
    megabytes: Annotated[list[int] | None, typer.Option(help="Sizes of the text; repeatable.")] = None,
    budget: Annotated[float, typer.Option(metavar="SECONDS", help="Time for the steps of a measurement.")] = 4,
    out: Annotated[Path, typer.Option(help="File for the results.")] = ROOT / "benchmarks" / "scale.json",
) -> None:
    """Measure, print a table and write the results."""
    set_forkserver_preload([__name__, "torch._dynamo"])  # the first optimizer imports the latter
    points: list[Point] = []
    for point in itertools.chain(
        by_text(corpus, megabytes or [1, 10, 100, 1000], budget), by_model(tokens, budget), by_processes(tokens, budget)
    ):
        points.append(point)
        print(f"{point.series}: {point.size:g} done", file=sys.stderr, flush=True)
    print("\n".join(table(points)))
    out.write_text(
        json.dumps({"cores": usable_cores(), "points": [asdict(point) for point in points]}, indent=1) + "\n"
    )


def by_text(corpus: Path, megabytes: Sequence[int], budget_s: float) -> Iterator[Point]:
    """Tokenize texts of these sizes, and train on each."""
    text = corpus.read_bytes()
    for size in megabytes:
        with tempfile.TemporaryDirectory(prefix="chargpt-scale-") as name:
            repeated, folder = Path(name) / "text.txt", Path(name) / "tokens"
            with repeated.open("wb") as file:
                for _ in range(math.ceil(size * 1e6 / len(text))):
                    file.write(text)
                file.truncate(int(size * 1e6))
            whole, memory = tokenize(repeated, folder)
            repeated.unlink()
            yield Point("tokenizing: MB of text", size, whole, whole, whole, size * 1e6 / whole, memory / 1e9)
            yield measure("training: MB of text", size, folder, budget_s)
            shutil.rmtree(folder)


def by_model(tokens: Path, budget_s: float) -> Iterator[Point]:
    """Train models of different sizes, and contexts of different lengths."""
    for layers, width in MODELS:
        shape = (f"model.n_layer={layers}", f"model.n_embd={width}")
        yield measure("training: million parameters", None, tokens, budget_s, *shape)
    for length in CONTEXTS:
        yield measure("training: tokens of context", length, tokens, budget_s, f"model.block_size={length}")


def by_processes(tokens: Path, budget_s: float) -> Iterator[Point]:
    """Train with different numbers of processes."""
    for processes in PROCESSES:
        yield measure(PROCESSES_SERIES, processes, tokens, budget_s, processes=processes)


def tokenize(corpus: Path, folder: Path) -> tuple[float, int]:
    """Run the command; returns the seconds of the whole process and its peak memory in bytes."""
    command = [sys.executable, "-m", "gpt", "tokenize", "--params", str(ROOT / RECIPE), "--log-file", os.devnull]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--corpus", str(corpus), "--out", str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit("expected exit code 0 of the command tokenize")
    return time.perf_counter() - began, 1024 * usage.ru_maxrss


def measure(series: str, size: float | None, tokens: Path, budget_s: float, *changes: str, processes: int = 1) -> Point:
    """The median step of a training; without a size, it is the number of parameters in millions."""
    found: SimpleQueue[Steps] = CONTEXT.SimpleQueue()
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    workers = []
    for rank in range(processes):
        variables = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        workers.append(CONTEXT.Process(target=work, args=(variables, tokens, changes, budget_s, found)))
        workers[-1].start()
    for worker in workers:
        worker.join(TIMEOUT_S)
        if worker.exitcode != 0:
            raise SystemExit(f"{series}: expected exit code 0 of all processes, found {worker.exitcode}")
    every = [found.get() for _ in workers]
    low, middle, high = statistics.quantiles(every[0].seconds, n=4)
    return Point(
        series,
        size or round(every[0].parameters / 1e6, 2),
        middle,
        low,
        high,
        every[0].tokens / middle,
        max(each.memory for each in every) / 1e9,
    )


def work(
    variables: dict[str, str], tokens: Path, changes: Sequence[str], budget_s: float, found: "SimpleQueue[Steps]"
) -> None:
    """Be one process of a training, for about so many seconds after the warm-up."""
    os.environ.update(variables)
    with process_group(choose_device("cpu", "device"), timeout_s=TIMEOUT_S) as group:
        each = trainer(RECIPE, load_tokens(tokens), group, *SETTINGS, *changes)
        slowest = max(seconds(each.train_step, 1) for _ in range(WARM_UP))
        count = MIN_STEPS + int(budget_s / group.sum([slowest])[0] * group.size)  # the same in all processes
        times = [seconds(each.train_step, 1) for _ in range(count)]
        batch = each.params.batch_size * each.model.config.block_size
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found.put(Steps(times, peak, count_parameters(each.model), batch))


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def table(points: Sequence[Point]) -> list[str]:
    """The lines of a markdown table, by series."""
    cores = usable_cores()
    lines = ["| | size | time (quartiles) | exponent | tokens/s | peak memory |", "|---|---|---|---|---|---|"]
    for series in dict.fromkeys(point.series for point in points):
        before: Point | None = None
        for point in (point for point in points if point.series == series):
            exponent = f"{growth(before, point):.2f}" if before else ""
            more = f", more than the {cores} cores" if series == PROCESSES_SERIES and point.size > cores else ""
            lines.append(
                f"| {'' if before else series} | {point.size:,g}{more} | {duration(point)} | {exponent} | "
                f"{point.tokens_per_second:,.0f} | {point.memory_gb:.2f} GB |"
            )
            before = point
    return lines


def growth(before: Point, point: Point) -> float:
    """The exponent with which time grows between two sizes."""
    return math.log(point.seconds / before.seconds) / math.log(point.size / before.size)


def duration(point: Point) -> str:
    """The time in seconds, or in milliseconds with its quartiles."""
    if point.low == point.high:
        return f"{point.seconds:.1f} s"
    return f"{1e3 * point.seconds:.1f} ms ({1e3 * point.low:.1f} to {1e3 * point.high:.1f})"


if __name__ == "__main__":
    typer.run(main)
