"""Sampling: from scores to the next token, one token after the other, for several texts side by side."""

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from gpt.model import LanguageModel
from gpt.params import Section


class SamplingParams(Section):
    """How text is sampled. The only settings with defaults, so that a checkpoint alone is enough to make text."""

    max_new_tokens: int = Field(default=500, ge=1)
    temperature: float = Field(default=0.8, ge=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    seed: int = Field(default=1337, ge=0)


@torch.inference_mode()
def sample(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    seeds: Sequence[int],
    *,
    cached: bool = True,
) -> Iterator[list[int]]:
    """Continue prompts of at least one token each, side by side, which takes less time than in turn.

    Yields the new tokens as they are drawn, one a text. The same seed gives the same text.

    Args:
        seeds: one for each prompt.
        cached: whether keys and values are kept (`Reader`).
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    reader = Reader(model, texts=len(prompts), cached=cached)
    read = [list(prompt) for prompt in prompts]
    seen_BV: Tensor | None = None
    for _ in range(params.max_new_tokens):
        logits_BV = reader.scores(read)
        if seen_BV is None:
            seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
        for row, tokens in enumerate(read):
            seen_BV[row, tokens] = True
        drawn = _draw(filtered(logits_BV, seen_BV, params), generators)
        yield drawn
        read = [[token] for token in drawn]


class Reader:
    """A model that reads texts side by side, each token once, and says what it expects after the last one of each.

    It sees at most `block_size` tokens: of a longer prompt the end; when the window of a text is full, its last half
    stays and is read again. One rule for every scheme of positions, with and without a cache.

    Args:
        cached: whether keys and values are kept; without, every window is read anew at every token, as a reference.
    """

    def __init__(self, model: LanguageModel, texts: int, *, cached: bool = True) -> None:
        self._model = model
        self._cache = model.empty_cache(texts) if cached else None
        self._windows: list[list[int]] = [[] for _ in range(texts)]

    def scores(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Read on in each text, and score every token as its next one: logits (B, V), float32 on the CPU."""
        anew = [row for row, new in enumerate(tokens) if self._extend(self._windows[row], new) or self._cache is None]
        parts = []
        if len(anew) < len(tokens):
            parts.append((list(range(len(tokens))), self._one_more(anew)))
        if anew:
            parts.append((anew, self._read_anew(anew)))
        logits_BV = torch.empty(len(tokens), parts[0][1].shape[-1])
        for rows, found in parts:
            logits_BV[rows] = found.float().cpu()
        return logits_BV

    def _extend(self, window: list[int], new: Sequence[int]) -> bool:
        """Add tokens to a window; returns whether it has to be read anew, and not just its last token."""
        block, known = self._model.params.block_size, len(window)
        window += new
        if len(window) <= block:
            return not known or len(new) > 1
        del window[: -(block // 2 + 1) if known else -block]
        return True

    def _one_more(self, anew: list[int]) -> Tensor:
        """Read the last token of every text, behind what the cache holds; texts to be read anew stand in the row."""
        assert self._cache
        self._cache.forget(anew)
        last_BT = torch.tensor([window[-1:] for window in self._windows], device=self._model.device)
        logits_BTV: Tensor = self._model(last_BT, self._cache)
        self._cache.advance(1)
        return logits_BTV[:, -1]

    def _read_anew(self, rows: list[int]) -> Tensor:
        """Read the windows of these texts from their beginnings on, the shorter ones filled up behind their ends."""
        lengths = [len(self._windows[row]) for row in rows]
        padded = [self._windows[row] + [0] * (max(lengths) - len(self._windows[row])) for row in rows]
        cache = self._model.empty_cache(len(rows)) if self._cache else None
        logits_BTV: Tensor = self._model(torch.tensor(padded, device=self._model.device), cache)
        if self._cache and cache:
            cache.advance(torch.tensor(lengths, device=self._model.device))
            self._cache.put(rows, cache)
        return logits_BTV[range(len(rows)), [length - 1 for length in lengths]]


def filtered(logits_BV: Tensor, seen_BV: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities to draw from: what was seen already is made less likely, then the temperature, then the filters.

    Args:
        seen_BV: which tokens a text, with its prompt, holds already.
    """
    logits_BV = with_temperature(penalise(logits_BV, seen_BV, params.repetition_penalty), params.temperature)
    logits_BV = keep_top_p(keep_top_k(logits_BV, params.top_k), params.top_p)
    return keep_min_p(logits_BV, params.min_p).softmax(-1)


def penalise(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Divide positive scores of seen tokens by it, multiply negative ones with it (Keskar et al. 2019, section 4.1)."""
    return torch.where(seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def with_temperature(logits_BV: Tensor, temperature: float) -> Tensor:
    """Sharpen the choice below 1, flatten it above; 0 leaves the highest score alone, the first of equal ones."""
    if temperature == 0:
        return torch.full_like(logits_BV, -torch.inf).scatter(-1, logits_BV.argmax(-1, keepdim=True), 0.0)
    # Subtract the maximum first: at a tiny temperature the quotient alone would overflow.
    return (logits_BV - logits_BV.max(-1, keepdim=True).values) / temperature


def keep_top_k(logits_BV: Tensor, k: int | None) -> Tensor:
    """Rule out all but the k highest scores (Fan et al. 2018, section 5.4); None and a k over V keep all."""
    if k is None or k >= logits_BV.shape[-1]:
        return logits_BV
    return logits_BV.masked_fill(logits_BV < logits_BV.topk(k).values[..., -1:], -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float | None) -> Tensor:
    """Keep the fewest tokens, likeliest first, that together have probability p (Holtzman et al. 2020, section 3.1)."""
    if p is None or p >= 1:
        return logits_BV
    probabilities_BV, order_BV = logits_BV.softmax(-1).sort(descending=True, stable=True)
    needless_BV = probabilities_BV.cumsum(-1) - probabilities_BV >= p  # those before have it already
    return logits_BV.masked_fill(needless_BV.scatter(-1, order_BV, needless_BV), -torch.inf)


def keep_min_p(logits_BV: Tensor, p: float | None) -> Tensor:
    """Rule out what is less likely than p times the likeliest token (Nguyen et al. 2024, section 3)."""
    if not p:
        return logits_BV
    probabilities_BV = logits_BV.softmax(-1)
    return logits_BV.masked_fill(probabilities_BV < p * probabilities_BV.max(-1, keepdim=True).values, -torch.inf)


def _draw(probabilities_BV: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
    return [
        int(torch.multinomial(probabilities_V, 1, generator=generator))
        for probabilities_V, generator in zip(probabilities_BV, generators, strict=True)
    ]
