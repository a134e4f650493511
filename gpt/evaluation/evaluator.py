"""Measure a checkpoint: its predictions on the whole validation split, and what it writes word for word by heart."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import tee
from typing import Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from gpt.core.params import Section
from gpt.data.dataset import evaluation_windows
from gpt.data.token_files import TokenData
from gpt.evaluation.calibration import Numbers, calibration_error, calibration_table, predictions
from gpt.evaluation.interpretability import Insight, look
from gpt.evaluation.memorization import WINDOW, Copies, find_copies
from gpt.evaluation.ngram_baselines import bigram_loss, mean_by_position, uniform_loss, unigram_loss
from gpt.generation.decoding import generate_tokens
from gpt.generation.sampling import SamplingParams
from gpt.model.checkpoint import Checkpoint
from gpt.model.device import choose_device
from gpt.model.gpt import LanguageModel
from gpt.tokenizers.base import Tokenizer

TEXTS = 8  # that the model writes side by side, to be searched for copies

LONGEST_CHARACTER = 4  # in UTF-8 bytes, and so in tokens

DRAWN = 16  # tokens of the validation split whose attention is drawn

SHOWN = 60  # characters of the longest copy that a person gets to read


class EvaluateParams(Section):
    """The section `evaluate`."""

    batch_size: int = Field(ge=1)
    precision: Literal["float32", "bfloat16"]
    sample_characters: int = Field(ge=TEXTS * WINDOW)
    seed: int = Field(ge=0)
    device: Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Evaluation:
    """What was measured: the figures worth comparing, two tables, and what a person reads, line by line."""

    figures: dict[str, float]
    positions: pd.DataFrame
    calibration: pd.DataFrame
    summary: list[str]


def evaluate(*, params: EvaluateParams, checkpoint: Checkpoint, data: TokenData) -> Evaluation:
    """Predict every token of the validation split once; let the model write and search the training text for it."""
    device = choose_device(params.device, "evaluate.device")
    model = checkpoint.build().to(device)
    windows = evaluation_windows(data, block_size=checkpoint.model.block_size, batch_size=params.batch_size)
    precision = torch.bfloat16 if params.precision == "bfloat16" else torch.float32
    by_batch, probability, right = predictions(model, windows, device, precision)
    nats = math.fsum(float(batch.sum()) for batch in by_batch)
    means, counts = mean_by_position(by_batch)
    calibration = calibration_table(probability, right)
    texts = _write(model, data.tokenizer, characters=params.sample_characters, seed=params.seed)
    unseen = _real_texts(data, count=TEXTS, length=len(texts[0]))
    corpus = data.tokenizer.decode(data.train.tolist())
    copies, by_chance = find_copies(texts, corpus), find_copies(unseen, corpus)
    figures = {
        "bits_per_char": nats / math.log(2) / data.meta.val_characters,
        "calibration_error": calibration_error(calibration),
        "longest_copy": len(copies.longest),
        "copied": copies.share,
    }
    return Evaluation(
        figures,
        pd.DataFrame({"position": np.arange(1, len(means) + 1), "loss": means, "predictions": counts}),
        calibration,
        [_losses(nats, data), _calibrated(right, figures["calibration_error"]), _copied(copies, by_chance)],
    )


def look_at(checkpoint: Checkpoint, data: TokenData) -> Insight:
    """Look into a model while it reads the beginning of the validation split."""
    length = min(DRAWN, checkpoint.model.block_size)
    return look(checkpoint.build(), data.val[:length].tolist(), checkpoint.tokenizer.decode)


def _write(model: LanguageModel, tokenizer: Tokenizer, *, characters: int, seed: int) -> list[str]:
    """Texts by the model, each as if after a line end, that have so many characters together, or a few more."""
    length = -(-characters // TEXTS)
    settings = SamplingParams(max_new_tokens=LONGEST_CHARACTER * length, temperature=1.0)  # its own probabilities
    drawn = generate_tokens(model, [[tokenizer.start_token]] * TEXTS, settings, range(seed, seed + TEXTS))
    rows = tee(drawn, TEXTS)  # as far as needed
    return [_beginning(tokenizer.stream(row[place] for row in copy), length) for place, copy in enumerate(rows)]


def _beginning(pieces: Iterable[str], length: int) -> str:
    """The first characters of a text that comes in pieces, without asking for more pieces than that takes."""
    text = ""
    for piece in pieces:
        text += piece
        if len(text) >= length:
            break
    return text[:length]


def _real_texts(data: TokenData, *, count: int, length: int) -> list[str]:
    """The first texts of so many characters in the validation split, fewer where it is short."""
    characters = count * length
    beginning = data.tokenizer.decode(data.val[: LONGEST_CHARACTER * characters].tolist())[:characters]
    return [beginning[start : start + length] for start in range(0, len(beginning), length)]


def _losses(nats: float, data: TokenData) -> str:
    """The loss as a line, beside the losses of whoever only counts."""
    loss, bits, size = nats / len(data.val), nats / math.log(2) / data.meta.val_characters, data.meta.vocab_size
    bigram, unigram = (counting(data.train, data.val, size) for counting in (bigram_loss, unigram_loss))
    return (
        f"loss {loss:.4f} nats a token, {bits:.3f} bits a character, perplexity {math.exp(loss):.2f}; counting alone: "
        f"bigram {bigram:.3f}, unigram {unigram:.3f}, uniform {uniform_loss(size):.3f}"
    )


def _calibrated(right: Numbers, error: float) -> str:
    return (
        f"the likeliest token is right {right.mean():.1%} of the time; from the stated probability this share differs "
        f"by {error:.1%} on average"
    )


def _copied(copies: Copies, by_chance: Copies) -> str:
    """How much of its training text the model repeats as a line, beside real text that does so by chance alone."""
    return (
        f"what the model writes: {copies.share:.1%} of all {WINDOW}-character windows stand in the training text "
        f"(as much validation text: {by_chance.share:.1%}); longest copy {len(copies.longest):,} characters "
        f"({len(by_chance.longest):,}): {copies.longest[:SHOWN]!r}{'…' if len(copies.longest) > SHOWN else ''}"
    )
