"""What a step costs: milliseconds, floating-point operations, the share of the machine's peak, and where the rest goes.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 -m benchmarks.steps

The recipes take turns, a few steps each. Operations are counted by torch (matrix products and attention, forward and
backward); the peak is that of large matrix products of the same precision on all ranks at once, in the same run.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.races import DEFAULT, QUICK, REFERENCE, ROOT
from gpt.core.params import read_section
from gpt.data.token_files import TokenData, load_tokens
from gpt.model.baselines import make_model
from gpt.model.config import ModelConfig
from gpt.model.device import choose_device
from gpt.training.all_reduce import NetworkPeer, Peer
from gpt.training.distributed import Group, process_group
from gpt.training.trainer import Trainer, TrainParams

TIMEOUT = timedelta(seconds=120)
WARM_UP = 3  # turns that do not count
PEAK_SIZE, PEAK_TIMES = 1024, 10
PARTS = {  # names of operations by what they are for
    "matrix products": ("aten::mm", "aten::addmm"),
    "Muon's products": ("aten::bmm", "aten::baddbmm"),
    "attention": ("scaled_dot_product",),
    "normalisation": ("layer_norm",),
    "AdamW": ("adamw",),
    "exchange between processes, waiting included": ("exchange",),
}


def main(
    tokens: Annotated[Path, typer.Option(help="Folder that the command tokenize wrote.")] = ROOT / "data" / "tokens",
    turns: int = 10,
    steps: Annotated[int, typer.Option(help="Steps a turn.")] = 5,
    compiled: Annotated[bool, typer.Option(help="The default also with train.compile; needs a C++ compiler.")] = False,
    network: Annotated[
        bool, typer.Option(help="All also with the exchange over the network, as between machines.")
    ] = False,
) -> None:
    """Measure and print one line a recipe, then where the time of the default's step goes."""
    device = choose_device("cpu", "device")
    data = load_tokens(tokens)
    with process_group(device, timeout_s=TIMEOUT.seconds) as joined_group:
        group = replace(joined_group, peers=[Seen(pair) for pair in joined_group.peers])
        trainers = {recipe: trainer(recipe, data, group) for recipe in (REFERENCE, QUICK, DEFAULT)}
        if compiled:
            trainers[f"{DEFAULT}, compiled"] = trainer(DEFAULT, data, group, "train.compile=true")
        if network:
            far = replace(group, peers=over_the_network(group))
            trainers |= {
                f"{recipe}, over the network": trainer(recipe, data, far) for recipe in (REFERENCE, QUICK, DEFAULT)
            }
        times: dict[str, list[float]] = {recipe: [] for recipe in trainers}
        peaks: dict[str, list[float]] = {"float32": [], "bfloat16": []}
        for _ in range(WARM_UP + turns):
            for recipe, each in trainers.items():
                times[recipe].append(seconds(each.train_step, steps))
            for precision, found in peaks.items():
                found.append(peak(getattr(torch, precision), group))
        for recipe, each in trainers.items():
            precision = each.params.precision
            low, middle, high = statistics.quantiles(times[recipe][WARM_UP:], n=4)
            highest = statistics.median(peaks[precision][WARM_UP:])
            flops = operations(each)
            if group.is_main:
                print(
                    f"{recipe}: {1000 * middle:.1f} ms a step ({1000 * low:.1f} to {1000 * high:.1f}), "
                    f"{flops / 1e9:.1f} GFLOP: {flops / middle / 1e9:.0f} GFLOP/s, {flops / middle / highest:.0%} of "
                    f"the peak of {highest / 1e9:.0f} in {precision}"
                )
        shares = where_time_goes(trainers[DEFAULT], steps)
        if group.is_main:
            print(f"{DEFAULT}: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))


class Seen:
    """A pair whose exchanges the profiler sees."""

    def __init__(self, pair: Peer) -> None:
        self._pair = pair

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """See `Peer`."""
        with record_function("exchange"):
            self._pair.all_reduce(tensor)

    def close(self) -> None:
        """See `Peer`."""
        self._pair.close()


def over_the_network(group: Group) -> list[Peer]:
    """The pairs of this rank, as if each rank had a machine of its own."""
    distances = [1 << level for level in range(group.size.bit_length() - 1)]
    return [NetworkPeer(sorted((group.rank, group.rank ^ distance)), TIMEOUT) for distance in distances]


def trainer(recipe: str, data: TokenData, group: Group, *changes: str) -> Trainer:
    """A training run as the command starts it."""
    params = read_section(ROOT / recipe, "train", TrainParams, changes)
    model = read_section(ROOT / recipe, "model", ModelConfig, changes)
    return Trainer(params, make_model(model, data.meta.vocab_size), data, group)


def seconds(step: Callable[[], object], steps: int) -> float:
    """How long a step takes, over some of them."""
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - began) / steps


def operations(each: Trainer) -> float:
    """Floating-point operations of a step on all ranks, without the optimizer's."""
    with FlopCounterMode(display=False) as counter:
        each.train_step()
    muon = muon_operations(each)
    return sum(found for (found,) in each.group.all_gather([float(counter.get_total_flops() - muon)]))


def muon_operations(each: Trainer) -> float:
    """Those of a rank's Newton-Schulz iterations, which are overhead, not training."""
    with FlopCounterMode(display=False) as counter:
        for optimizer in each.optimizers:
            optimizer.step()
    return float(counter.get_total_flops())


def peak(precision: torch.dtype, group: Group) -> float:
    """Operations a second of large matrix products on all ranks at once."""
    left, right = (torch.randn(PEAK_SIZE, PEAK_SIZE).to(precision) for _ in range(2))
    mine = 2 * PEAK_SIZE**3 / seconds(lambda: left @ right, PEAK_TIMES)
    return sum(found for (found,) in group.all_gather([mine]))


def where_time_goes(each: Trainer, steps: int) -> dict[str, float]:
    """The share of the first rank's time by kind of operation, the largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            each.train_step()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        kind = (name for name, words in PARTS.items() if any(word in event.key for word in words))
        spent[next(kind, "everything else")] += event.self_cpu_time_total
    return {name: count / spent.total() for name, count in spent.most_common()}


if __name__ == "__main__":
    typer.run(main)
