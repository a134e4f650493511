"""What a model computes for a text: attention scores, positional encodings, similarities of the embeddings.

Shapes: L layers of H heads; T tokens; C channels; V tokens of the vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt.model import positions
from gpt.model.attention import AttentionInputs, AttentionScores, SelfAttention, reference_attention
from gpt.model.baselines import Average, Bigram
from gpt.model.gpt import GPT, LanguageModel

Numbers = np.ndarray[Any, np.dtype[np.float32]]

MAX_EMBEDDINGS = 80  # of a larger vocabulary only the first ones are compared
WHITESPACE_SYMBOLS = {" ": "␣", "\n": "↵", "\t": "⇥"}


@dataclass(frozen=True)
class Attention:
    """The scores before the mask, after it, and after softmax, each (L, H, T, T): rows are queries, columns keys."""

    raw: Numbers
    masked: Numbers
    weights: Numbers


@dataclass(frozen=True)
class Positions:
    """The values of the position scheme.

    `values` of learned and sinusoidal: the encodings (positions, C), sinusoidal with all sines before all cosines. Of
    rotary: the cosines of the angles, (positions, half the head size). Of relative: the norms of the vectors,
    (L, distances). Of alibi: the biases, (H, distances).
    """

    scheme: str
    values: Numbers


@dataclass(frozen=True)
class ModelInspection:
    """The parts of a model that can be plotted.

    `attention` is None for models without attention, `positions` for models without a position scheme. `embeddings`
    (V, C) belong to the tokens in `vocabulary`; of a bigram model they are the rows of its table.
    """

    kind: str
    tokens: tuple[str, ...]
    attention: Attention | None
    positions: Positions | None
    vocabulary: tuple[str, ...]
    embeddings: Numbers

    def embedding_similarities(self) -> tuple[list[str], Numbers]:
        """The vocabulary ordered by similarity, and the cosine similarities of its embeddings, (V, V)."""
        lengths_V1 = np.linalg.norm(self.embeddings, axis=1, keepdims=True)
        directions_VC = self.embeddings / np.maximum(lengths_V1, np.finfo(np.float32).tiny)
        cosines_VV = directions_VC @ directions_VC.T
        order = order_by_similarity(cosines_VV)
        return [self.vocabulary[index] for index in order], cosines_VV[np.ix_(order, order)]


@torch.inference_mode()
def inspect_model(
    model: LanguageModel, tokens: Sequence[int], decode: Callable[[Iterable[int]], str]
) -> ModelInspection:
    """Run a model in float32 on at most `block_size` tokens and record its attention scores."""
    table = "table" if isinstance(model, Bigram) else "token_embedding"
    embeddings_VC = model.get_parameter(f"{table}.weight")[:MAX_EMBEDDINGS]
    return ModelInspection(
        kind=model.config.kind,
        tokens=tuple(printable_token(decode([token])) for token in tokens),
        attention=_attention(model, tokens),
        positions=_positions(model),
        vocabulary=tuple(printable_token(decode([token])) for token in range(len(embeddings_VC))),
        embeddings=_to_numpy(embeddings_VC),
    )


@dataclass(frozen=True)
class NgramLookup:
    """An n-gram that ends at a position, and the row of its embedding; `shared` if other n-grams have the same row."""

    position: int
    n: int
    tokens: tuple[int, ...]
    row: int
    rows: int
    shared: bool


def ngram_lookups(model: LanguageModel, tokens: Sequence[int]) -> list[NgramLookup]:
    """The n-gram embeddings that a model looks up for a text; before its first token, n-grams contain token 0."""
    embeddings = model.ngram_embeddings if isinstance(model, GPT) else None
    if embeddings is None:
        return []
    found = []
    for n, rows_BT in enumerate(embeddings.rows(torch.tensor([list(tokens)])), start=2):
        padded, size = [0] * (n - 1) + list(tokens), embeddings.tables[n - 2].num_embeddings
        assert isinstance(size, int)
        for position, row in enumerate(rows_BT[0].tolist()):
            ngram = tuple(padded[position : position + n])
            found.append(NgramLookup(position, n, ngram, row, size, size < embeddings.vocab_size**n))
    return found


def printable_token(token: str) -> str:
    """A token with symbols for whitespace and escapes for other characters that are not printable."""
    symbols = (WHITESPACE_SYMBOLS.get(char) or (char if char.isprintable() else ascii(char)[1:-1]) for char in token)
    return "".join(symbols) or "∅"


def order_by_similarity(similarity_VV: Numbers) -> list[int]:
    """Order items so that similar ones are neighbours, by average-linkage clustering (Sokal & Michener 1958).

    The two clusters with the highest mean similarity are merged, repeatedly. Each cluster is an ordered list; when two
    are merged, both are oriented such that the items where they meet are the most similar.
    """
    clusters = {index: [index] for index in range(len(similarity_VV))}
    mean_VV = np.array(similarity_VV, dtype=np.float64)
    np.fill_diagonal(mean_VV, -np.inf)
    while len(clusters) > 1:
        first, second = sorted(map(int, np.unravel_index(mean_VV.argmax(), mean_VV.shape)))
        left, right = clusters[first], clusters.pop(second)
        orientations = [(a, b) for a in (left, left[::-1]) for b in (right, right[::-1])]
        before, after = max(orientations, key=lambda pair: similarity_VV[pair[0][-1], pair[1][0]])
        mean_V = (len(left) * mean_VV[first] + len(right) * mean_VV[second]) / (len(left) + len(right))
        mean_VV[first], mean_VV[:, first] = mean_V, mean_V
        mean_VV[second], mean_VV[:, second] = -np.inf, -np.inf
        clusters[first] = before + after
    return next(iter(clusters.values()))


def _attention(model: LanguageModel, tokens: Sequence[int]) -> Attention | None:
    """The scores of each layer, computed by `reference_attention` from the layer's input."""
    layers: list[AttentionScores] = []

    def record(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(layer, SelfAttention)
        layers.append(reference_attention(layer.attention_inputs(inputs[0]))[1])

    with ExitStack() as hooks:
        for layer in model.modules():
            if isinstance(layer, SelfAttention):
                hooks.enter_context(layer.register_forward_pre_hook(record))
        model(torch.tensor([list(tokens)], device=model.device))
    if isinstance(model, Average):
        zeros_BHTD = torch.zeros(1, 1, len(tokens), 1)  # a running mean is attention with equal scores
        layers.append(reference_attention(AttentionInputs(zeros_BHTD, zeros_BHTD, zeros_BHTD, bias=None, mask=None))[1])
    return Attention(*(_to_numpy(torch.cat(scores)) for scores in zip(*layers, strict=True))) if layers else None


def _positions(model: LanguageModel) -> Positions | None:
    values = []  # those of every layer are equal, except the trained ones of the scheme relative
    for part in model.modules():
        match part:
            case positions.LearnedPositions():
                values.append(part.table.weight)
            case positions.SinusoidalPositions():
                values.append(torch.cat([part.table[:, 0::2], part.table[:, 1::2]], dim=1))
            case positions.RotaryPositions():
                values.append(part.rotations.real)
            case positions.RelativePositions():
                values.append(part.table.weight.norm(dim=-1)[None])
            case positions.AlibiPositions():
                values.append(-part.slopes[:, 0] * torch.arange(model.config.block_size, device=model.device))
    scheme = model.config.position
    return Positions(scheme, _to_numpy(torch.cat(values if scheme == "relative" else values[:1]))) if values else None


def _to_numpy(values: Tensor) -> Numbers:
    array: Numbers = values.float().cpu().numpy()
    return array
