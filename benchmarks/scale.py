"""How cost grows with the size of the text, the model and the context, and with the number of processes.

    python -m benchmarks.scale

Text is tokenized by the command. Each training has processes of its own, with one thread each, so that each has its own
peak memory. The trainings of a series alternate, step by step, so that other load slows all of them. The exponent in a
line of the table is that of the growth from the size before: 0 is constant, 1 linear, 2 quadratic. Processes divide the
work, so -1 would be ideal for them.
"""

import json
import math
import multiprocessing
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.forkserver import set_forkserver_preload
from pathlib import Path
from typing import Annotated, Any

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
WARM_UP, TIMEOUT_S = 2, 300
PROCESSES_SERIES = "training: processes"


@dataclass(frozen=True)
class Point:
    """One measurement: `seconds` of one step, with quartiles, or of the whole text; peak memory of a process."""

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
    turns: Annotated[int, typer.Option(min=2, help="Measured steps of each training.")] = 10,
    out: Annotated[Path, typer.Option(help="File for the results.")] = ROOT / "benchmarks" / "scale.json",
) -> None:
    """Measure, print a table and write the results."""
    set_forkserver_preload([__name__, "torch._dynamo"])  # the first optimizer imports the latter
    points = list(by_text(corpus, megabytes or [1, 10, 100, 1000], turns))
    by_size = [Training(tokens, f"model.n_layer={layers}", f"model.n_embd={width}") for layers, width in MODELS]
    points += alternate("training: million parameters", by_size, turns)
    by_context = [Training(tokens, f"model.block_size={length}", size=length) for length in CONTEXTS]
    points += alternate("training: tokens of context", by_context, turns)
    by_processes = [Training(tokens, size=count, processes=count) for count in PROCESSES]
    points += alternate(PROCESSES_SERIES, by_processes, turns)
    print("\n".join(table(points)))
    out.write_text(
        json.dumps({"cores": usable_cores(), "points": [asdict(point) for point in points]}, indent=1) + "\n"
    )


def by_text(corpus: Path, megabytes: Sequence[int], turns: int) -> Iterator[Point]:
    """Tokenize texts of these sizes, and train on each."""
    text = corpus.read_bytes()
    with tempfile.TemporaryDirectory(prefix="chargpt-scale-") as name:
        trainings = []
        for size in megabytes:
            repeated, folder = Path(name) / "text.txt", Path(name) / f"tokens-{size}"
            with repeated.open("wb") as file:
                for _ in range(math.ceil(size * 1e6 / len(text))):
                    file.write(text)
                file.truncate(int(size * 1e6))
            whole, memory = tokenize(repeated, folder)
            yield Point("tokenizing: MB of text", size, whole, whole, whole, size * 1e6 / whole, memory / 1e9)
            trainings.append(Training(folder, size=size))
        yield from alternate("training: MB of text", trainings, turns)


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


class Training:
    """A training in processes of its own, of which `step` makes one step.

    Args:
        size: on the axis of its series; by default the number of parameters in millions.
    """

    def __init__(self, tokens: Path, *changes: str, size: float | None = None, processes: int = 1) -> None:
        self.size, self._tokens, self._changes, self._processes = size, tokens, changes, processes

    def start(self) -> None:
        """Start the processes."""
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        variables |= {"WORLD_SIZE": str(self._processes), "LOCAL_WORLD_SIZE": str(self._processes)}
        self._connections: list[Connection] = []
        for rank in range(self._processes):
            mine, other = CONTEXT.Pipe()
            of_rank = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            CONTEXT.Process(target=work, args=(of_rank, self._tokens, self._changes, other), daemon=True).start()
            other.close()
            self._connections.append(mine)

    def step(self) -> float:
        """The seconds of one step."""
        times: list[float] = self._answers(True)
        return max(times)

    def stop(self) -> tuple[int, int, int]:
        """End the processes; returns the number of parameters, the tokens of a step, and the peak memory in bytes."""
        every = self._answers(False)
        return every[0][0], every[0][1], max(memory for _, _, memory in every)

    def _answers(self, command: bool) -> list[Any]:
        for connection in self._connections:
            connection.send(command)
        return [connection.recv() for connection in self._connections]  # EOFError if a process failed


def work(variables: Mapping[str, str], tokens: Path, changes: Sequence[str], connection: Connection) -> None:
    """Be one process of a training: a step for each true message, then a summary."""
    os.environ.update(variables)
    with process_group(choose_device("cpu", "device"), timeout_s=TIMEOUT_S) as group:
        each = trainer(RECIPE, load_tokens(tokens), group, *SETTINGS, *changes)
        while connection.recv():
            connection.send(seconds(each.train_step, 1))
        batch = each.params.batch_size * each.model.config.block_size
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        connection.send((count_parameters(each.model), batch, peak))


def alternate(series: str, trainings: Sequence[Training], turns: int) -> Iterator[Point]:
    """Measure the trainings of a series in turns."""
    for training in trainings:
        training.start()
    times = [[training.step() for training in trainings] for _ in range(WARM_UP + turns)][WARM_UP:]
    for training, of_training in zip(trainings, zip(*times, strict=True), strict=True):
        low, middle, high = statistics.quantiles(of_training, n=4)
        parameters, tokens, memory = training.stop()
        size = training.size or round(parameters / 1e6, 2)
        yield Point(series, size, middle, low, high, tokens / middle, memory / 1e9)
    print(f"{series}: done", file=sys.stderr, flush=True)


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
