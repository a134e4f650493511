"""A training run from its params to its outputs: resume, train, write."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpt.core.cli import log, report
from gpt.core.errors import UserError
from gpt.core.files import prepare_output, sha256_file, write_metrics
from gpt.data.dataset import check_lengths
from gpt.data.token_files import TokenData
from gpt.model.baselines import make_model
from gpt.model.checkpoint import Checkpoint, load_checkpoint
from gpt.model.config import ModelConfig
from gpt.model.device import choose_device, slow_in_bfloat16
from gpt.model.gpt import LanguageModel, count_parameters
from gpt.model.memory import Term, activations, check_memory, position_tables, weights
from gpt.tokenizers.base import Tokenizer
from gpt.training.distributed import Group, env_local_rank, env_local_size, env_rank, env_size, process_group
from gpt.training.history import History
from gpt.training.overfitting import find_overfitting
from gpt.training.progress import ProgressReporter
from gpt.training.run_folder import RunFolder
from gpt.training.trainer import EVALUATION_TOKENS, Trainer, TrainParams, seed_of

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Weights, gradients, DDP's copy of them, AdamW's two moments, the best weights, and a resume state that is written.
COPIES, COPIES_OF_AVERAGE = 11, 3
IRRELEVANT = {"dropout"}  # keys of the section model that change no weight's shape or meaning


@dataclass(frozen=True)
class Outputs:
    """The paths of a training run's results."""

    checkpoint: Path
    metrics: Path
    history: Path
    validation: Path


def train(
    *,
    params: TrainParams,
    model: ModelConfig,
    data: TokenData,
    digests: dict[str, Any],
    outputs: Outputs,
    folder: RunFolder,
    timeout_s: int,
) -> None:
    """Train a model, from the run folder's newest resume state if there is one, and write the outputs.

    Args:
        digests: of everything that determines the result; a state with other digests is skipped.
        timeout_s: seconds after which a rank that does not answer ends the job.

    Raises:
        UserError: an output cannot be written, the text is too short, the device is missing, the memory does not
            suffice, the init checkpoint does not match, or the training diverged.
        StoppedError: SIGTERM, SIGINT or SIGHUP stopped the training early.
    """
    check_lengths(data, block_size=model.block_size)
    if (size := env_size()) > params.shards or size & (size - 1):
        raise UserError(
            f"train: expected 1, 2, 4, … processes, at most train.shards ({params.shards}), found {size}; "
            "set launch.processes"
        )
    device = choose_device(params.device, "train.device")
    if env_local_rank() == 0:  # before any rank allocates: the others wait for rank 0
        processes = 1 if device.type == "cuda" else env_local_size()
        estimate = training_memory(params, model, data.meta.vocab_size, ranks=size)
        check_memory(f"training in {processes} process(es)", estimate, device, processes=processes)
    if env_rank() == 0:
        for path in (*vars(outputs).values(), folder.history.path):
            prepare_output(path)
    with ExitStack() as stack:
        lock = partial(stack.enter_context, folder.locked())
        group = stack.enter_context(process_group(device, timeout_s=timeout_s, before_joining=lock))
        _check_digests(group, digests)
        trainer = Trainer(params, _initial_model(params, model, data), data, group)
        _resume(trainer, folder, digests)
        if group.is_main and params.precision == "bfloat16" and slow_in_bfloat16(device):
            report(
                "this CPU has no instructions for bfloat16: -S train.precision=float32 will be faster, but Muon always "
                "computes in bfloat16; -S train.optimizer=adamw avoids that"
            )
        with _stop_on_signals() as should_stop:
            if trainer.progress.step < params.max_steps:
                progress = ProgressReporter(params.max_steps, trainer.progress.step, folder.history, show=group.is_main)
                trainer.run(folder, digests, progress, should_stop)
            if group.is_main:
                _write(trainer, outputs, folder.history)


