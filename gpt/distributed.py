"""All that knows torch.distributed: the group of ranks, and gradients whose bits do not depend on how many there are.

The global batch is cut into a fixed number of shards. A rank computes its shards one after the other; gradients are
summed in one fixed binary tree whose leaves are the shards, whatever rank holds which. Floating-point addition is
commutative but not associative, so a fixed tree gives equal bits for 1, 2, 4, … ranks.
"""

import ctypes
import io
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
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

from gpt.errors import OneLineError

BUCKET_MB = 25  # on loopback a message costs about 2 ms whatever its size, so few large ones
FOREVER = timedelta(days=365)
PULSE_S = 1
PULSE_ANSWER_S = 5
PR_SET_PDEATHSIG = 1  # number of Linux's prctl


class LostRankError(OneLineError):
    """Another rank of the group died or does not answer."""


class Pulse:
    """Tells the other ranks how far this one has come, so that they can name the one that hangs.

    A rank counts the exchanges that it reached. A thread brings the count to the common store every second, which
    costs the training nothing.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store = store.clone() if size > 1 else store  # type: ignore[attr-defined]
        self._rank, self._size = rank, size
        self._count = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._report_for_ever, daemon=True)
        if size > 1:
            self._store.set_timeout(timedelta(seconds=PULSE_ANSWER_S))
            self._thread.start()

    def beat(self) -> None:
        """Count one exchange that this rank has reached."""
        self._count += 1

    def stop(self) -> None:
        """End the thread: one that is inside torch while Python shuts down aborts the process."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(PULSE_ANSWER_S)

    def diagnosis(self, timeout_s: int) -> str:
        """Say which ranks fell behind, and end those on this machine, which nothing else would."""
        reached = {}
        with suppress(RuntimeError):  # the store lies on a machine that is out of reach
            self._report()
            for rank in range(self._size):
                count, host, pid = self._store.get(f"pulse {rank}").decode().split()
                reached[rank] = int(count), host, int(pid)
        behind = {rank: who for rank, who in reached.items() if who[0] < self._count}
        for _, host, pid in behind.values():
            if host == socket.gethostname():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        names = ", ".join(f"rank {rank} (PID {pid} on {host})" for rank, (_, host, pid) in behind.items())
        missing = names or f"a rank other than {self._rank}"
        return f"{missing} died, or did not answer within {timeout_s} s; run again to continue"

    def _report(self) -> None:
        self._store.set(f"pulse {self._rank}", f"{self._count} {socket.gethostname()} {os.getpid()}")

    def _report_for_ever(self) -> None:
        with suppress(RuntimeError):  # the store is gone, and soon this process
            self._report()
            while not self._stopped.wait(PULSE_S):
                self._report()


@dataclass(frozen=True)
class Group:
    """The ranks of one training run and this process's place among them."""

    rank: int
    size: int
    device: torch.device
    pulse: Pulse
    timeout: timedelta

    @property
    def first(self) -> bool:
        """Whether this is the one rank that writes files and speaks."""
        return self.rank == 0

    def shards_of_rank(self, shards: int) -> range:
        """The shards that this rank computes: a run of neighbours, so that a subtree lies on one rank."""
        share = shards // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def gather(self, values: Sequence[float]) -> list[float]:
        """Put together the values of all ranks, in the order of the ranks; all give equally many."""
        everyone = torch.zeros(self.size, len(values), dtype=torch.float64, device=self.device)
        everyone[self.rank] = torch.tensor(values, dtype=torch.float64)
        self.pulse.beat()
        dist.all_reduce(everyone)  # adding zeros changes no bit, and this is faster than gloo's all_gather
        return everyone.flatten().tolist()

    def exchange(self, tensors: Sequence[Tensor]) -> None:
        """Fill in what the other ranks computed: an element that is not zero on one rank is zero on all others.

        In place. The bits are added as integers, so that they arrive as they were sent, -0.0 too.
        """
        if self.size == 1:
            return
        everything = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])
        self.pulse.beat()
        dist.all_reduce(everything)
        at = 0
        for tensor in tensors:
            bits = tensor.view(torch.uint8)
            bits.copy_(everything[at : at + bits.numel()].view_as(bits))
            at += bits.numel()

    def share(self, value: Any) -> Any:
        """Give every rank what rank 0 holds: plain values and tensors."""
        box = io.BytesIO()
        if self.first:
            torch.save(value, box)
        length = torch.tensor([box.tell()], device=self.device)
        self.pulse.beat()
        dist.broadcast(length, src=0)
        content = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.first:
            content.copy_(torch.frombuffer(box.getbuffer(), dtype=torch.uint8))
        dist.broadcast(content, src=0)
        return torch.load(io.BytesIO(content.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)


def rank_of_environment() -> int:
    """This process's rank as torchrun set it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def die_with_torchrun() -> None:
    """Ask the system to end this process when torchrun is killed: torchrun's workers would live on (Linux only)."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1 and b"torch" not in Path("/proc/1/cmdline").read_bytes():
            sys.exit(1)  # it died before the line above (in a container it may itself be process 1)


@contextmanager
def joined(device: torch.device, *, timeout_s: int, before: Callable[[], None] = lambda: None) -> Iterator[Group]:
    """Join the group that torchrun started; without torchrun, a group of one.

    Args:
        timeout_s: seconds after which a rank that does not answer ends the job.
        before: what rank 0 has to do first (wait for a lock); the others wait for it without a limit.

    Raises:
        LostRankError: another rank died or hangs.
    """
    die_with_torchrun()
    rank, size = rank_of_environment(), int(os.environ.get("WORLD_SIZE", "1"))
    store = _store()
    if rank == 0:
        before()
        store.set("rank 0 is ready", "yes")
    store.wait(["rank 0 is ready"], FOREVER)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    pulse = Pulse(store, rank, size)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        yield Group(rank, size, device, pulse, timeout)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
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
        pulse.stop()


def _store() -> Store:
    if "MASTER_ADDR" not in os.environ:
        return HashStore()
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun itself
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not hosted and rank_of_environment() == 0,
        timeout=FOREVER,
    )
    return PrefixStore(f"chargpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class ShardedModel:
    """A model under DistributedDataParallel whose gradients come out of the fixed tree."""

    def __init__(self, model: nn.Module, group: Group, shards: int, *, bucket_mb: float = BUCKET_MB) -> None:
        self._shards = shards
        self._group = group
        self._pairs = _pairs(group)
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
        for pair in self._pairs:
            self._group.pulse.beat()
            dist.all_reduce(total, group=pair)  # of two members: a + b has the same bits as b + a
        total.div_(self._shards)
        future: Future[Tensor] = Future()
        future.set_result(total)
        return future


def _pairs(group: Group) -> list[dist.ProcessGroup]:
    """This rank's two-member groups: the neighbour, then the neighbouring pair, and so on up the tree."""
    mine = []
    distance = 1
    while distance < group.size:
        for low in (rank for rank in range(group.size) if not rank & distance):
            pair = dist.new_group([low, low | distance], timeout=group.timeout)
            if group.rank in (low, low | distance):
                mine.append(pair)
        distance *= 2
    return mine
