"""Time and memory of the command `tokenize`.

    python -m benchmarks.tokenizing

Makes temporary texts and tokenizes them with the real command: a repeated corpus with `char`, with `bpe`, and with the
tokenizer that was learned by then; and DNA of two sizes, where the second text has to take about twice as long as the
first. CPU time is that of all cores together; on a shared machine it is more reliable than the elapsed time.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from gpt.core.files import sha256_file

ROOT = Path(__file__).resolve().parents[1]
DNA_CHARACTERS = 2_000_000  # of the shorter text


@dataclass(frozen=True)
class Cost:
    """What one command took; sizes in MB of 10^6 bytes."""

    size: float
    cpu_s: float
    wall_s: float
    memory: float


def main(
    corpus: Annotated[Path, typer.Option(help="Text that is repeated.")] = ROOT / "data" / "shakespeare.txt",
    char_mb: Annotated[int, typer.Option(min=1, help="Size of the text for the kind char, in MB.")] = 1000,
    bpe_mb: Annotated[int, typer.Option(min=1, help="Size of the text for the kind bpe, in MB.")] = 20,
) -> None:
    """Print the throughput, the memory, and how the time grows with a text without spaces."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        for kind, size in (("char", char_mb // 10 or 1), ("char", char_mb), ("bpe", bpe_mb)):
            repeat(corpus.read_bytes(), size, text)
            show(kind, tokenize(kind, text))
        learned = Path(folder) / "tokenizer.json"
        learned.write_bytes((Path(folder) / "tokens" / "tokenizer.json").read_bytes())
        show("bpe, encoding only", tokenize("bpe", text, learned))
        costs = [dna(text, DNA_CHARACTERS * factor) for factor in (1, 2)]
        print(f"bpe, DNA of twice the length: {costs[1].cpu_s / costs[0].cpu_s:.2f} times the CPU time")


def dna(text: Path, characters: int) -> Cost:
    """Tokenize random letters without a space or a line end."""
    text.write_text("".join(random.Random(1).choices("ACGT", k=characters)))
    cost = tokenize("bpe", text)
    show("bpe, DNA", cost)
    return cost


def repeat(content: bytes, megabytes: int, text: Path) -> None:
    """Write a text of at least this size."""
    with text.open("wb") as file:
        while file.tell() < megabytes * 1e6:
            file.write(content)


def tokenize(kind: str, text: Path, learned: Path | None = None) -> Cost:
    """Run the command as a child process; with a learned tokenizer, it only encodes."""
    out = text.with_name("tokens")
    command = [sys.executable, "-m", "gpt", "tokenize", "--params", "params.yaml", "-S", f"tokenize.kind={kind}"]
    if learned:
        command += ["-S", f"tokenize.init_from={learned}", "-S", f"tokenize.init_sha256={sha256_file(learned)}"]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--corpus", str(text), "--out", str(out), "--log-file", os.devnull],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)  # of this child, where getrusage is that of all
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: expected exit code 0, found {process.returncode}")
    memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    wall_s = time.perf_counter() - began
    return Cost(text.stat().st_size / 1e6, usage.ru_utime + usage.ru_stime, wall_s, memory)


def show(name: str, cost: Cost) -> None:
    """Print one line."""
    print(
        f"{name}, {cost.size:,.0f} MB: {cost.size / cost.cpu_s:.1f} MB per second of CPU time ({cost.cpu_s:.1f} s), "
        f"{cost.size / cost.wall_s:.1f} MB/s elapsed, {cost.memory:.0f} MB of memory",
        flush=True,
    )


if __name__ == "__main__":
    typer.run(main)
