"""The training loop: a step, the evaluation, and the state from which a killed run resumes."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gpt.core.errors import StoppedError, UserError
from gpt.core.params import Count, InitSection, PositiveFloat, Seed
from gpt.data.dataset import evaluation_windows, random_windows, shuffled_windows
from gpt.data.loss import Batch, token_losses
from gpt.data.token_files import TokenData
from gpt.model.gpt import LanguageModel, next_token_loss
from gpt.training.distributed import Group, ShardedModel
from gpt.training.ema import WeightAverage
from gpt.training.history import Record
from gpt.training.optimizer import OptimizerParams, learning_rate_at, make_optimizers
from gpt.training.run_folder import RunFolder

MAX_LOSS = 10  # times the loss of a uniform prediction; above it the training has diverged
EVALUATION_TOKENS = 2048  # in a batch; a constant, since the batch size changes the bits of the loss


class TrainParams(OptimizerParams, InitSection):
    """The section `train`."""

    batch_size: int = Field(ge=1, le=1 << 16)
    windows: Literal["shuffled", "random"]
    weight_average: float = Field(ge=0, lt=1)
    grad_clip: PositiveFloat
    precision: Literal["float32", "bfloat16"]
    compile: bool
    log_interval: Count
    eval_interval: Count
    save_interval: Count
    seed: Seed
    shards: int = Field(ge=1, le=1024)
    device: Literal["auto", "cpu", "cuda"]

    @model_validator(mode="after")
    def _shards_divide_the_batch(self) -> "TrainParams":
        if self.shards & (self.shards - 1):
            raise ValueError(f"shards: expected a power of two, found {self.shards}; take 1, 2, 4, 8, …")
        if self.batch_size % self.shards:
            raise ValueError(
                f"batch_size: expected a multiple of shards ({self.shards}), found {self.batch_size}; change one"
            )
        return self


@dataclass
class Progress:
    """The plain values of a resume state."""

    step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    losses_since_record: list[float] = field(default_factory=list)


class Trainer:
    """One training run on this rank: model, optimizers and progress."""

    def __init__(self, params: TrainParams, model: LanguageModel, data: TokenData, group: Group) -> None:
        self.params = params
        self.model = model.to(group.device)
        self.data = data
        self.group = group
        self.progress = Progress()
        self.average = WeightAverage(self.model, params.weight_average) if params.weight_average else None
        self.best = _copy(self.model.state_dict())
        if params.compile:
            self.model.compile()  # in place: keeps the names of the weights
        self._sharded = ShardedModel(self.model, group, params.shards)
        self.optimizers = make_optimizers(params, self.model, group)
        block_size = model.config.block_size
        self._val_batches = evaluation_windows(
            data, block_size=block_size, batch_size=max(1, EVALUATION_TOKENS // block_size)
        )

    def run(
        self,
        folder: RunFolder,
        digests: dict[str, object],
        on_record: Callable[[Record], None],
        should_stop: Callable[[], bool],
    ) -> None:
        """Train to the last step; rank 0 writes the history and the resume states and calls `on_record`.

        Raises:
            StoppedError: `should_stop` was true on one of the ranks; the state of the last step is saved.
        """
        params, progress = self.params, self.progress
        started, started_after = time.monotonic(), progress.step
        while progress.step < params.max_steps:
            rate, grad_norm, stop = self.train_step(should_stop())
            step = progress.step
            last = step == params.max_steps
            steps_per_second = (step - started_after) / (time.monotonic() - started)
            val_loss = self.evaluate() if last or step % params.eval_interval == 0 else None
            if val_loss is not None or step % params.log_interval == 0:
                train_loss = sum(progress.losses_since_record) / len(progress.losses_since_record)
                progress.losses_since_record.clear()
                if self.group.is_main:
                    speed = steps_per_second * params.batch_size * self.model.config.block_size
                    record = Record(step, train_loss, val_loss, rate, grad_norm, round(time.time(), 3), speed)
                    folder.history.append(record)
                    on_record(record)
                started, started_after = time.monotonic(), step
            if (stop or last or step % params.save_interval == 0) and self.group.is_main:
                folder.save(step, *self.state(digests))
            if stop and not last:
                raise StoppedError(f"stopped after step {step:,} of {params.max_steps:,}; run again to continue")

    def train_step(self, stop: bool = False) -> tuple[float, float, bool]:
        """Make one step; `stop` is whether this rank wants to stop after it.

        Returns:
            The learning rate, the norm of the gradient before clipping, and whether any rank wants to stop.

        Raises:
            UserError: the loss or the gradient is not finite, or the loss exploded.
        """
        self.progress.step += 1
        rate = learning_rate_at(self.progress.step, self.params)
        self.model.train()
        losses_of_rank = self._sharded.backward(self._loss_of_shard)
        *losses, stops = self.group.sum([*losses_of_rank, float(stop)])  # one collective for both
        loss = sum(losses) / len(losses)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.params.grad_clip))
        self._check_sanity(loss, norm)
        self._update_weights(rate)
        self.progress.losses_since_record.append(loss)
        return rate, norm, stops > 0

    def evaluate(self) -> float:
        """Return the loss of the (averaged) weights on the validation split; keep the weights if it is the best.

        Raises:
            UserError: the loss is not finite.
        """
        sums = [0.0] * len(self._val_batches)
        mine = slice(self.group.rank, None, self.group.size)
        with self.average.in_use() if self.average else nullcontext(), self._precision():
            losses = (token_losses(self.model, [batch], self.group.device) for batch in self._val_batches[mine])
            sums[mine] = [float(losses_of_batch.sum()) for (losses_of_batch,) in losses]
        loss = sum(self.group.sum(sums)) / len(self.data.val)
        if not math.isfinite(loss):
            raise self._diverged(f"a finite validation loss, found {loss}")
        if self.progress.best_loss is None or loss < self.progress.best_loss:
            self.progress.best_step, self.progress.best_loss = self.progress.step, loss
            self.best = _copy(self.average.weights if self.average else self.model.state_dict())
        return loss

    def state(self, digests: dict[str, object]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything in a resume state: metadata as plain values, and tensors."""
        return {"digests": digests, "progress": asdict(self.progress)}, {
            "weights": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "best": self.best,
            "average": self.average.weights if self.average else {},
        }

    def restore(self, metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.progress = Progress(**metadata["progress"])
        self.model.load_state_dict(tensors["weights"])
        for optimizer, state in zip(self.optimizers, tensors["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.best = tensors["best"]
        if self.average:
            self.average.restore(tensors["average"])

    def _update_weights(self, rate: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * (rate / self.params.learning_rate)
            optimizer.step()
        if self.average:
            self.average.update(self.progress.step)

    def _check_sanity(self, loss: float, norm: float) -> None:
        limit = MAX_LOSS * math.log(self.data.meta.vocab_size)
        if not (math.isfinite(norm) and loss < limit):
            raise self._diverged(
                f"a loss below {limit:.0f} and a finite gradient, found loss {loss:.3g}, gradient {norm:.3g}"
            )

    def _diverged(self, problem: str) -> UserError:
        return UserError(
            f"train: step {self.progress.step}: expected {problem}: the training diverged; earlier resume states are "
            "kept; lower train.learning_rate or train.grad_clip, or raise train.warmup_steps"
        )

    def _loss_of_shard(self, model: nn.Module, shard: int) -> Tensor:
        torch.manual_seed(seed_of(self.params.seed, self.progress.step, shard))  # for random windows and dropout
        inputs_BT, targets_BT = (tensor.to(self.group.device) for tensor in self._windows_of_shard(shard))
        with self._precision():
            logits_BTV = model(inputs_BT)
        return next_token_loss(logits_BTV, targets_BT)

    def _precision(self) -> AbstractContextManager[None]:
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.params.precision == "bfloat16")

    def _windows_of_shard(self, shard: int) -> Batch:
        params, block_size = self.params, self.model.config.block_size
        count = params.batch_size // params.shards
        if params.windows == "random":
            return random_windows(self.data.train, count=count, block_size=block_size)
        first = (self.progress.step - 1) * params.batch_size + shard * count
        return shuffled_windows(self.data.train, first=first, count=count, block_size=block_size, seed=params.seed)


def seed_of(*parts: int) -> int:
    """Hash several numbers to a 63-bit seed; neighbouring numbers give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def _copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().clone() for name, weight in weights.items()}
