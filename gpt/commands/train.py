"""Train the model; start it through torchrun to use several processes. The outputs are the same for any number."""

import tempfile
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from gpt.core.cli import LOG_FILE, Changes, LogFile, ParamsFile, logging_to
from gpt.core.params import MAX_TIMEOUT_S, read_params, read_section
from gpt.data.token_files import load_tokens
from gpt.model.config import ModelConfig
from gpt.training.distributed import env_rank
from gpt.training.fingerprint import digests
from gpt.training.run import Outputs, train
from gpt.training.run_folder import RunFolder
from gpt.training.trainer import TrainParams


def command(
    params: ParamsFile,
    tokens: Annotated[Path, typer.Option(metavar="FOLDER", help="Token folder that the command tokenize wrote.")],
    checkpoint: Annotated[Path, typer.Option(metavar="FILE", help="Output: the best weights.")],
    metrics: Annotated[Path, typer.Option(metavar="FILE", help="Output: the metrics of the best weights, JSON.")],
    history: Annotated[Path, typer.Option(metavar="FILE", help="Output: training metrics by step, CSV.")],
    validation: Annotated[Path, typer.Option(metavar="FILE", help="Output: validation loss by step, CSV.")],
    run_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for live history and resume states; default: a temporary one."),
    ] = None,
    timeout: Annotated[
        int,
        typer.Option(
            min=1,
            max=MAX_TIMEOUT_S,
            metavar="SECONDS",
            help="Time without an answer after which a process counts as lost.",
        ),
    ] = 120,
    changes: Changes = [],  # noqa: B006 (Typer copies it)
    log_file: LogFile = LOG_FILE,
) -> None:
    """Read the sections `model` and `train` and the tokens, then train."""
    with ExitStack() as stack:
        about = run_dir.name[:8] if run_dir else ""
        stack.enter_context(logging_to(log_file, "train", about) if env_rank() == 0 else nullcontext())
        model = read_section(params, "model", ModelConfig, changes)
        folder = run_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chargpt-")))
        train(
            params=read_section(params, "train", TrainParams, changes),
            model=model,
            data=load_tokens(tokens),
            digests=digests(read_params(params, changes), tokens),
            outputs=Outputs(checkpoint, metrics, history, validation),
            folder=RunFolder(folder),
            timeout_s=timeout,
        )
