"""Estimates of memory: what would not fit is refused in one line, before anything large is allocated.

Only the terms that can become large are counted, each as a product of values of params keys. Measured peaks are between
half and twice the estimate (tests/model/test_memory.py).
"""

import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt.core.errors import UserError
from gpt.model.config import ModelConfig

FLOAT = 4  # bytes of a number; bfloat16 saves little, since weights and most activations are float32
BLOCK_MATRICES = 12  # of n_embd × n_embd values in a block: 4 of the attention, 8 of the feed-forward layers
SAVED, TRANSIENT = 26, 12  # values per channel and position in a layer: with a backward pass, without (measured)
DROPOUT_SCORES, BIAS_SCORES = 4, 2  # values per pair of positions where the fused kernel is not used (measured)
LOGITS = 4  # values per token of the vocabulary and position: logits, probabilities, gradients
WITH_ATTENTION = ("gpt", "head")  # kinds of models
MEMINFO, CGROUP_MAX = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Term:
    """A part of an estimate: `unit` bytes times the product of the values of some params keys."""

    factors: Mapping[str, int]
    unit: float

    @property
    def size(self) -> float:
        """Bytes."""
        return self.unit * math.prod(self.factors.values())

    def times(self, count: float) -> "Term":
        """The term for several copies."""
        return Term(self.factors, self.unit * count)


def weights(config: ModelConfig, vocab_size: int) -> list[Term]:
    """The weights without biases and norms."""
    width, vocabulary = {"model.n_embd": config.n_embd}, {"tokenize.vocab_size": vocab_size}
    if config.kind == "bigram":
        return [Term(vocabulary, FLOAT * vocab_size)]
    terms = [Term(vocabulary | width, FLOAT if config.kind == "gpt" and config.tie_embeddings else 2 * FLOAT)]
    if config.kind == "gpt":
        terms.append(Term({"model.n_layer": config.n_layer} | width, FLOAT * BLOCK_MATRICES * config.n_embd))
        ngram_width = {"model.ngram_width": config.ngram_width}
        terms.append(Term(width | ngram_width, FLOAT * (config.ngram - 1)))
        for n in range(2, config.ngram + 1):
            terms.append(Term({"model.ngram_rows": min(config.ngram_rows, vocab_size**n)} | ngram_width, FLOAT))
    if config.kind == "head":
        terms.append(Term(width, FLOAT * 4 * config.n_embd))
    if config.position == "learned" and config.kind != "average":
        terms.append(Term({"model.block_size": config.block_size} | width, FLOAT))
    return terms


def position_tables(config: ModelConfig) -> list[Term]:
    """The tables of positions that are no weights, and their computation in double precision."""
    if config.kind not in WITH_ATTENTION:
        return []
    layers = {"rotary": _layers(config) * FLOAT + 20, "sinusoidal": 6 * FLOAT}.get(config.position, 0)
    width = config.n_embd // _heads(config) if config.position == "rotary" else config.n_embd
    return [Term({"model.block_size": config.block_size, "model.n_embd": width}, layers)]


def activations(
    config: ModelConfig, vocab_size: int, sequences: Mapping[str, int], length: int, *, backward: bool
) -> list[Term]:
    """The activations of a batch.

    Args:
        sequences: their number, by the key that it depends on.
        length: tokens of a sequence, at most `block_size`.
        backward: whether all layers are kept, for a backward pass; otherwise one at a time.
    """
    tokens, width = {**sequences, "model.block_size": length}, {"model.n_embd": config.n_embd}
    layers = _layers(config) if backward else min(_layers(config), 1)
    logits = Term(tokens | {"tokenize.vocab_size": vocab_size}, FLOAT * LOGITS)
    if config.kind not in WITH_ATTENTION:  # the average is one product with a matrix of length × length values
        matrix = Term({"model.block_size": length}, 3 * FLOAT * layers * length)
        return [logits, Term(tokens | width, 3 * FLOAT * layers), matrix]
    scores = DROPOUT_SCORES if config.dropout and backward else 0
    scores += BIAS_SCORES if config.position in ("relative", "alibi") else 0
    return [
        logits,
        Term(tokens | width, FLOAT * layers * (SAVED if backward else TRANSIENT)),
        Term(tokens | {"model.n_head": _heads(config)}, FLOAT * layers * scores * length),
    ]


def cache(config: ModelConfig, sequences: int) -> list[Term]:
    """The key-value cache of this number of sequences."""
    per_layer = Term({"model.block_size": config.block_size, "model.n_embd": config.n_embd}, 2 * FLOAT * sequences)
    return [per_layer.times(_layers(config))]


def check_memory(purpose: str, terms: Iterable[Term], device: torch.device, *, processes: int = 1) -> None:
    """Compare an estimate with the available memory.

    Args:
        processes: on this machine, each of which needs the estimate.

    Raises:
        UserError: it does not fit; the message names the key with the largest value in the largest term.
    """
    terms = [term.times(processes) for term in terms]
    total, available = sum(term.size for term in terms), available_memory(device)
    if total <= available:
        return
    largest = max(terms, key=lambda term: term.size)
    key = max(largest.factors, key=lambda name: largest.factors[name])
    raise UserError(
        f"{key}: expected a value with which the {purpose} fits into the available memory of "
        f"{_gigabytes(available)}, found an estimate of {_gigabytes(total)}, of which {_gigabytes(largest.size)} "
        "depend on this key; lower it"
    )


def available_memory(device: torch.device) -> int:
    """Free bytes of a GPU, or of this machine with its swap space, at most those of a container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, KeyError, ValueError):  # not Linux
        fields = dict(line.split(":") for line in MEMINFO.read_text(encoding="ascii").splitlines())
        sizes = [1024 * sum(int(fields[name].split()[0]) for name in ("MemAvailable", "SwapFree"))]
    with suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max")
        sizes.append(int(CGROUP_MAX.read_text(encoding="ascii")))
    return min(sizes)


def _layers(config: ModelConfig) -> int:
    return {"gpt": config.n_layer, "bigram": 0}.get(config.kind, 1)


def _heads(config: ModelConfig) -> int:
    return config.n_head if config.kind == "gpt" else 1


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
