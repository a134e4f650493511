"""Measure a checkpoint: its predictions on the whole validation split, and what it writes word for word by heart."""

from pathlib import Path
from typing import Annotated

import typer

from gpt.core.cli import LOG_FILE, Changes, LogFile, ParamsFile, logging_to, report
from gpt.core.errors import UserError
from gpt.core.files import atomic_write, prepare_output, sha256_file, write_metrics
from gpt.core.params import read_section
from gpt.data.token_files import load_tokens
from gpt.evaluation.evaluator import EvaluateParams, evaluate, look_at
from gpt.evaluation.plots import write_pictures
from gpt.model.checkpoint import load_checkpoint


def command(
    params: ParamsFile,
    tokens: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder that the command tokenize wrote.")],
    checkpoint: Annotated[Path, typer.Option(metavar="FILE", help="Trained model to measure.")],
    metrics: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go, as JSON.")],
    positions: Annotated[Path, typer.Option(metavar="FILE", help="Where the loss by position goes, as CSV.")],
    calibration: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Where it goes how often the likeliest token is right, as CSV."),
    ],
    pictures: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Draw PNGs there: attention maps, positions, which symbols are alike."),
    ] = None,
    changes: Changes = [],  # noqa: B006 (Typer copies it)
    log_file: LogFile = LOG_FILE,
) -> None:
    """Read section, checkpoint and tokens, measure, write; draw."""
    section = read_section(params, "evaluate", EvaluateParams, changes)
    loaded = load_checkpoint(checkpoint)
    with logging_to(log_file, "evaluate", sha256_file(checkpoint)[:8]):
        for path in (metrics, positions, calibration, *([pictures / "attention.png"] if pictures else [])):
            prepare_output(path)
        data = load_tokens(tokens)
        if data.tokenizer != loaded.tokenizer:
            raise UserError(
                f"{tokens}: expected the {loaded.tokenizer.vocab_size} symbols that {checkpoint} was trained on, found "
                f"{data.tokenizer.vocab_size} others; tokenize the same text again, or train on this one"
            )
        found = evaluate(params=section, checkpoint=loaded, data=data)
        write_metrics(metrics, found.figures)
        for path, table in ((positions, found.positions), (calibration, found.calibration)):
            with atomic_write(path) as file:
                file.write(table.to_csv(index=False, lineterminator="\n").encode())
        for line in found.summary:
            report(line)
        if pictures:
            write_pictures(pictures, look_at(loaded, data))
