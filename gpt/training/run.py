"""Train the model; start it through torchrun to use several processes. The checkpoint is the same for any number."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt.core.cli import log, report
from gpt.core.errors import UserError
from gpt.core.files import prepare_output, sha256_file, write_metrics
from gpt.data.dataset import check_lengths
from gpt.data.token_files import TokenData
from gpt.model.baselines import make_model
from gpt.model.checkpoint import Checkpoint
from gpt.model.config import ModelConfig
from gpt.model.device import choose_device, slow_in_bfloat16
from gpt.model.gpt import count_parameters
from gpt.training.distributed import Group, env_rank, process_group
from gpt.training.history import History, Record
from gpt.training.init_checkpoint import load_init_checkpoint
from gpt.training.overfitting import find_overfitting
from gpt.training.progress import ProgressReporter
from gpt.training.run_folder import RunFolder
from gpt.training.trainer import Trainer, TrainParams, seed_of

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Outputs:
    """Where a training run leaves its results."""

    checkpoint: Path
    metrics: Path
    history: Path
    validation: Path


def train(
    *,
    params: TrainParams,
    model: ModelConfig,
    data: TokenData,
    made_of: dict[str, Any],
    outputs: Outputs,
    folder: RunFolder,
    timeout_s: int,
) -> None:
    """Train a model, continuing from the run folder's newest state, and write the outputs.

    Args:
        made_of: the digests of everything that decides the result; a state of other digests is not continued.
        timeout_s: seconds after which a rank that does not answer ends the job.

    Raises:
        UserError: an output cannot be written, the text is too short, no GPU where one is demanded, or the training
            blew up.
    """
    check_lengths(data, block_size=model.block_size)
    device = choose_device(params.device, "train.device")
    if env_rank() == 0:
        for path in (*vars(outputs).values(), folder.history.path):
            prepare_output(path)
    with (
        ExitStack() as stack,
        process_group(device, timeout_s=timeout_s, before=lambda: stack.enter_context(folder.locked(report))) as group,
    ):
        _check_ranks(group, params.shards, made_of)
        torch.manual_seed(seed_of(params.seed))
        first = make_model(model, data.meta.vocab_size)
        if params.init_from:
            first.load_state_dict(dict(load_init_checkpoint(Path(params.init_from), model, data.tokenizer).weights))
        trainer = Trainer(params, first, data, group)
        _continue_or_begin(trainer, folder, made_of)
        if group.is_main and params.precision == "bfloat16" and slow_in_bfloat16(device):
            report("this CPU has no instructions for bfloat16: float32 will be faster (-S train.precision=float32)")
        to_do = trainer.progress.step < params.max_steps
        seen = (
            ProgressReporter(params.max_steps, trainer.progress.step, folder.history)
            if group.is_main and to_do
            else _ignore
        )
        with _polite_signals() as asked_to_stop:
            trainer.run(folder, made_of, seen, asked_to_stop)
            if group.is_main:
                _write(trainer, outputs, folder.history)


def _check_ranks(group: Group, shards: int, made_of: dict[str, Any]) -> None:
    """Refuse a number of ranks that cannot share the shards, and ranks that would train something else."""
    if group.size > shards or group.size & (group.size - 1):
        raise UserError(
            f"train: expected 1, 2, 4, … processes, at most train.shards ({shards}), found {group.size}; "
            "set launch.processes"
        )
    difference = _difference(group.broadcast(made_of), made_of)
    if difference:
        raise UserError(
            f"train: expected the params, tokens and code of rank 0 on every rank, found on rank {group.rank}: "
            f"{'; '.join(difference)}; give both machines the same files"
        )


def _difference(theirs: Any, mine: Any, path: str = "") -> list[str]:
    """Field by field, what differs in two trees of plain values."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = sorted(theirs.keys() | mine.keys())
        return [line for key in keys for line in _difference(theirs.get(key), mine.get(key), f"{path}.{key}")]
    return [] if theirs == mine else [f"{path.lstrip('.')} {str(mine)[:16]} instead of {str(theirs)[:16]}"]


def _continue_or_begin(trainer: Trainer, folder: RunFolder, made_of: dict[str, Any]) -> None:
    """Take up the newest resume state, which rank 0 alone can read, on all ranks; without one, start at step 0."""
    first = trainer.group.is_main
    found = folder.newest(made_of, report) if first else None
    state = trainer.group.broadcast(found)
    if state:
        trainer.restore(*state)
    if first:
        folder.history.resume(trainer.progress.step)
        if state:
            report(f"continuing after step {trainer.progress.step:,}")
        log.info(
            "%s parameters, %d process(es) on %s",
            f"{count_parameters(trainer.model):,}",
            trainer.group.size,
            trainer.group.device.type,
        )


def _write(trainer: Trainer, outputs: Outputs, history: History) -> None:
    """Write checkpoint, history and figures under their final names.

    The last state stays: whoever started this may be killed before it has taken the results over.
    """
    progress, meta = trainer.progress, trainer.data.meta
    about = {
        "train": trainer.params.model_dump(),
        "corpus_sha256": meta.corpus_sha256,
        "step": progress.best_step,
        "val_loss": progress.best_loss,
    }
    Checkpoint(trainer.model.config, trainer.data.tokenizer, trainer.best, about).save(outputs.checkpoint)
    history.write_csv(outputs.history, outputs.validation)
    assert progress.best_loss is not None  # the last step, at the latest, is an evaluation
    train_loss = {record.step: record.train_loss for record in history.records}[progress.best_step]
    figures = {
        "train_loss": train_loss,
        "val_loss": progress.best_loss,
        "best_step": progress.best_step,
        "parameters": count_parameters(trainer.model),
    }
    write_metrics(outputs.metrics, figures)
    steps = f"step {progress.best_step:,} of {progress.step:,}"
    report(f"validation loss {progress.best_loss:.4f} at {steps} -> {outputs.checkpoint}")
    if found := find_overfitting(history.records):
        report(str(found))
    log.info("checkpoint SHA-256 %s", sha256_file(outputs.checkpoint))


@contextmanager
def _polite_signals() -> Iterator[Callable[[], bool]]:
    """Instead of ending at once, note that SIGTERM (also Slurm's, before it takes the node away) or Ctrl-C came."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda got, _: came.append(got)) for number in STOP_SIGNALS}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(_record: Record) -> None:
    """The other ranks keep still."""
