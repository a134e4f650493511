"""Look into a model while it reads: what a head takes from where, how places are told apart, which symbols are alike.

L layers of H heads; T positions that ask, as many that are asked; C channels, V symbols.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt.model.attention import AttentionScores, SelfAttention, reference_attention
from gpt.model.baselines import Average, Bigram
from gpt.model.gpt import LanguageModel
from gpt.model.positions import (
    AlibiPositions,
    LearnedPositions,
    RelativePositions,
    RotaryPositions,
    SinusoidalPositions,
)

Numbers = np.ndarray[Any, np.dtype[np.float32]]
Decode = Callable[[Iterable[int]], str]  # a tokenizer's

SYMBOLS = 80  # that are compared with each other; of a larger vocabulary the first ones
VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}


@dataclass(frozen=True)
class Attention:
    """Scores of every head before the mask, after it, and after softmax, each (L, H, T, T); a row asks the columns."""

    raw: Numbers
    masked: Numbers
    weights: Numbers


@dataclass(frozen=True)
class Positions:
    """What the model's scheme of positions works with.

    `values` of learned, sinusoidal: (places, C), what is added; all sines, then all cosines. Of rotary: (places, half
    the C of a head), the cosine of the angle. Of relative: (L, distances), the length of the vector. Of alibi:
    (H, distances), what is added to a score.
    """

    scheme: str
    values: Numbers


@dataclass(frozen=True)
class Insight:
    """What one sees in a model that reads a text.

    `attention` is None where the model has none (bigram), `positions` where it tells no places apart. The rows of
    `embeddings` (V, C) are those of `symbols`; of a bigram, its table.
    """

    kind: str
    labels: tuple[str, ...]
    attention: Attention | None
    positions: Positions | None
    symbols: tuple[str, ...]
    embeddings: Numbers

    def neighbours(self) -> tuple[list[str], Numbers]:
        """The symbols, those alike side by side, and the cosines between their embeddings, (V, V)."""
        lengths_V1 = np.linalg.norm(self.embeddings, axis=1, keepdims=True)
        directions_VC = self.embeddings / np.maximum(lengths_V1, np.finfo(np.float32).tiny)
        cosines_VV = directions_VC @ directions_VC.T
        order = side_by_side(cosines_VV)
        return [self.symbols[place] for place in order], cosines_VV[np.ix_(order, order)]


@torch.inference_mode()
def look(model: LanguageModel, tokens: Sequence[int], decode: Decode) -> Insight:
    """Let a model read a text of at most `block_size` tokens, in float32, and note what it does on the way."""
    embeddings_VC = _embeddings(model)
    shown = range(min(len(embeddings_VC), SYMBOLS))
    return Insight(
        kind=model.config.kind,
        labels=tuple(visible(decode([token])) for token in tokens),
        attention=_attention(model, tokens),
        positions=_positions(model),
        symbols=tuple(visible(decode([symbol])) for symbol in shown),
        embeddings=_numbers(embeddings_VC[: len(shown)]),
    )


def visible(token: str) -> str:
    """A token as a label: what cannot be seen gets a sign."""
    return "".join(VISIBLE.get(one) or (one if one.isprintable() else ascii(one)[1:-1]) for one in token) or "∅"


def side_by_side(alike_VV: Numbers) -> list[int]:
    """Order things so that those which are alike stand together.

    The two groups that are most alike on average are joined, again and again (Sokal & Michener 1958); each pair is
    joined by those of its ends that fit best.
    """
    groups = {place: [place] for place in range(len(alike_VV))}
    between_VV = np.array(alike_VV, dtype=np.float64)
    np.fill_diagonal(between_VV, -np.inf)
    while len(groups) > 1:
        first, second = sorted(map(int, np.unravel_index(between_VV.argmax(), between_VV.shape)))
        left, right = groups[first], groups.pop(second)
        turned = [(a, b) for a in (left, left[::-1]) for b in (right, right[::-1])]
        before, after = max(turned, key=lambda pair: alike_VV[pair[0][-1], pair[1][0]])
        mean_V = (len(left) * between_VV[first] + len(right) * between_VV[second]) / (len(left) + len(right))
        between_VV[first], between_VV[:, first] = mean_V, mean_V
        between_VV[second], between_VV[:, second] = -np.inf, -np.inf
        groups[first] = before + after
    return next(iter(groups.values()))


def _attention(model: LanguageModel, tokens: Sequence[int]) -> Attention | None:
    """The scores of each layer, taken by the textbook from what the layer is given."""
    found: list[AttentionScores] = []

    def note(layer: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(layer, SelfAttention)
        found.append(reference_attention(layer.attention_inputs(given[0]))[1])

    hooks = [layer.register_forward_pre_hook(note) for layer in model.modules() if isinstance(layer, SelfAttention)]
    try:
        model(torch.tensor([list(tokens)], device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    if isinstance(model, Average):
        found.append(_mean(len(tokens)))
    if not found:
        return None
    raw, masked, weights = (
        _numbers(torch.cat([getattr(scores, name) for scores in found])) for name in ("raw", "masked", "weights")
    )
    return Attention(raw, masked, weights)


def _mean(length: int) -> AttentionScores:
    """A mean in the words of attention: every score is the same, so that softmax gives equal parts."""
    raw_BHTT = torch.zeros(1, 1, length, length)
    masked_BHTT = raw_BHTT.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    return AttentionScores(raw_BHTT, masked_BHTT, masked_BHTT.softmax(-1))


def _positions(model: LanguageModel) -> Positions | None:
    values = []
    for part in model.modules():
        match part:
            case LearnedPositions():
                values.append(part.table.weight)
            case SinusoidalPositions():
                values.append(torch.cat([part.table[:, 0::2], part.table[:, 1::2]], dim=1))
            case RotaryPositions():
                values.append(part.rotations.real)
            case RelativePositions():
                values.append(part.table.weight.norm(dim=-1)[None])
            case AlibiPositions():
                values.append(-part.slopes[:, 0] * torch.arange(model.config.block_size, device=model.device))
    if not values:
        return None
    scheme = model.config.position
    return Positions(scheme, _numbers(torch.cat(values) if scheme == "relative" else values[0]))


def _embeddings(model: LanguageModel) -> Tensor:
    part = model.table if isinstance(model, Bigram) else model.get_submodule("token_embedding")
    assert isinstance(part, nn.Embedding)
    return part.weight


def _numbers(values: Tensor) -> Numbers:
    found: Numbers = values.float().cpu().numpy()
    return found
