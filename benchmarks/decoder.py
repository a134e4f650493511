"""Decoding with the compiled step against the same step in torch.

    python -m benchmarks.decoder

Both generate the same texts in turn, so that other work on the machine affects both. Times include sampling and the
windows that are computed again. The last lines compare one step with what the core can read and compute.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from gpt.generation.decoding import Decoder, generate_tokens
from gpt.generation.sampling import SamplingParams
from gpt.model.checkpoint import load_checkpoint
from gpt.model.device import CPU_THREADS
from gpt.model.gpt import LanguageModel

ROOT = Path(__file__).resolve().parents[1]
STEPS = 60  # of one measurement of a single step


def main(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint of a GPT.")] = ROOT / "chargpt_nano.pt",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text.")] = 400,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each kind.")] = 5,
) -> None:
    """Measure and print tokens per second, medians with minimum and maximum, and their ratios."""
    torch.set_num_threads(CPU_THREADS)
    model = load_checkpoint(checkpoint).build()
    rate(model, 1, 2, compiled=True)  # loads the compiled step
    for texts in (1, 16):
        rates = [[rate(model, texts, tokens, compiled=compiled) for compiled in (True, False)] for _ in range(rounds)]
        fast, slow = zip(*rates, strict=True)
        ratios = [one / other for one, other in rates]
        print(f"{texts:2} texts, tokens/s: compiled {summary(fast)}, torch {summary(slow)}, ratio {summary(ratios, 1)}")
    print_limits(model, rounds)


def rate(model: LanguageModel, texts: int, tokens: int, *, compiled: bool) -> float:
    """Tokens per second of texts of different seeds, side by side."""
    params = SamplingParams(max_new_tokens=tokens)
    start = time.perf_counter()
    for _ in generate_tokens(model, [[0]] * texts, params, range(texts), compiled=compiled):
        pass
    return texts * tokens / (time.perf_counter() - start)


def print_limits(model: LanguageModel, rounds: int) -> None:
    """Compare one step of one text, at half of the context, with reading the matrices once."""
    matrices = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and "embedding" not in name]
    values = sum(weight.numel() for weight in matrices)
    first, second = torch.rand(2, values // 2)
    step, read = list[float](), list[float]()
    for _ in range(rounds):
        decoder = Decoder(model, 1)
        decoder.add([[0] * (model.config.block_size // 2 - STEPS // 2)])
        decoder.step([0])
        step.append(seconds(partial(decoder.step, [0])))
        read.append(seconds(partial(torch.dot, first, second)))
    print(
        f"one step: {1e6 * statistics.median(step):.0f} µs for {values:,} values of matrices: "
        f"{2e-9 * values / statistics.median(step):.1f} GFLOP/s, {4e-9 * values / statistics.median(step):.1f} GB/s; "
        f"reading as many values: {1e6 * statistics.median(read):.0f} µs, "
        f"share of the limit {statistics.median(read) / statistics.median(step):.0%}"
    )


def seconds(call: Callable[[], object]) -> float:
    """Mean duration of `STEPS` calls."""
    start = time.perf_counter()
    for _ in range(STEPS):
        call()
    return (time.perf_counter() - start) / STEPS


def summary(values: Sequence[float], digits: int = 0) -> str:
    """The median with minimum and maximum."""
    numbers = [f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values))]
    return f"{numbers[0]} ({numbers[1]} to {numbers[2]})"


if __name__ == "__main__":
    typer.run(main)
