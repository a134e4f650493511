"""Data parallelism: the process group, and gradients whose bits do not depend on the number of ranks.

The global batch is split into a fixed number of shards. A rank computes its shards one after the other; gradients are
summed in one fixed binary tree whose leaves are the shards, whichever rank holds which. Floating-point addition is
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
from torch.distributed import GradBucket, HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from gpt.training.all_reduce import Peer, connect_peers
from gpt.training.heartbeat import Heartbeat, LostRankError

BUCKET_MB = 25  # few large messages: each waits for the slower rank
FOREVER = timedelta(days=365)
PR_SET_PDEATHSIG = 1  # from Linux's <sys/prctl.h>


@dataclass(frozen=True)
class Group:
    """The ranks of one training run, as seen by this one; every rank has to call the collective methods."""

    rank: int
    size: int
    device: torch.device
    heartbeat: Heartbeat
    peers: Sequence[Peer]

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files and prints."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum the tensors of all ranks, in place, in a fixed binary tree: all ranks get the same bits."""
        for peer in self.peers:
            with self.heartbeat.collective():
                peer.all_reduce(tensor)

    def all_gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return the values of every rank, by rank; all ranks give equally many."""
        by_rank = torch.zeros(self.size, len(values), dtype=torch.float64, device=self.device)
        by_rank[self.rank] = torch.tensor(values, dtype=torch.float64)
        self.all_reduce(by_rank)  # adding zeros changes no bit
        return by_rank.tolist()

    def all_gather_parts(self, tensors: Sequence[Tensor]) -> None:
        """Complete tensors, in place, of which each rank has computed other elements and set the rest to zero.

        The bytes are summed as integers, so that every value arrives with its bits, -0.0 too.
        """
        if self.size == 1:
            return
        content = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])
        self.all_reduce(content)
        parts = torch.split(content, [tensor.nbytes for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.dtype).view_as(tensor))

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank: plain values and tensors, the latter on the CPU."""
        file = io.BytesIO()
        if self.is_main:
            torch.save(value, file)
        length = torch.tensor([file.tell()], device=self.device)
        with self.heartbeat.collective():
            dist.broadcast(length, src=0)
        content = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.is_main:
            content.copy_(torch.frombuffer(file.getbuffer(), dtype=torch.uint8))
        with self.heartbeat.collective():
            dist.broadcast(content, src=0)
        return torch.load(io.BytesIO(content.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)


def env_rank() -> int:
    """This process's rank as torchrun set it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def process_group(
    device: torch.device, *, timeout_s: int, before_joining: Callable[[], None] = lambda: None
) -> Iterator[Group]:
    """Join the process group that torchrun started; without torchrun, a group of one.

    Args:
        timeout_s: seconds after which a rank that does not answer counts as lost.
        before_joining: called on rank 0 (to wait for a lock); the other ranks wait for it without a limit.

    Raises:
        LostRankError: another rank died or hangs.
    """
    _die_with_torchrun()
    rank, size, timeout = env_rank(), int(os.environ.get("WORLD_SIZE", "1")), timedelta(seconds=timeout_s)
    store = _store()
    if rank == 0:
        before_joining()
        store.set("rank 0 is ready", "yes")
    store.wait(["rank 0 is ready"], FOREVER)
    backend = "nccl" if device.type == "cuda" else "gloo"
    heartbeat = Heartbeat(store, rank, size, timeout_s)
    peers: list[Peer] = []
    try:
        with heartbeat.collective():
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        with heartbeat.collective():
            peers = connect_peers(rank, size, device, store, timeout)
        yield Group(rank, size, device, heartbeat, peers)
    except LostRankError:
        raise  # without destroy_process_group, which could wait for the lost rank
    except BaseException:
        dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()
    finally:
        for peer in peers:
            peer.close()
        heartbeat.stop()


def _die_with_torchrun() -> None:
    """Make the kernel kill this process when torchrun is killed, whose workers would live on (Linux only)."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1 and b"torch" not in Path("/proc/1/cmdline").read_bytes():
            sys.exit(1)  # torchrun died before the line above (in a container it may itself be process 1)


def _store() -> Store:
    """The key-value store of the job: torchrun's, or one that rank 0 hosts."""
    if "MASTER_ADDR" not in os.environ:
        return HashStore()
    hosted_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not hosted_by_torchrun and env_rank() == 0,
        timeout=FOREVER,
    )
    return PrefixStore(f"chargpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class ShardedModel:
    """A model under DistributedDataParallel whose gradients are summed in the fixed tree."""

    def __init__(self, model: nn.Module, group: Group, shards: int, *, bucket_mb: float = BUCKET_MB) -> None:
        self._shards = shards
        self._group = group
        self._steps = 0
        self._pending: list[tuple[int, dict[Tensor, Tensor]]] = []  # (level, gradients): subtrees without a right half
        ids = [group.device.index] if group.device.type == "cuda" else None
        with group.heartbeat.collective():  # DDP compares the shapes and broadcasts rank 0's weights
            self._ddp = DistributedDataParallel(model, device_ids=ids, bucket_cap_mb=bucket_mb)
        self._ddp.broadcast_buffers = False  # buffers are constants: no collective in every forward pass
        self._ddp.register_comm_hook(None, self._sum_bucket)

    def backward(self, loss_of_shard: Callable[[nn.Module, int], Tensor]) -> list[float]:
        """Leave the mean gradient over all shards in every parameter's `.grad`.

        Args:
            loss_of_shard: called with the model and a shard's number; returns the shard's mean loss, a scalar.

        Returns:
            The losses of this rank's shards, in their order.
        """
        losses: list[Tensor] = []
        count = self._shards // self._group.size  # consecutive shards, so that they form a subtree
        for shard in range(self._group.rank * count, (self._group.rank + 1) * count):
            last = len(losses) == count - 1
            self._ddp.zero_grad(set_to_none=True)  # else a shard's gradient would include the one before
            # DDP broadcasts the new order of its buckets before the first forward pass of the second step.
            reorders = self._steps == 1 and not losses
            with nullcontext() if last else self._ddp.no_sync():
                with self._group.heartbeat.collective() if reorders else nullcontext():
                    loss = loss_of_shard(self._ddp, shard)
                loss.backward()  # type: ignore[no-untyped-call]
            if not last:
                self._push({weight: weight.grad for weight in self._ddp.parameters() if weight.grad is not None})
            losses.append(loss.detach())
        self._pending.clear()
        self._steps += 1
        return [float(loss) for loss in losses]

    def _push(self, gradients: dict[Tensor, Tensor]) -> None:
        """Add a leaf to the tree and merge subtrees of equal level, as a binary counter carries."""
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
