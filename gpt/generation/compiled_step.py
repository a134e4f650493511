"""A decoding step of the GPT as one compiled function: several times as fast as the same step in torch.

A step in torch consists of some hundred calls, most of which take longer than their arithmetic. Numba compiles the
loops below to machine code once and caches it. `gpt.model` defines the model; the tests compare all variants with it.

Tokens are computed independently of each other, so that a sequence has the same logits, bit for bit, in every batch.
Shapes: R tokens to compute, B sequences, C channels in H heads of D channels, I inputs and O outputs of a matrix, S
positions, L layers, V tokens of the vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Self, TypeVar, cast

import numba
import numpy as np
import torch
from torch import Tensor

from gpt.generation.packed_weights import (
    ACTIVATIONS,
    GELU,
    POSITIONS,
    RELU2,
    SWIGLU,
    Floats,
    Integers,
    PackedWeights,
    pack_weights,
)
from gpt.launch import usable_cores
from gpt.model.gpt import GPT, HASH_MULTIPLIER, LanguageModel
from gpt.model.kv_cache import KVCache
from gpt.model.positions import REACH

MIN_PER_THREAD = 4  # sequences
ROWS = 16  # tokens whose results stay in the nearest cache while a matrix is read
ZERO, HALF, ONE, ROOT_HALF = (np.float32(value) for value in (0, 0.5, 1, math.sqrt(0.5)))

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Have Numba compile a function at its first call.

    The machine code is cached in `__pycache__` beside the module, or in the user's cache folder. The compiler may
    reorder sums, which vectorizes them; the compiled order is the same in every call.
    """
    fastmath = {"reassoc", "contract", "nsz"}
    compiler = partial(numba.njit, nogil=True, error_model="numpy", fastmath=fastmath)
    try:
        return cast("Function", compiler(cache=True)(function))
    except (OSError, RuntimeError):  # no folder for the cache
        return cast("Function", compiler()(function))


