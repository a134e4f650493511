"""Data parallelism: the process group, and gradients whose bits do not depend on the number of ranks.

The global batch is split into a fixed number of shards. A rank computes its shards one after the other; gradients are
summed in one fixed binary tree whose leaves are the shards, whichever rank holds which. Floating-point addition is
commutative but not associative, so a fixed tree gives equal bits for 1, 2, 4, … ranks.
"""

import io
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket, HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from gpt.core.errors import OneLineError, UserError
from gpt.fast_import import no_collections
from gpt.training.all_reduce import Peer, connect_peer
from gpt.training.parent import end_with_parent

BUCKET_MB = 25  # few large messages: each waits for the slower rank
FOREVER = timedelta(days=365)
STORE_TIMEOUT_S = 5  # once a rank is lost
PROCESS_1 = Path("/proc/1/cmdline")  # Linux only


class LostRankError(OneLineError):
    """Another rank died or does not answer."""


@dataclass(frozen=True)
class Group:
    """The ranks of one training run, as seen by this one; every rank has to call the collective methods."""

    rank: int
    size: int
    device: torch.device
    timeout_s: int
    store: Store
    names: list[str]
    peers: list[Peer] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files and prints."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum the tensors of all ranks, in place, in a fixed binary tree: all ranks get the same bits."""
        for peer in self.peers:
            with self.collective(peer.rank):
                peer.all_reduce(tensor)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum equally long lists of all ranks by element, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.all_reduce(total)
        return total.tolist()

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
        """Return rank 0's value on every rank: plain values and tensors on the CPU.

        `broadcast_object_list` would unpickle, and so run, whatever the other end of the connection sends.
        """
        file = io.BytesIO()
        if self.is_main:
            torch.save(value, file)
        length = torch.tensor([file.tell()], device=self.device)
        with self.collective():
            dist.broadcast(length, src=0)
        content = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.is_main:
            content.copy_(torch.frombuffer(file.getbuffer(), dtype=torch.uint8))
        with self.collective():
            dist.broadcast(content, src=0)
        return torch.load(io.BytesIO(content.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)

    @contextmanager
    def collective(self, peer: int | None = None) -> Iterator[None]:
        """Turn the failure of a collective operation, or of an exchange with one peer, into a LostRankError.

        Torch raises a plain RuntimeError for a lost rank, so the block must contain nothing but the operation.
        """
        try:
            yield
        except (RuntimeError, OSError) as error:
            if self.size == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            lost = self._lost_rank(peer)
            raise LostRankError(
                f"{lost} died, or did not answer within {self.timeout_s} s; run again to continue"
            ) from error

    def _lost_rank(self, peer: int | None) -> str:
        """Name the rank that is lost; the first rank to notice tells the others, which would else name that one."""
        others = [*range(self.rank), *range(self.rank + 1, self.size)]
        lost = [" or ".join(self.names[rank] for rank in (others if peer is None else [peer]))]

        def tell() -> None:
            with suppress(RuntimeError):
                lost.append(self.store.compare_set("lost", "", lost[0]).decode())

        thread = threading.Thread(target=tell, daemon=True)  # blocks if the machine of the store cannot be reached
        thread.start()
        thread.join(STORE_TIMEOUT_S)
        return lost[-1]


def env_rank() -> int:
    """This process's rank as torchrun set it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def env_size() -> int:
    """The number of ranks as torchrun set it; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def env_local_rank() -> int:
    """This process's rank among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def env_local_size() -> int:
    """The number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def process_group(
    device: torch.device, *, timeout_s: int, before_joining: Callable[[], None] = lambda: None
) -> Iterator[Group]:
    """Join the process group that torchrun started, of 1, 2, 4, … ranks; without torchrun, a group of one.

    Args:
        timeout_s: seconds after which a rank that does not answer counts as lost: a LostRankError.
        before_joining: called on rank 0 (to wait for a lock); the other ranks wait for it without a limit.
    """
    _die_with_torchrun()
    store, rank, size, timeout = _store(), env_rank(), env_size(), timedelta(seconds=timeout_s)
    group = Group(rank, size, device, timeout_s, store, [f"rank {number}" for number in range(size)])
    if group.is_main:
        before_joining()
    store.set(group.names[rank], f"PID {os.getpid()} on {socket.gethostname()}")
    store.wait(["rank 0"], FOREVER)
    lost = False
    try:
        with group.collective():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        group.names[:] = [f"{name} ({store.get(name).decode()})" for name in group.names]
        for level in range(size.bit_length() - 1):
            peer = rank ^ (1 << level)
            with group.collective(peer):
                # A higher level waits longer: the lost rank's own peer gives up before those that wait for that peer.
                group.peers.append(connect_peer(store, rank, peer, device, timeout * (level + 1)))
        yield group
    except LostRankError:
        lost = True
        raise
    finally:
        for connected in group.peers:
            connected.close()
        if not lost:  # else destroy_process_group could wait for the lost rank
            dist.destroy_process_group()


def _die_with_torchrun() -> None:
    """End this process when torchrun is killed, whose workers would live on."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGKILL)
        if os.getppid() == 1 and not (PROCESS_1.exists() and b"torch" in PROCESS_1.read_bytes()):
            sys.exit(1)  # torchrun died before the line above (in a container it may itself be process 1)


def _store() -> Store:
    """The key-value store of the job: torchrun's, or one that rank 0 hosts."""
    if "WORLD_SIZE" not in os.environ:  # without torchrun
        return HashStore()
    if missing := {"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        names = " and ".join(sorted(missing))
        raise UserError(f"{names}: expected beside WORLD_SIZE, found nothing; start the training by torchrun")
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
        self._pending: list[tuple[int, dict[Tensor, Tensor]]] = []  # (level, gradients): subtrees without a right half
        ids = [group.device.index] if group.device.type == "cuda" else None
        # DDP compares the shapes and broadcasts rank 0's weights; it imports torch's compiler, used or not.
        with group.collective(), no_collections():
            self._ddp = DistributedDataParallel(model, device_ids=ids, bucket_cap_mb=bucket_mb)
        # Buffers are constants. Torch 2.13 deprecates the constructor's argument.
        self._ddp.broadcast_buffers = False
        self._ddp.register_comm_hook(None, self._sum_bucket)

    def backward(self, loss_of_shard: Callable[[nn.Module, int], Tensor]) -> list[float]:
        """Leave the mean gradient over all shards in every parameter's `.grad`.

        Args:
            loss_of_shard: called with the model and a shard's number; returns the shard's mean loss, a scalar.

        Returns:
            The losses by shard; zero for the shards of other ranks.
        """
        losses = torch.zeros(self._shards, device=self._group.device)
        count = self._shards // self._group.size  # consecutive shards, so that they form a subtree
        first = self._group.rank * count
        for shard in range(first, first + count):
            last = shard == first + count - 1
            self._ddp.zero_grad(set_to_none=True)  # else a shard's gradient would include the one before
            with nullcontext() if last else self._ddp.no_sync():
                loss = loss_of_shard(self._ddp, shard)
                loss.backward()  # type: ignore[no-untyped-call]
            if not last:
                self._push({weight: weight.grad for weight in self._ddp.parameters() if weight.grad is not None})
            losses[shard] = loss.detach()
        self._pending.clear()
        return losses.tolist()

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
