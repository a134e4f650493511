"""The cost of results that do not depend on the number of processes: a sharded step against plain DDP.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 -m benchmarks.sharding

Both do the same work (forward, backward, clipping, AdamW) on random tokens with the model of a params file. They
alternate, a few steps each, so that other load slows both; the median and quartiles of the ratio are over these turns.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gpt.core.params import read_section
from gpt.model.config import ModelConfig
from gpt.model.device import choose_device
from gpt.model.gpt import GPT, next_token_loss
from gpt.training.distributed import Group, ShardedModel, process_group

VOCABULARY = 65
WARM_UP = 3  # turns that are not measured


def main(
    params: Path = Path("params.yaml"),
    batch_size: Annotated[int, typer.Option(help="Sequences per step, over all processes.")] = 8,
    shards: Annotated[list[int] | None, typer.Option(help="Number of shards; repeatable.")] = None,
    turns: int = 30,
    steps: Annotated[int, typer.Option(help="Steps per turn.")] = 5,
) -> None:
    """Measure, and print one line per number of shards."""
    section = read_section(params, "model", ModelConfig, [])
    device = choose_device("cpu", "device")
    with process_group(device, timeout_s=120) as group:
        for count in shards or [2, 4, 8]:
            plain = plain_step(section, batch_size, group)
            sharded = sharded_step(section, batch_size, group, count)
            times = [(seconds(sharded, steps), seconds(plain, steps)) for _ in range(WARM_UP + turns)][WARM_UP:]
            low, ratio, high = statistics.quantiles((ours / theirs for ours, theirs in times), n=4)
            if group.is_main:
                ours, theirs = (1000 * statistics.median(each) for each in zip(*times, strict=True))
                print(
                    f"{group.size} process(es), batch {batch_size}, {count} shards: {ours:.1f} ms per step, plain DDP "
                    f"{theirs:.1f} ms; ratio {ratio:.3f} ({low:.3f} to {high:.3f})"
                )


def plain_step(params: ModelConfig, batch_size: int, group: Group) -> Callable[[], None]:
    """A step with DistributedDataParallel: each process runs its part of the batch at once."""
    model = GPT(params, VOCABULARY)
    ddp = DistributedDataParallel(model)
    update = update_step(model)

    def step() -> None:
        ddp.zero_grad(set_to_none=True)
        loss_of(ddp, params, batch_size // group.size).backward()  # type: ignore[no-untyped-call]
        update()

    return step


def sharded_step(params: ModelConfig, batch_size: int, group: Group, shards: int) -> Callable[[], None]:
    """A step as in training."""
    model = GPT(params, VOCABULARY)
    sharded = ShardedModel(model, group, shards)
    update = update_step(model)

    def step() -> None:
        sharded.backward(lambda module, _shard: loss_of(module, params, batch_size // shards))
        update()

    return step


def update_step(model: GPT) -> Callable[[], None]:
    """Gradient clipping and the optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return update


def loss_of(model: nn.Module, params: ModelConfig, count: int) -> torch.Tensor:
    """The loss on random tokens."""
    tokens_BT = torch.randint(VOCABULARY, (count, params.block_size))
    return next_token_loss(model(tokens_BT), tokens_BT)


def seconds(step: Callable[[], None], steps: int) -> float:
    """The mean duration of a step."""
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - began) / steps


if __name__ == "__main__":
    typer.run(main)