def training_memory(params: TrainParams, model: ModelConfig, vocab_size: int, *, ranks: int) -> list[Term]:
    """An estimate of the memory of one rank."""
    shards = params.shards // ranks  # the gradients of log2(shards) subtrees are kept
    copies = COPIES + shards.bit_length() - 1 + COPIES_OF_AVERAGE * bool(params.weight_average)
    sequences = {"train.batch_size": params.batch_size // params.shards}
    evaluated = {"train.batch_size": max(1, EVALUATION_TOKENS // model.block_size)}
    return [
        *(term.times(copies) for term in weights(model, vocab_size)),
        *position_tables(model),
        *activations(model, vocab_size, sequences, model.block_size, backward=True),
        *activations(model, vocab_size, evaluated, model.block_size, backward=False),
    ]


def load_init_checkpoint(path: Path, params: ModelConfig, tokenizer: Tokenizer) -> Checkpoint:
    """Read the trained model whose weights a fine-tuning starts from.

    Raises:
        UserError: the file is not a checkpoint, or it has another architecture or tokenizer.
    """
    checkpoint = load_checkpoint(path)
    expected, found = (config.model_dump(exclude=IRRELEVANT) for config in (params, checkpoint.model))
    if difference := _difference(expected, found):
        raise UserError(
            f"train.init_from: expected a model of the same architecture, found in {path}: {difference}; "
            "set the section model to its values"
        )
    if checkpoint.tokenizer != tokenizer:
        raise UserError(
            f"train.init_from: expected tokens made with the tokenizer of {path} ({checkpoint.tokenizer.vocab_size:,} "
            f"symbols), found another tokenizer ({tokenizer.vocab_size:,} symbols); set tokenize.init_from to that "
            "model's tokenizer.json"
        )
    return checkpoint


def _initial_model(params: TrainParams, model: ModelConfig, data: TokenData) -> LanguageModel:
    """A model with random weights, or with those of the init checkpoint."""
    torch.manual_seed(seed_of(params.seed))
    initial = make_model(model, data.meta.vocab_size)
    if path := params.init_file("train", "copy a trained checkpoint"):
        initial.load_state_dict(dict(load_init_checkpoint(path, model, data.tokenizer).weights))
    return initial


def _check_digests(group: Group, digests: dict[str, Any]) -> None:
    """Refuse ranks, such as those on a second machine, that have other params, tokens or code."""
    if difference := _difference(group.broadcast(digests), digests):
        raise UserError(
            f"train: expected the params, tokens and code of rank 0 on every rank, found on rank {group.rank}: "
            f"{difference}; give both machines the same files"
        )


def _difference(expected: Any, found: Any, path: str = "") -> str:
    """The fields in which two trees of plain values differ; empty if they are equal."""
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = sorted(expected.keys() | found.keys())
        return "; ".join(
            filter(None, (_difference(expected.get(key), found.get(key), f"{path}.{key}") for key in keys))
        )
    return "" if expected == found else f"{path.lstrip('.')} {found!r:.16} instead of {expected!r:.16}"


def _resume(trainer: Trainer, folder: RunFolder, digests: dict[str, Any]) -> None:
    """Restore the newest resume state on all ranks; rank 0 reads it. Without one, start at step 0."""
    group = trainer.group
    state = group.broadcast(folder.newest(digests) if group.is_main else None)
    if state:
        trainer.restore(*state)
    if group.is_main:
        folder.history.resume(trainer.progress.step)
        if state:
            report(f"continuing after step {trainer.progress.step:,}")
        parameters = f"{count_parameters(trainer.model):,}"
        log.info("%s parameters, %d process(es) on %s", parameters, group.size, group.device.type)


def _write(trainer: Trainer, outputs: Outputs, history: History) -> None:
    """Write checkpoint, history and metrics, and report the result.

    The last resume state is kept: the parent process may be killed before it has processed the outputs.
    """
    progress = trainer.progress
    about = {
        "train": trainer.params.model_dump(),
        "corpus_sha256": trainer.data.meta.corpus_sha256,
        "step": progress.best_step,
        "val_loss": progress.best_loss,
    }
    Checkpoint(trainer.model.config, trainer.data.tokenizer, trainer.best, about).save(outputs.checkpoint)
    history.write_csv(outputs.history, outputs.validation)
    assert progress.best_loss is not None  # there is an evaluation at the last step
    metrics = {
        "val/best_loss": progress.best_loss,
        "val/best_step": progress.best_step,
        "train/loss_at_best_step": {record.step: record.train_loss for record in history.records}[progress.best_step],
        "train/parameters": count_parameters(trainer.model),
    }
    write_metrics(outputs.metrics, metrics)
    steps = f"step {progress.best_step:,} of {progress.step:,}"
    report(f"validation loss {progress.best_loss:.4f} at {steps} -> {outputs.checkpoint}")
    if overfitting := find_overfitting(history.records):
        report(str(overfitting))
    log.info("checkpoint SHA-256 %s", sha256_file(outputs.checkpoint))


@contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Record SIGTERM (which Slurm too sends before the time limit), Ctrl-C and SIGHUP (of a closed terminal).

    A signal that is ignored stays ignored, as SIGHUP under nohup.
    """
    received: list[int] = []
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, lambda got, _: received.append(got)) for number in handled}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
