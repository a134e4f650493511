"""All that knows torch.distributed: the group of ranks, and gradients whose bits do not depend on how many there are.

The global batch is cut into a fixed number of shards. A rank computes its shards one after the other; gradients are
summed in one fixed binary tree whose leaves are the shards, whatever rank holds which. Floating-point addition is
commutative but not associative, so a fixed tree gives equal bits for 1, 2, 4, … ranks.
"""

import ctypes
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import (  # type: ignore[attr-defined]  # public, but not in its __all__
    GradBucket,
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from gpt.core.errors import OneLineError
from gpt.training.all_reduce import LostPartnerError, Pair, pairs_of_rank
from gpt.training.heartbeat import Heartbeat

BUCKET_MB = 25  # few large messages: each waits for the slower rank
FOREVER = timedelta(days=365)
PR_SET_PDEATHSIG = 1  # number of Linux's prctl


class LostRankError(OneLineError):
    """Another rank of the group died or does not answer."""


@dataclass(frozen=True)
class Group:
    """The ranks of one training run and this process's place among them."""

    rank: int
    size: int
    device: torch.device
    pulse: Heartbeat
    pairs: Sequence[Pair]

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes files and speaks."""
        return self.rank == 0

    def shards_of_rank(self, shards: int) -> range:
        """The shards that this rank computes: a run of neighbours, so that a subtree lies on one rank."""
        share = shards // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum the tensors of all ranks, in place, in one binary tree whatever rank adds: all get the same bits."""
        for pair in self.pairs:
            self.pulse.beat()
            pair.add(tensor)

    def all_gather(self, values: Sequence[float]) -> list[float]:
        """Put together the values of all ranks, in the order of the ranks; all give equally many."""
        everyone = torch.zeros(self.size, len(values), dtype=torch.float64, device=self.device)
        everyone[self.rank] = torch.tensor(values, dtype=torch.float64)
        self.all_reduce(everyone)  # adding zeros changes no bit
        return everyone.flatten().tolist()

    def exchange(self, tensors: Sequence[Tensor]) -> None:
        """Fill in what the other ranks computed: an element that is not zero on one rank is zero on all others.

        In place. The bits are added as integers, so that they arrive as they were sent, -0.0 too.
        """
        if self.size == 1:
            return
        everything = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])
        self.all_reduce(everything)
        at = 0
        for tensor in tensors:
            bits = tensor.view(torch.uint8)
            bits.copy_(everything[at : at + bits.numel()].view_as(bits))
            at += bits.numel()

    def broadcast(self, value: Any) -> Any:
        """Give every rank what rank 0 holds: plain values and tensors."""
        box = io.BytesIO()
        if self.is_main:
            torch.save(value, box)
        length = torch.tensor([box.tell()], device=self.device)
        self.pulse.beat()
        dist.broadcast(length, src=0)
        content = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.is_main:
            content.copy_(torch.frombuffer(box.getbuffer(), dtype=torch.uint8))
        dist.broadcast(content, src=0)
        return torch.load(io.BytesIO(content.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)


def env_rank() -> int:
    """This process's rank as torchrun set it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def die_with_torchrun() -> None:
    """Ask the system to end this process when torchrun is killed: torchrun's workers would live on (Linux only)."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1 and b"torch" not in Path("/proc/1/cmdline").read_bytes():
            sys.exit(1)  # it died before the line above (in a container it may itself be process 1)


@contextmanager
def process_group(
    device: torch.device, *, timeout_s: int, before: Callable[[], None] = lambda: None
) -> Iterator[Group]:
    """Join the group that torchrun started; without torchrun, a group of one.

    Args:
        timeout_s: seconds after which a rank that does not answer ends the job.
        before: what rank 0 has to do first (wait for a lock); the others wait for it without a limit.

    Raises:
        LostRankError: another rank died or hangs.
    """
    die_with_torchrun()
    rank, size = env_rank(), int(os.environ.get("WORLD_SIZE", "1"))
    store = _store()
    if rank == 0:
        before()
        store.set("rank 0 is ready", "yes")
    store.wait(["rank 0 is ready"], FOREVER)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    pulse = Heartbeat(store, rank, size)
    pairs: list[Pair] = []
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        pairs = pairs_of_rank(rank, size, device, store, timeout)
        yield Group(rank, size, device, pulse, pairs)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError | LostPartnerError) and "gloo" not in str(error):
            raise
        raise LostRankError(
            pulse.diagnosis(timeout_s)
        ) from error  # and leave the group: it could wait for the lost one
    except BaseException:
        dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()
    finally:
        for pair in pairs:
            pair.close()
        pulse.stop()


def _store() -> Store:
    if "MASTER_ADDR" not in os.environ:
        return HashStore()
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun itself
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not hosted and env_rank() == 0,
        timeout=FOREVER,
    )
    return PrefixStore(f"chargpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class ShardedModel:
    """A model under DistributedDataParallel whose gradients come out of the fixed tree."""

    def __init__(self, model: nn.Module, group: Group, shards: int, *, bucket_mb: float = BUCKET_MB) -> None:
        self._shards = shards
        self._group = group
        self._pending: list[tuple[int, dict[Tensor, Tensor]]] = []  # subtrees still without their right half
        ids = [group.device.index] if group.device.type == "cuda" else None
        self._ddp = DistributedDataParallel(model, device_ids=ids, bucket_cap_mb=bucket_mb)
        self._ddp.register_comm_hook(None, self._sum_bucket)

    def backward(self, loss_of_shard: Callable[[nn.Module, int], Tensor]) -> list[float]:
        """Leave the mean gradient over all shards in every parameter's `.grad`.

        Args:
            loss_of_shard: the mean loss of one shard, a scalar, computed with the model that it is given.

        Returns:
            The losses of this rank's shards, in their order.
        """
        losses = []
        mine = self._group.shards_of_rank(self._shards)
        for shard in mine:
            self._ddp.zero_grad(set_to_none=True)  # without it, a shard's gradient holds the one before as well
            last = shard == mine[-1]
            with nullcontext() if last else self._ddp.no_sync():
                loss = loss_of_shard(self._ddp, shard)
                loss.backward()  # type: ignore[no-untyped-call]
            if not last:
                self._push({weight: weight.grad for weight in self._ddp.parameters() if weight.grad is not None})
            losses.append(loss.detach())
        self._pending.clear()
        return [float(loss) for loss in losses]

    def _push(self, gradients: dict[Tensor, Tensor]) -> None:
        """Add a leaf to the tree and merge equal levels, as a binary counter carries."""
        level = 0
        while self._pending and self._pending[-1][0] == level:
            _, left = self._pending.pop()
            torch._foreach_add_([left[weight] for weight in gradients], list(gradients.values()))
            gradients, level = left, level + 1
        self._pending.append((level, gradients))

    def _sum_bucket(self, _state: None, bucket: GradBucket) -> Future[Tensor]:
        """DDP's communication hook: finish the tree for the parameters of one bucket.

        The bucket holds the last shard's gradients. Subtrees are kept by parameter, since DDP rebuilds its buckets.
        """
        for weight, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            for _, left in reversed(self._pending):
                gradient.add_(left[weight])
        total = bucket.buffer()
        self._group.all_reduce(total)
        total.div_(self._shards)
        future: Future[Tensor] = Future()
        future.set_result(total)
        return future
