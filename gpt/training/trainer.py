"""The training loop: one step, the evaluation between steps, the state that a killed run continues from."""

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
from gpt.data.dataset import evaluation_windows, random_windows, shuffled_windows
from gpt.data.loss import Batch, token_losses
from gpt.data.token_files import TokenData
from gpt.model.gpt import LanguageModel, next_token_loss
from gpt.training.distributed import Group, ShardedModel
from gpt.training.ema import WeightAverage
from gpt.training.history import Record
from gpt.training.optimizer import OptimizerParams, learning_rate_at, make_optimizers
from gpt.training.run_folder import RunFolder

EXPLODED = 10  # times the loss of guessing
EVALUATION_TOKENS = 2048  # a batch of the evaluation between steps: part of the bits, so no parameter of the machine


class TrainParams(OptimizerParams):
    """The section `train`."""

    batch_size: int = Field(ge=1)
    windows: Literal["shuffled", "random"]
    init_from: str | None = Field(min_length=1)
    weight_average: float = Field(ge=0, lt=1)
    grad_clip: float = Field(gt=0)
    precision: Literal["float32", "bfloat16"]
    compile: bool
    log_interval: int = Field(ge=1)
    eval_interval: int = Field(ge=1)
    save_interval: int = Field(ge=1)
    seed: int = Field(ge=0)
    shards: int = Field(ge=1)
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
    """How far a run is, beside weights and optimizer: plain values that a resume state holds."""

    step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    losses_since_record: list[float] = field(default_factory=list)