class CompiledStep:
    """The compiled step of a model. It has a copy of the weights."""

    def __init__(self, model: GPT) -> None:
        self._weights = pack_weights(model)
        self._cores = usable_cores()
        self._threads = ThreadPoolExecutor(self._cores)
        self([[0]], model.make_cache(1))  # compiles it, or loads it

    @classmethod
    def of(cls, model: LanguageModel) -> Self | None:
        """The step of a model; None for the baselines, for unknown parts, and for weights not in float32 on the CPU."""
        weight = next(model.parameters())
        known = model.config.position in POSITIONS and model.config.activation in ACTIVATIONS
        if isinstance(model, GPT) and known and weight.device.type == "cpu" and weight.dtype == torch.float32:
            return cls(model)
        return None

    def __call__(self, tokens: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        """Compute the next tokens of the first sequences of the cache; returns the logits after the last ones, (B, V).

        Args:
            tokens: at least one for each sequence.
        """
        parts = min(self._cores, max(len(tokens) // MIN_PER_THREAD, 1))
        ends = [len(tokens) * part // parts for part in range(1, parts + 1)]
        starts = [0, *ends[:-1]]
        if parts == 1:
            return self._compute(tokens, cache, 0, len(tokens))
        return torch.cat(list(self._threads.map(partial(self._compute, tokens, cache), starts, ends)))

    def _compute(self, tokens: Sequence[Sequence[int]], cache: KVCache, start: int, end: int) -> Tensor:
        """The same for the sequences from `start` to before `end`; other threads may compute others."""
        logits_BV = step(
            self._weights,
            np.array([token for each in tokens[start:end] for token in each]),
            np.array([len(each) for each in tokens[start:end]]),
            start,
            cache.tokens_BS.numpy(),
            cache.lengths_B.numpy(),
            cache.keys_LBHSD.numpy(),
            cache.values_LBHSD.numpy(),
        )
        return torch.from_numpy(logits_BV)


@compiled
def step(
    w: PackedWeights,
    tokens_R: Integers,
    counts_B: Integers,
    start: int,
    tokens_BS: Integers,
    lengths_B: Integers,
    keys_LBHSD: Floats,
    values_LBHSD: Floats,
) -> Floats:
    """Compute the next `counts_B` tokens of the sequences from `start` on; the logits after the last ones, (B, V)."""
    sequences_R, positions_R = append_tokens(tokens_R, counts_B, start, tokens_BS, lengths_B)
    x_RC = embed(w, tokens_BS, sequences_R, positions_R)
    for layer in range(w.qkv.weights_LIO.shape[0]):
        h_RC = layer_norm(w, 2 * layer, x_RC)
        qkv_RO = linear(h_RC, w.qkv.weights_LIO[layer], w.qkv.biases_LO[layer])
        mixed_RC = attention(w, layer, qkv_RO, sequences_R, positions_R, keys_LBHSD[layer], values_LBHSD[layer])
        add_linear(mixed_RC, w.attention_output.weights_LIO[layer], w.attention_output.biases_LO[layer], x_RC)
        h_RC = layer_norm(w, 2 * layer + 1, x_RC)
        hidden_RO = linear(h_RC, w.widen.weights_LIO[layer], w.widen.biases_LO[layer])
        gate_RO = linear(h_RC, w.gate.weights_LIO[layer], w.gate.biases_LO[layer])
        activate(w.activation, hidden_RO, gate_RO)
        add_linear(hidden_RO, w.output.weights_LIO[layer], w.output.biases_LO[layer], x_RC)
    last_BC = layer_norm(w, w.norms.weights_LC.shape[0] - 1, x_RC[np.cumsum(counts_B) - 1])
    return linear(last_BC, w.logits_CV, np.zeros(w.logits_CV.shape[1], np.float32))


@compiled
def append_tokens(
    tokens_R: Integers, counts_B: Integers, start: int, tokens_BS: Integers, lengths_B: Integers
) -> tuple[Integers, Integers]:
    """Store the next tokens of each sequence and count them; returns the sequence and the position of each token."""
    sequences_R, positions_R = np.empty_like(tokens_R), np.empty_like(tokens_R)
    r = 0
    for b in range(start, start + counts_B.shape[0]):
        for _ in range(counts_B[b - start]):
            sequences_R[r], positions_R[r] = b, lengths_B[b]
            tokens_BS[b, lengths_B[b]] = tokens_R[r]
            lengths_B[b] += 1
            r += 1
    return sequences_R, positions_R


@compiled
def embed(w: PackedWeights, tokens_BS: Integers, sequences_R: Integers, positions_R: Integers) -> Floats:
    """Token, n-gram and position embeddings, (R, C)."""
    count, channels = sequences_R.shape[0], w.token_embedding_VC.shape[1]
    tables, width = w.ngram_first.shape[0], w.ngram_tables_SI.shape[1]
    ngrams_RI = np.empty((count, tables * width), np.float32)
    x_RC = np.empty((count, channels), np.float32)
    for r in range(count):
        tokens_S, position = tokens_BS[sequences_R[r]], positions_R[r]
        ngram = tokens_S[position]
        for c in range(channels):
            x_RC[r, c] = w.token_embedding_VC[ngram, c]
        for n in range(tables):
            if position > n:
                ngram += w.ngram_factors[n] * tokens_S[position - n - 1]
            hashed = (ngram * HASH_MULTIPLIER >> 16) % max(w.ngram_rows[n], 1)
            row = w.ngram_first[n] + (hashed if w.ngram_rows[n] else ngram)
            for i in range(width):
                ngrams_RI[r, n * width + i] = w.ngram_tables_SI[row, i]
    if tables:
        add_linear(ngrams_RI, w.ngram_mix_IC, np.zeros(channels, np.float32), x_RC)
        for r in range(count):
            normalize(x_RC[r], x_RC[r], w.subtract_mean, w.epsilon)
    if w.positions_SC.shape[0]:
        for r in range(count):
            for c in range(channels):
                x_RC[r, c] += w.positions_SC[positions_R[r], c]
    return x_RC


@compiled
def linear(x_RI: Floats, weights_IO: Floats, bias_O: Floats) -> Floats:
    """The matrix product x · weights + bias, (R, O)."""
    out_RO = np.zeros((x_RI.shape[0], weights_IO.shape[1]), np.float32)
    add_linear(x_RI, weights_IO, bias_O, out_RO)
    return out_RO


@compiled
def add_linear(x_RI: Floats, weights_IO: Floats, bias_O: Floats, out_RO: Floats) -> None:
    """Add x · weights + bias to `out_RO`.

    The results of `ROWS` tokens stay in the nearest cache while the matrix is read, four of its rows at a time.
    """
    count, (inputs, outputs) = x_RI.shape[0], weights_IO.shape
    for first in range(0, count, ROWS):
        end = min(first + ROWS, count)
        for r in range(first, end):
            for o in range(outputs):
                out_RO[r, o] += bias_O[o]
        for i in range(0, inputs - inputs % 4, 4):
            w0, w1, w2, w3 = weights_IO[i], weights_IO[i + 1], weights_IO[i + 2], weights_IO[i + 3]
            for r in range(first, end - 1, 2):  # two tokens share what is read of the matrix
                x0, x1, x2, x3 = x_RI[r, i], x_RI[r, i + 1], x_RI[r, i + 2], x_RI[r, i + 3]
                y0, y1, y2, y3 = x_RI[r + 1, i], x_RI[r + 1, i + 1], x_RI[r + 1, i + 2], x_RI[r + 1, i + 3]
                x_out_O, y_out_O = out_RO[r], out_RO[r + 1]
                for o in range(outputs):
                    x_out_O[o] += x0 * w0[o] + x1 * w1[o] + x2 * w2[o] + x3 * w3[o]
                    y_out_O[o] += y0 * w0[o] + y1 * w1[o] + y2 * w2[o] + y3 * w3[o]
            if (end - first) % 2:
                x0, x1, x2, x3 = x_RI[end - 1, i], x_RI[end - 1, i + 1], x_RI[end - 1, i + 2], x_RI[end - 1, i + 3]
                x_out_O = out_RO[end - 1]
                for o in range(outputs):
                    x_out_O[o] += x0 * w0[o] + x1 * w1[o] + x2 * w2[o] + x3 * w3[o]
        for i in range(inputs - inputs % 4, inputs):
            for r in range(first, end):
                for o in range(outputs):
                    out_RO[r, o] += x_RI[r, i] * weights_IO[i, o]


@compiled
def normalize(x_C: Floats, out_C: Floats, subtract_mean: bool, epsilon: float) -> None:
    """LayerNorm or RMSNorm of one vector, without trained weights."""
    mean, square, size = ZERO, ZERO, np.float32(x_C.shape[0])
    if subtract_mean:
        for c in range(x_C.shape[0]):
            mean += x_C[c]
        mean /= size
    for c in range(x_C.shape[0]):
        square += (x_C[c] - mean) * (x_C[c] - mean)
    scale = ONE / np.sqrt(square / size + np.float32(epsilon))
    for c in range(x_C.shape[0]):
        out_C[c] = (x_C[c] - mean) * scale


@compiled
def layer_norm(w: PackedWeights, norm: int, x_RC: Floats) -> Floats:
    """A norm with its trained weights, (R, C)."""
    out_RC = np.empty_like(x_RC)
    for r in range(x_RC.shape[0]):
        normalize(x_RC[r], out_RC[r], w.subtract_mean, w.epsilon)
        for c in range(x_RC.shape[1]):
            out_RC[r, c] = out_RC[r, c] * w.norms.weights_LC[norm, c] + w.norms.biases_LC[norm, c]
    return out_RC


@compiled
def attention(
    w: PackedWeights,
    layer: int,
    qkv_RO: Floats,
    sequences_R: Integers,
    positions_R: Integers,
    keys_BHSD: Floats,
    values_BHSD: Floats,
) -> Floats:
    """Store keys and values of a layer and attend to all up to them, (R, C)."""
    heads, size = keys_BHSD.shape[1], keys_BHSD.shape[3]
    mixed_RC = np.zeros((qkv_RO.shape[0], heads * size), np.float32)
    for r in range(qkv_RO.shape[0]):
        sequence, position = sequences_R[r], positions_R[r]
        for h in range(heads):
            q_D = qkv_RO[r, h * size : (h + 1) * size]
            k_D = qkv_RO[r, (heads + h) * size : (heads + h + 1) * size]
            v_D = qkv_RO[r, (2 * heads + h) * size : (2 * heads + h + 1) * size]
            for x_D in (q_D, k_D):
                if w.qk_norm:
                    normalize(x_D, x_D, w.subtract_mean, w.epsilon)
                if w.rotations_SD.shape[0]:
                    rotate(x_D, w.rotations_SD[position])
            keys_SD, values_SD = keys_BHSD[sequence, h, : position + 1], values_BHSD[sequence, h, : position + 1]
            for d in range(size):
                keys_SD[position, d], values_SD[position, d] = k_D[d], v_D[d]
            mixed_D = mixed_RC[r, h * size : (h + 1) * size]
            attend(q_D, keys_SD, values_SD, w.slopes_H[h], w.relative_LSD[layer], mixed_D)
    return mixed_RC


@compiled
def rotate(x_D: Floats, rotations_D: Floats) -> None:
    """Rotary positions: multiply each pair of channels, as a complex number, by that of the position."""
    for d in range(0, x_D.shape[0], 2):
        real, imaginary, cosine, sine = x_D[d], x_D[d + 1], rotations_D[d], rotations_D[d + 1]
        x_D[d], x_D[d + 1] = real * cosine - imaginary * sine, real * sine + imaginary * cosine


@compiled
def attend(q_D: Floats, keys_SD: Floats, values_SD: Floats, slope: float, relative_SD: Floats, out_D: Floats) -> None:
    """Attention of a query to all keys, of which the last one is at its own position; added to `out_D`."""
    length, scale = keys_SD.shape[0], ONE / np.sqrt(np.float32(q_D.shape[0]))
    scores_S, highest = np.empty(length, np.float32), np.float32(-np.inf)
    for s in range(length):
        distance = length - 1 - s
        scores_S[s] = dot(q_D, keys_SD[s]) * scale - np.float32(slope) * np.float32(distance)
        if relative_SD.shape[0]:
            scores_S[s] += dot(q_D, relative_SD[min(distance, REACH)]) * scale
        highest = max(highest, scores_S[s])
    total = ZERO
    for s in range(length):
        scores_S[s] = np.exp(scores_S[s] - highest)
        total += scores_S[s]
    for s in range(length):
        for d in range(out_D.shape[0]):
            out_D[d] += scores_S[s] / total * values_SD[s, d]


@compiled
def dot(a_D: Floats, b_D: Floats) -> np.float32:
    """The scalar product of two vectors."""
    total = ZERO
    for d in range(a_D.shape[0]):
        total += a_D[d] * b_D[d]
    return total


@compiled
def activate(activation: int, x_RO: Floats, gate_RO: Floats) -> None:
    """The activation of the feed-forward layer, in place."""
    for r in range(x_RO.shape[0]):
        for o in range(x_RO.shape[1]):
            x = x_RO[r, o]
            if activation == SWIGLU:
                x_RO[r, o] = x * gate_RO[r, o] / (ONE + np.exp(-gate_RO[r, o]))
            elif activation == GELU:
                x_RO[r, o] = HALF * x * (ONE + np.float32(math.erf(x * ROOT_HALF)))
            else:
                x_RO[r, o] = max(x, ZERO) * (max(x, ZERO) if activation == RELU2 else ONE)
