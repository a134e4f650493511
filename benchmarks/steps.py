"""Profile of a training step: time, floating-point operations, fraction of the machine's peak, time by operation.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 -m benchmarks.steps

The recipes alternate, a few steps each. Torch counts the operations (matrix products and attention, forward and
backward); the peak is measured in the same run, with large matrix products of the same precision on all ranks at once.
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
WARM_UP = 3  # turns that are not measured
PEAK_SIZE, PEAK_TIMES = 1024, 10
ALL_REDUCE = "peer.all_reduce"  # name of the profiled range
OPERATIONS = {  # by kind: parts of the names in the profile
    "matrix products": ("aten::mm", "aten::addmm"),
    "matrix products of Muon": ("aten::bmm", "aten::baddbmm"),
    "attention": ("scaled_dot_product",),
    "normalization": ("layer_norm",),
    "AdamW": ("adamw",),
    "all-reduce, including waiting": (ALL_REDUCE,),
}


def main(
    tokens: Annotated[Path, typer.Option(help="Folder written by the command tokenize.")] = ROOT / "data" / "tokens",
    turns: int = 10,
    steps: Annotated[int, typer.Option(help="Steps per turn.")] = 5,
    compiled: Annotated[bool, typer.Option(help="Also the default with train.compile; needs a C++ compiler.")] = False,
    network: Annotated[bool, typer.Option(help="Also with all-reduce over the network, as between hosts.")] = False,
) -> None:
    """Measure, and print one line per recipe, then the time by operation of the default recipe."""
    device = choose_device("cpu", "device")
    data = load_tokens(tokens)
    with process_group(device, timeout_s=TIMEOUT.seconds) as joined:
        group = replace(joined, peers=[ProfiledPeer(peer) for peer in joined.peers])
        trainers = {recipe: trainer(recipe, data, group) for recipe in (REFERENCE, QUICK, DEFAULT)}
        if compiled:
            trainers[f"{DEFAULT}, compiled"] = trainer(DEFAULT, data, group, "train.compile=true")
        if network:
            remote = replace(group, peers=network_peers(group))
            recipes = (REFERENCE, QUICK, DEFAULT)
            trainers |= {f"{recipe}, over the network": trainer(recipe, data, remote) for recipe in recipes}
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
                    f"{recipe}: {1000 * middle:.1f} ms per step ({1000 * low:.1f} to {1000 * high:.1f}), "
                    f"{flops / 1e9:.1f} GFLOP: {flops / middle / 1e9:.0f} GFLOP/s, {flops / middle / highest:.0%} of "
                    f"the peak of {highest / 1e9:.0f} in {precision}"
                )
        fractions = time_by_operation(trainers[DEFAULT], steps)
        if group.is_main:
            print(f"{DEFAULT}: " + ", ".join(f"{name} {fraction:.0%}" for name, fraction in fractions.items()))


class ProfiledPeer:
    """A peer whose all-reduce appears in the profile."""

    def __init__(self, peer: Peer) -> None:
        self.rank = peer.rank
        self._peer = peer

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """See `Peer`."""
        with record_function(ALL_REDUCE):
            self._peer.all_reduce(tensor)

    def close(self) -> None:
        """See `Peer`."""
        self._peer.close()


def network_peers(group: Group) -> list[Peer]:
    """The peers of this rank, as if every rank ran on its own host."""
    return [NetworkPeer(group.rank, peer.rank, TIMEOUT) for peer in group.peers]


def trainer(recipe: str, data: TokenData, group: Group, *changes: str) -> Trainer:
    """A trainer as the command `train` creates it."""
    params = read_section(ROOT / recipe, "train", TrainParams, changes)
    model = read_section(ROOT / recipe, "model", ModelConfig, changes)
    return Trainer(params, make_model(model, data.meta.vocab_size), data, group)


def seconds(step: Callable[[], object], steps: int) -> float:
    """The mean duration of a step."""
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - began) / steps


def operations(each: Trainer) -> float:
    """Floating-point operations of a step on all ranks, without those of the optimizer."""
    with FlopCounterMode(display=False) as counter:
        each.train_step()
    muon = muon_operations(each)
    return each.group.sum([float(counter.get_total_flops() - muon)])[0]


def muon_operations(each: Trainer) -> float:
    """Floating-point operations of this rank's Newton-Schulz iterations, which are overhead."""
    with FlopCounterMode(display=False) as counter:
        for optimizer in each.optimizers:
            optimizer.step()
    return float(counter.get_total_flops())


def peak(precision: torch.dtype, group: Group) -> float:
    """Operations per second of large matrix products on all ranks at once."""
    left, right = (torch.randn(PEAK_SIZE, PEAK_SIZE).to(precision) for _ in range(2))
    mine = 2 * PEAK_SIZE**3 / seconds(lambda: left @ right, PEAK_TIMES)
    return group.sum([mine])[0]


def time_by_operation(each: Trainer, steps: int) -> dict[str, float]:
    """The fraction of rank 0's time that each kind of operation takes, the largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            each.train_step()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        kind = (name for name, words in OPERATIONS.items() if any(word in event.key for word in words))
        spent[next(kind, "other")] += event.self_cpu_time_total
    return {name: count / spent.total() for name, count in spent.most_common()}


if __name__ == "__main__":
    typer.run(main)
