"""Evaluate a checkpoint: loss and calibration on the whole validation split, and memorization of the training text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice, tee
from operator import itemgetter
from typing import Literal

import pandas as pd
import torch
from pydantic import Field

from gpt.core.params import Count, Section, Seed
from gpt.data.dataset import evaluation_windows
from gpt.data.loss import OVERFITTING_GAP, token_losses
from gpt.data.token_files import TokenData
from gpt.evaluation.blocks import loss_by_block
from gpt.evaluation.calibration import calibration_error, calibration_table, predictions
from gpt.evaluation.interpretability import ModelInspection, inspect_model
from gpt.evaluation.memorization import WINDOW, Copies, find_copies
from gpt.evaluation.ngram_baselines import bigram_loss, loss_by_position, unigram_loss
from gpt.generation.decoding import generate_tokens
from gpt.generation.sampling import SamplingParams
from gpt.launch import usable_cores
from gpt.model.checkpoint import Checkpoint
from gpt.model.device import choose_device
from gpt.model.gpt import LanguageModel
from gpt.model.memory import Term, activations, cache, check_memory, position_tables, weights
from gpt.tokenizers.base import Tokenizer

SAMPLES = 8  # texts that are generated, in one batch, to search them for copies
MAX_TOKENS_PER_CHARACTER = 4  # the bytes of the longest UTF-8 character
INSPECTED_TOKENS = 16  # of the validation split
TRAINING_WINDOWS = 16  # of the training split, for comparison with the validation split
BYTES_PER_CHARACTER = 150  # of the generated texts: their tokens, and the indices of the search (measured)
COPIES = 4  # of the weights: in the file, as loaded, in the model, in the compiled step
MAX_EXPONENT = 700  # of a number in double precision
MAX_PRINTED = 60  # characters of the longest copy


class EvaluateParams(Section):
    """The section `evaluate`."""

    batch_size: Count
    precision: Literal["float32", "bfloat16"]
    sample_characters: int = Field(ge=SAMPLES * WINDOW, le=10**8)
    seed: Seed
    device: Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Evaluation:
    """The metrics, the loss by position and by block, the calibration table, and a summary in lines of text."""

    metrics: dict[str, float]
    positions: pd.DataFrame
    blocks: pd.DataFrame
    calibration: pd.DataFrame
    summary: list[str]


def evaluate(*, params: EvaluateParams, checkpoint: Checkpoint, data: TokenData) -> Evaluation:
    """Predict every validation token once; generate samples and search the training text for copies of them."""
    device = choose_device(params.device, "evaluate.device")
    check_memory("evaluation", evaluation_memory(params, checkpoint, len(data.val)), device)
    model = checkpoint.build().to(device)
    windows = evaluation_windows(data, block_size=checkpoint.model.block_size, batch_size=params.batch_size)
    precision = torch.bfloat16 if params.precision == "bfloat16" else torch.float32
    by_batch, probability, correct = predictions(model, windows, device, precision)
    nats = math.fsum(float(batch.sum()) for batch in by_batch)
    per_character = 1 / math.log(2) / data.meta.val_characters  # bits for a nat of the whole split
    bits = nats * per_character
    calibration = calibration_table(probability, correct)
    samples = _generate(model, data.tokenizer, characters=params.sample_characters, seed=params.seed)
    real_texts = _validation_texts(data, count=SAMPLES, length=len(samples[0]))
    corpus = data.tokenizer.decode(data.train.tolist())
    copies, reference = find_copies(samples, corpus), find_copies(real_texts, corpus)
    bigram = bigram_loss(data.train, data.val, data.meta.vocab_size)
    metrics = {
        "val/bits_per_char": bits,
        "val/bigram_bits_per_char": bigram * len(data.val) * per_character,
        "val/calibration_error": calibration_error(calibration),
        "val/longest_copy": len(copies.longest),
        "val/copied_windows": copies.share,
    }
    loss = nats / len(data.val)
    accuracy = f"top-1 accuracy {correct.mean():.1%}; expected calibration error {metrics['val/calibration_error']:.1%}"
    return Evaluation(
        metrics,
        loss_by_position(by_batch),
        loss_by_block(by_batch, data),
        calibration,
        [
            _loss_summary(loss, bits, bigram, data),
            accuracy,
            _memorization_summary(copies, reference),
            *_overfitting_summary(model, data, params.batch_size, loss, device),
        ],
    )


def evaluation_memory(params: EvaluateParams, checkpoint: Checkpoint, tokens: int) -> list[Term]:
    """An estimate of the memory for this number of validation tokens."""
    model, vocab_size = checkpoint.model, checkpoint.tokenizer.vocab_size
    blocks = -(-tokens // model.block_size)
    in_parallel = min(usable_cores() * params.batch_size, blocks)
    return [
        *(term.times(COPIES) for term in weights(model, vocab_size)),
        *position_tables(model),
        *activations(model, vocab_size, {"evaluate.batch_size": in_parallel}, model.block_size, backward=False),
        *cache(model, SAMPLES),
        Term({"evaluate.sample_characters": params.sample_characters}, BYTES_PER_CHARACTER),
    ]


def inspect_checkpoint(checkpoint: Checkpoint, data: TokenData) -> ModelInspection:
    """Inspect a model on the first tokens of the validation split."""
    length = min(INSPECTED_TOKENS, checkpoint.model.block_size)
    return inspect_model(checkpoint.build(), data.val[:length].tolist(), checkpoint.tokenizer.decode)


def _generate(model: LanguageModel, tokenizer: Tokenizer, *, characters: int, seed: int) -> list[str]:
    """Unconditional samples of equal length at temperature 1, with at least this many characters in total."""
    length = -(-characters // SAMPLES)
    settings = SamplingParams(max_new_tokens=MAX_TOKENS_PER_CHARACTER * length, temperature=1.0)
    steps = generate_tokens(model, [[tokenizer.start_token]] * SAMPLES, settings, range(seed, seed + SAMPLES))
    streams = [tokenizer.stream(map(itemgetter(index), copy)) for index, copy in enumerate(tee(steps, SAMPLES))]
    # Only as many tokens are generated as the longest-lasting text needs for its characters.
    return ["".join(islice(chain.from_iterable(chunks), length)) for chunks in streams]


def _validation_texts(data: TokenData, *, count: int, length: int) -> list[str]:
    """The first `count` texts of `length` characters in the validation split, fewer if it is short."""
    characters = count * length
    beginning = data.tokenizer.decode(data.val[: MAX_TOKENS_PER_CHARACTER * characters].tolist())[:characters]
    return [beginning[start : start + length] for start in range(0, len(beginning), length)]


def _loss_summary(loss: float, bits: float, bigram: float, data: TokenData) -> str:
    size = data.meta.vocab_size
    unigram = unigram_loss(data.train, data.val, size)
    perplexity = math.exp(loss) if loss < MAX_EXPONENT else math.inf
    return (
        f"loss {loss:.4f} nats per token, {bits:.3f} bits per character, perplexity {perplexity:.2f}; baselines: "
        f"bigram {bigram:.3f}, unigram {unigram:.3f}, uniform {math.log(size):.3f} nats per token"
    )


def _overfitting_summary(
    model: LanguageModel, data: TokenData, batch_size: int, val_loss: float, device: torch.device
) -> Iterator[str]:
    """A line if the loss on the beginning of the training split is far below that on the validation split."""
    block_size = model.config.block_size
    compared = replace(data, val=data.train[: TRAINING_WINDOWS * block_size + 1])
    windows = evaluation_windows(compared, block_size=block_size, batch_size=batch_size)
    train_loss = float(torch.cat([batch.flatten() for batch in token_losses(model, windows, device)]).mean())
    if val_loss > OVERFITTING_GAP * train_loss:
        yield (
            f"overfitting: the loss on the training text is {train_loss:.3f} nats per token, that on the validation "
            f"text {val_loss:.3f}"
        )


def _memorization_summary(copies: Copies, reference: Copies) -> str:
    """The copies of the samples, and for comparison those of real text that the model was not trained on."""
    longest = repr(copies.longest[:MAX_PRINTED]) + "…" * (len(copies.longest) > MAX_PRINTED)
    return (
        f"memorization: {copies.share:.1%} of all {WINDOW}-character windows of the samples occur in the training text "
        f"(validation text: {reference.share:.1%}); longest copy {len(copies.longest):,} characters "
        f"({len(reference.longest):,}): {longest}"
    )
