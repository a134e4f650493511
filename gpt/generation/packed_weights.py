"""The weights of a GPT as plain arrays, for the compiled step.

Shapes: I inputs and O outputs of a matrix, C channels, D channels of a head, H heads, L layers, S positions or
distances, V tokens of the vocabulary.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpt.model.gpt import GPT, MAX_FACTOR

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

EPSILON = {"layer": 1e-5, "rms": torch.finfo(torch.float32).eps}  # torch's defaults
RELU, GELU, RELU2, SWIGLU = range(4)
POSITIONS = ("learned", "sinusoidal", "relative", "rotary", "alibi", "none")
ACTIVATIONS = {"relu": RELU, "gelu": GELU, "relu2": RELU2, "swiglu": SWIGLU}


class Linears(NamedTuple):
    """One linear layer of each block. Without outputs: the model has none."""

    weights_LIO: Floats
    biases_LO: Floats


class Norms(NamedTuple):
    """Two norms of each block, and the final one."""

    weights_LC: Floats
    biases_LC: Floats


class PackedWeights(NamedTuple):
    """All weights of a model. A missing bias is zero; a table without rows belongs to another position scheme."""

    token_embedding_VC: Floats
    ngram_tables_SI: Floats  # the rows of all tables
    ngram_first: Integers  # first row of each table
    ngram_rows: Integers  # number of rows of each table; 0: its n-grams are not hashed
    ngram_factors: Integers  # of the earliest token of an n-gram
    ngram_mix_IC: Floats
    positions_SC: Floats  # added to the embedding
    rotations_SD: Floats  # a cosine and a sine for each pair of channels
    relative_LSD: Floats  # the vector of each distance
    slopes_H: Floats  # of ALiBi, or 0
    norms: Norms
    qkv: Linears  # queries, then keys, then values
    attention_output: Linears
    widen: Linears
    gate: Linears  # of SwiGLU
    output: Linears
    logits_CV: Floats
    subtract_mean: bool  # LayerNorm; otherwise RMSNorm
    qk_norm: bool
    epsilon: float
    activation: int


def pack_weights(model: GPT) -> PackedWeights:
    """Copy the weights of a model."""
    config, tensors = model.config, {**model.state_dict(), **dict(model.named_buffers())}
    tables = [tensors[f"ngram_embeddings.tables.{n}.weight"] for n in range(config.ngram - 1)]
    powers = [len(tensors["token_embedding.weight"]) ** n for n in range(1, config.ngram + 1)]
    rotations = tensors.get("blocks.0.attention.rotary.rotations")
    layers = range(config.n_layer)
    return PackedWeights(
        token_embedding_VC=_array(tensors["token_embedding.weight"]),
        ngram_tables_SI=_array(torch.cat([torch.zeros(0, config.ngram_width), *tables])),
        ngram_first=np.array([sum(map(len, tables[:n])) for n in range(len(tables))], np.int64),
        ngram_rows=np.array([len(table) % power for table, power in zip(tables, powers[1:], strict=True)], np.int64),
        ngram_factors=np.array([power % MAX_FACTOR for power in powers[:-1]], np.int64),
        ngram_mix_IC=_table(tensors, ["ngram_embeddings.mix.weight"], config.n_embd).T.copy(),
        positions_SC=_table(tensors, ["positions.table.weight", "positions.table"], config.n_embd),
        rotations_SD=_array(torch.zeros(0, 2) if rotations is None else torch.view_as_real(rotations).flatten(1)),
        relative_LSD=_array(
            torch.stack([tensors.get(f"blocks.{n}.attention.bias.table.weight", torch.zeros(0, 1)) for n in layers])
        ),
        slopes_H=_array(tensors.get("blocks.0.attention.bias.slopes", torch.zeros(config.n_head)).flatten()),
        norms=_norms(
            tensors, [f"blocks.{layer}.{part}_norm" for layer in layers for part in ("attention", "feed_forward")]
        ),
        qkv=_linears(tensors, layers, "attention.query", "attention.key", "attention.value"),
        attention_output=_linears(tensors, layers, "attention.output"),
        widen=_linears(tensors, layers, "feed_forward.widen"),
        gate=_linears(tensors, layers, "feed_forward.gate"),
        output=_linears(tensors, layers, "feed_forward.output"),
        logits_CV=_array(tensors["output.weight"].T),
        subtract_mean=config.norm == "layer",
        qk_norm=config.qk_norm,
        epsilon=EPSILON[config.norm],
        activation=ACTIVATIONS[config.activation],
    )


def _norms(tensors: Mapping[str, Tensor], blocks: list[str]) -> Norms:
    names = [*blocks, "norm"]
    weights_LC = torch.stack([tensors[f"{name}.weight"] for name in names])
    biases = [tensors.get(f"{name}.bias", torch.zeros(weights_LC.shape[1])) for name in names]
    return Norms(_array(weights_LC), _array(torch.stack(biases)))


def _linears(tensors: Mapping[str, Tensor], layers: Iterable[int], *names: str) -> Linears:
    """The linear layers of each block; the outputs of several follow each other."""
    blocks = []
    for layer in layers:
        found = [name for name in (f"blocks.{layer}.{name}" for name in names) if f"{name}.weight" in tensors]
        weight_OI = torch.cat([tensors[f"{name}.weight"] for name in found] or [torch.zeros(0, 0)])
        biases = [tensors[f"{name}.bias"] for name in found if f"{name}.bias" in tensors]
        blocks.append((weight_OI.T, torch.cat(biases or [torch.zeros(len(weight_OI))])))
    weights, every_bias = zip(*blocks, strict=True)
    return Linears(_array(torch.stack(weights)), _array(torch.stack(every_bias)))


def _table(tensors: Mapping[str, Tensor], names: list[str], width: int) -> Floats:
    """The tensor with one of these names, or a table without rows."""
    return _array(next((tensors[name] for name in names if name in tensors), torch.zeros(0, width)))


def _array(tensor: Tensor) -> Floats:
    return np.array(tensor.detach().numpy(), np.float32, order="C")
