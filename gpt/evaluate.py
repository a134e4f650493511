"""Measure a checkpoint on the whole validation split, beside baselines that only count."""

import math
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import typer
from pydantic import Field

from gpt.checkpoint import Checkpoint, load_checkpoint
from gpt.command import LOG_FILE, Changes, LogFile, ParamsFile, logging_to, say
from gpt.dataset import covering_windows
from gpt.device import choose_device
from gpt.errors import UserError
from gpt.files import atomic_write, prepare_output, sha256_file, write_json
from gpt.params import Section, read_section
from gpt.scoring import bigram_loss, losses, mean_by_position, uniform_loss, unigram_loss
from gpt.token_files import TokenData, load_tokens


class EvaluateParams(Section):
    """The section `evaluate`."""

    batch_size: int = Field(ge=1)
    device: Literal["auto", "cpu", "cuda"]


def evaluate(
    *, params: EvaluateParams, checkpoint: Checkpoint, data: TokenData
) -> tuple[dict[str, float], pd.DataFrame]:
    """Predict every token of the validation split once.

    Returns:
        The figures (losses in nats a token) and the table of the mean loss by position in the context.
    """
    device = choose_device(params.device, "evaluate.device")
    windows = covering_windows(data, block_size=checkpoint.model.block_size, batch_size=params.batch_size)
    by_batch = losses(checkpoint.build().to(device), windows, device)
    nats = math.fsum(float(batch.sum()) for batch in by_batch)
    loss = nats / len(data.val)
    size = data.meta.vocab_size
    figures = {
        "loss": loss,
        "bits_per_character": nats / math.log(2) / data.meta.val_characters,
        "perplexity": math.exp(loss),
        "uniform_loss": uniform_loss(size),
        "unigram_loss": unigram_loss(data.train, data.val, size),
        "bigram_loss": bigram_loss(data.train, data.val, size),
        "characters": data.meta.val_characters,
    }
    means, counts = mean_by_position(by_batch)
    positions = np.arange(1, len(means) + 1)
    return figures, pd.DataFrame({"position": positions, "loss": means, "predictions": counts})


def command(
    params: ParamsFile,
    tokens: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder that the command tokenize wrote.")],
    checkpoint: Annotated[Path, typer.Option(metavar="FILE", help="Trained model to measure.")],
    metrics: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go, as JSON.")],
    positions: Annotated[Path, typer.Option(metavar="FILE", help="Where the loss by position goes, as CSV.")],
    changes: Changes = [],  # noqa: B006 (Typer copies it)
    log_file: LogFile = LOG_FILE,
) -> None:
    """Read section, checkpoint and tokens, measure, write."""
    section = read_section(params, "evaluate", EvaluateParams, changes)
    loaded = load_checkpoint(checkpoint)
    with logging_to(log_file, "evaluate", sha256_file(checkpoint)[:8]):
        for path in (metrics, positions):
            prepare_output(path)
        data = load_tokens(tokens)
        if data.tokenizer != loaded.tokenizer:
            raise UserError(
                f"{tokens}: expected the {loaded.tokenizer.vocab_size} symbols that {checkpoint} was trained on, found "
                f"{data.tokenizer.vocab_size} others; tokenize the same text again, or train on this one"
            )
        figures, table = evaluate(params=section, checkpoint=loaded, data=data)
        write_json(metrics, figures)
        with atomic_write(positions) as file:
            file.write(table.to_csv(index=False, lineterminator="\n").encode())
        say(
            f"loss {figures['loss']:.4f} nats, {figures['bits_per_character']:.3f} bits a character, perplexity "
            f"{figures['perplexity']:.2f}; counting alone: bigram {figures['bigram_loss']:.3f}, unigram "
            f"{figures['unigram_loss']:.3f}, uniform {figures['uniform_loss']:.3f}"
        )
