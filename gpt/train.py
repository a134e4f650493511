"""Train the model; start it through torchrun to use several processes. The checkpoint is the same for any number."""

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from gpt.checkpoint import Checkpoint
from gpt.command import LOG_FILE, Changes, LogFile, ParamsFile, log, logging_to, say
from gpt.dataset import check_lengths
from gpt.device import choose_device, slow_in_bfloat16
from gpt.distributed import Group, joined, rank_of_environment
from gpt.errors import UserError
from gpt.files import prepare_output, sha256_file, write_figures
from gpt.fine_tuning import trained_before
from gpt.fingerprint import digests
from gpt.history import History, Record
from gpt.ladder import make_model
from gpt.model import count_parameters
from gpt.model_params import ModelParams
from gpt.overfitting import find_overfitting
from gpt.params import read_section
from gpt.run_folder import RunFolder
from gpt.token_files import TokenData, load_tokens
from gpt.training import Trainer, TrainParams, seed_of

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
    model: ModelParams,
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
    if rank_of_environment() == 0:
        for path in (*vars(outputs).values(), folder.history.path):
            prepare_output(path)
    with (
        ExitStack() as stack,
        joined(device, timeout_s=timeout_s, before=lambda: stack.enter_context(folder.locked(say))) as group,
    ):
        _check_ranks(group, params.shards, made_of)
        torch.manual_seed(seed_of(params.seed))
        first = make_model(model, data.meta.vocab_size)
        if params.init_from:
            first.load_state_dict(dict(trained_before(Path(params.init_from), model, data.tokenizer).weights))
        trainer = Trainer(params, first, data, group)
        _continue_or_begin(trainer, folder, made_of)
        if group.first and params.precision == "bfloat16" and slow_in_bfloat16(device):
            say("this CPU has no instructions for bfloat16: float32 will be faster (-S train.precision=float32)")
        to_do = trainer.progress.step < params.max_steps
        seen = _Reporter(params.max_steps, trainer.progress.step, folder.history) if group.first and to_do else _ignore
        with _polite_signals() as asked_to_stop:
            trainer.run(folder, made_of, seen, asked_to_stop)
            if group.first:
                _write(trainer, outputs, folder.history)


def command(
    params: ParamsFile,
    tokens: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder that the command tokenize wrote.")],
    checkpoint: Annotated[Path, typer.Option(metavar="FILE", help="Where the best weights go.")],
    metrics: Annotated[Path, typer.Option(metavar="FILE", help="Where the final figures go, as JSON.")],
    history: Annotated[Path, typer.Option(metavar="FILE", help="Where the training loss by step goes, as CSV.")],
    validation: Annotated[Path, typer.Option(metavar="FILE", help="Where the validation loss by step goes, as CSV.")],
    run_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Keeps the live history and what a killed run continues from."),
    ] = None,
    timeout: Annotated[
        int, typer.Option(min=1, metavar="SECONDS", help="After this long without an answer, a process counts as dead.")
    ] = 120,
    changes: Changes = [],  # noqa: B006 (Typer copies it)
    log_file: LogFile = LOG_FILE,
) -> None:
    """Read the sections `model` and `train` and the tokens, then train."""
    first = rank_of_environment() == 0
    about = run_dir.name[:8] if run_dir else ""
    with ExitStack() as stack:
        stack.enter_context(logging_to(log_file, "train", about) if first else nullcontext())
        model = read_section(params, "model", ModelParams, changes)
        folder = run_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chargpt-")))
        train(
            params=read_section(params, "train", TrainParams, changes),
            model=model,
            data=load_tokens(tokens),
            made_of=digests(params, tokens, changes),
            outputs=Outputs(checkpoint, metrics, history, validation),
            folder=RunFolder(folder),
            timeout_s=timeout,
        )


def _check_ranks(group: Group, shards: int, made_of: dict[str, Any]) -> None:
    """Refuse a number of ranks that cannot share the shards, and ranks that would train something else."""
    if group.size > shards or group.size & (group.size - 1):
        raise UserError(
            f"train: expected 1, 2, 4, … processes, at most train.shards ({shards}), found {group.size}; "
            "set launch.processes"
        )
    difference = _difference(group.share(made_of), made_of)
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
    first = trainer.group.first
    found = folder.newest(made_of, say) if first else None
    state = trainer.group.share(found)
    if state:
        trainer.restore(*state)
    if first:
        folder.history.resume(trainer.progress.step)
        if state:
            say(f"continuing after step {trainer.progress.step:,}")
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
    Checkpoint(trainer.model.params, trainer.data.tokenizer, trainer.best, about).save(outputs.checkpoint)
    history.write_csv(outputs.history, outputs.validation)
    assert progress.best_loss is not None  # the last step, at the latest, is an evaluation
    train_loss = {record.step: record.train_loss for record in history.records}[progress.best_step]
    figures = {
        "train_loss": train_loss,
        "val_loss": progress.best_loss,
        "best_step": progress.best_step,
        "parameters": count_parameters(trainer.model),
    }
    write_figures(outputs.metrics, figures)
    steps = f"step {progress.best_step:,} of {progress.step:,}"
    say(f"validation loss {progress.best_loss:.4f} at {steps} -> {outputs.checkpoint}")
    if found := find_overfitting(history.records):
        say(str(found))
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


class _Reporter:
    """Progress for a person: a bar on a terminal, a line at every evaluation elsewhere; the log holds the lines too."""

    def __init__(self, max_steps: int, step: int, history: History) -> None:
        self._max_steps, self._history = max_steps, history
        self._first_step, self._began = step, time.monotonic()
        self._bar = tqdm(total=max_steps, initial=step, unit="step", file=sys.stdout, disable=None, dynamic_ncols=True)
        self._val_loss = ""

    def __call__(self, record: Record) -> None:
        if record.val_loss is not None:
            self._val_loss = f", val {record.val_loss:.3f}"
            line = (
                f"step {record.step:,}/{self._max_steps:,}: train {record.train_loss:.3f}{self._val_loss}, "
                f"rate {record.learning_rate:.2e}, {record.tokens_per_second:,.0f} tokens/s, "
                f"{self._left(record)} left"
            )
            log.info("%s", line)
            if self._bar.disable:
                print(line, flush=True)
            self._warn(record.step)
        self._bar.set_postfix_str(f"train {record.train_loss:.3f}{self._val_loss}", refresh=False)
        self._bar.update(record.step - self._bar.n)
        if record.step == self._max_steps:
            self._bar.close()

    def _warn(self, step: int) -> None:
        """Say that the run overfits, once from a best evaluation to the next; at the end the closing line says it."""
        found = find_overfitting(self._history.records)
        if found and found.noticed == step < self._max_steps:
            with tqdm.external_write_mode(file=sys.stdout):
                say(str(found))

    def _left(self, record: Record) -> str:
        seconds_a_step = (time.monotonic() - self._began) / (record.step - self._first_step)
        return tqdm.format_interval(seconds_a_step * (self._max_steps - record.step))