class Trainer:
    """One training run on this rank: the model, its optimizer, and how far they are."""

    def __init__(self, params: TrainParams, model: LanguageModel, data: TokenData, group: Group) -> None:
        self.params = params
        self.model = model.to(group.device)
        self.data = data
        self.group = group
        self.progress = Progress()
        self.average = WeightAverage(self.model, params.weight_average) if params.weight_average else None
        self.best = _copy(self.model.state_dict())
        if params.compile:
            self.model.compile()  # in place: the names of the weights stay
        self._sharded = ShardedModel(self.model, group, params.shards)
        self.optimizers = make_optimizers(params, self.model, group)
        block = model.config.block_size
        batch_size = max(1, EVALUATION_TOKENS // block)
        self._val_batches = evaluation_windows(data, block_size=block, batch_size=batch_size)

    def run(
        self,
        folder: RunFolder,
        digests: dict[str, object],
        seen: Callable[[Record], None],
        asked_to_stop: Callable[[], bool],
    ) -> None:
        """Train to the last step; the first rank keeps the history and the resume states, and calls `seen`.

        Raises:
            StoppedError: one of the ranks was asked to stop; the state of the last step is saved.
        """
        params, progress = self.params, self.progress
        began, tokens = time.monotonic(), 0
        while progress.step < params.max_steps:
            rate, norm, stop = self.train_step(asked_to_stop())
            step = progress.step
            tokens += params.batch_size * self.model.config.block_size
            last = step == params.max_steps
            seconds = time.monotonic() - began
            val_loss = self.evaluate() if last or step % params.eval_interval == 0 else None
            if val_loss is not None or step % params.log_interval == 0:
                train_loss = sum(progress.losses_since_record) / len(progress.losses_since_record)
                progress.losses_since_record.clear()
                if self.group.is_main:
                    record = Record(step, train_loss, val_loss, rate, norm, round(time.time(), 3), tokens / seconds)
                    folder.history.append(record)
                    seen(record)
                began, tokens = time.monotonic(), 0
            if (stop or last or step % params.save_interval == 0) and self.group.is_main:
                folder.save(step, *self.state(digests))
            if stop and not last:
                raise StoppedError(f"stopped after step {step:,} of {params.max_steps:,}; run again to continue")

    def train_step(self, stop: bool = False) -> tuple[float, float, bool]:
        """Make one step.

        Args:
            stop: whether this rank was asked to stop after the step.

        Returns:
            The learning rate of the step, the norm of its gradient before clipping, and whether any rank has to stop.

        Raises:
            UserError: the loss or the gradient is no number any more, or the loss exploded.
        """
        self.progress.step += 1
        params, step = self.params, self.progress.step
        rate = learning_rate_at(step, params)
        self.model.train()
        mine = self._sharded.backward(self._loss_of_shard)
        everyone = self.group.all_gather([*mine, float(stop)])
        stops = everyone[len(mine) :: len(mine) + 1]
        del everyone[len(mine) :: len(mine) + 1]
        loss = sum(everyone) / len(everyone)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), params.grad_clip))
        self._check_sanity(loss, norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * (rate / params.learning_rate)
            optimizer.step()
        if self.average:
            self.average.update(step)
        self.progress.losses_since_record.append(loss)
        return rate, norm, any(stops)

    def evaluate(self) -> float:
        """The loss of the average, if there is one, on the whole validation split; keeps the best weights.

        The ranks share out the batches.
        """
        mine = self._val_batches[self.group.rank :: self.group.size]
        with self.average.in_use() if self.average else nullcontext(), self._precision():
            sums = [float(batch.sum()) for batch in token_losses(self.model, mine, self.group.device)]
        rounds = -(-len(self._val_batches) // self.group.size)
        everyone = self.group.all_gather(sums + [0.0] * (rounds - len(sums)))
        in_order = [everyone[rank * rounds + turn] for turn in range(rounds) for rank in range(self.group.size)]
        loss = sum(in_order) / len(self.data.val)
        if self.progress.best_loss is None or loss < self.progress.best_loss:
            self.progress.best_step, self.progress.best_loss = self.progress.step, loss
            self.best = _copy(self.average.weights if self.average else self.model.state_dict())
        return loss

    def state(self, digests: dict[str, object]) -> tuple[dict[str, Any], dict[str, Any]]:
        """All that a resume state holds: plain values, and tensors."""
        return {"digests": digests, "progress": asdict(self.progress)}, {
            "weights": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "best": self.best,
            "average": self.average.weights if self.average else {},
        }

    def restore(self, metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        """Continue from a state that `state` described."""
        self.progress = Progress(**metadata["progress"])
        self.model.load_state_dict(tensors["weights"])
        for optimizer, state in zip(self.optimizers, tensors["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.best = tensors["best"]
        if self.average:
            self.average.restore(tensors["average"])

    def _check_sanity(self, loss: float, norm: float) -> None:
        limit = EXPLODED * math.log(self.data.meta.vocab_size)
        if not (math.isfinite(norm) and loss < limit):
            raise UserError(
                f"train: step {self.progress.step}: expected a loss below {limit:.0f} and a finite gradient, found "
                f"loss {loss:.3g}, gradient {norm:.3g}: the training blew up, the states saved before are kept; "
                "lower train.learning_rate or train.grad_clip, or raise train.warmup_steps"
            )

    def _loss_of_shard(self, model: nn.Module, shard: int) -> Tensor:
        torch.manual_seed(seed_of(self.params.seed, self.progress.step, shard))  # of random windows and of dropout
        inputs_BT, targets_BT = self._windows_of_shard(shard)
        device = self.group.device
        with self._precision():
            logits_BTV = model(inputs_BT.to(device))
        return next_token_loss(logits_BTV, targets_BT.to(device))

    def _precision(self) -> AbstractContextManager[None]:
        mixed = self.params.precision == "bfloat16"
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=mixed)

    def _windows_of_shard(self, shard: int) -> Batch:
        params, block_size = self.params, self.model.config.block_size
        count = params.batch_size // params.shards
        if params.windows == "random":
            return random_windows(self.data.train, count=count, block_size=block_size)
        first = (self.progress.step - 1) * params.batch_size + shard * count
        return shuffled_windows(self.data.train, first=first, count=count, block_size=block_size, seed=params.seed)


def seed_of(*parts: int) -> int:
    """One 63-bit seed from several numbers; neighbouring numbers give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def _copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().clone() for name, weight in weights.items()}
