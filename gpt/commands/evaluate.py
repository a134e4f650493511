"""Evaluate a trained model on the validation split, and search generated samples for copies of the training text."""

from pathlib import Path
from typing import Annotated

import typer

from gpt.core.cli import LOG_FILE, Changes, LogFile, ParamsFile, logging_to, report
from gpt.core.errors import UserError
from gpt.core.files import prepare_output, sha256_file, write_csv, write_metrics
from gpt.core.params import read_section
from gpt.data.token_files import load_tokens
from gpt.evaluation.curves import render_curves
from gpt.evaluation.evaluator import EvaluateParams, evaluate, inspect_checkpoint
from gpt.evaluation.plots import render_plots, write_plots
from gpt.model.checkpoint import load_checkpoint


def command(
    params: ParamsFile,
    tokens: Annotated[Path, typer.Option(metavar="FOLDER", help="Output folder of the command tokenize.")],
    checkpoint: Annotated[Path, typer.Option(metavar="FILE", help="Checkpoint to evaluate.")],
    metrics: Annotated[Path, typer.Option(metavar="FILE", help="Output: the metrics, JSON.")],
    positions: Annotated[Path, typer.Option(metavar="FILE", help="Output: the loss by position in the context, CSV.")],
    blocks: Annotated[
        Path, typer.Option(metavar="FILE", help="Output: the loss by block of the validation text, CSV.")
    ],
    calibration: Annotated[Path, typer.Option(metavar="FILE", help="Output: accuracy by predicted probability, CSV.")],
    plots: Annotated[Path | None, typer.Option("--pictures", metavar="FOLDER", help="Output: plots, PNG.")] = None,
    changes: Changes = [],  # noqa: B006 (Typer copies it)
    log_file: LogFile = LOG_FILE,
) -> None:
    """Read the section, the checkpoint and the tokens; evaluate; write metrics, tables and plots."""
    section = read_section(params, "evaluate", EvaluateParams, changes)
    loaded = load_checkpoint(checkpoint)
    with logging_to(log_file, "evaluate", sha256_file(checkpoint)[:8]):
        for path in (metrics, positions, blocks, calibration, *([plots / "attention.png"] if plots else [])):
            prepare_output(path)
        data = load_tokens(tokens)
        if data.tokenizer != loaded.tokenizer:
            raise UserError(
                f"{tokens}: expected the tokenizer of {checkpoint} ({loaded.tokenizer.vocab_size} tokens), found "
                f"another one ({data.tokenizer.vocab_size} tokens); tokenize the training text of the "
                "checkpoint, or train on this one"
            )
        evaluation = evaluate(params=section, checkpoint=loaded, data=data)
        write_metrics(metrics, evaluation.metrics)
        write_csv(positions, evaluation.positions)
        write_csv(blocks, evaluation.blocks)
        write_csv(calibration, evaluation.calibration)
        for line in evaluation.summary:
            report(line)
        if plots:
            write_plots(plots, render_plots(inspect_checkpoint(loaded, data)))
            write_plots(plots, render_curves(evaluation.positions, evaluation.calibration))
