"""Sampling: from scores to the next token, one token after the other, for several texts side by side."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gpt.generation.sampling import (
    SamplingParams,
    draw,
    filtered,
)
from gpt.model.gpt import LanguageModel


@torch.inference_mode()
def generate_tokens(
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
        cached: whether keys and values are kept (`Decoder`).
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    reader = Decoder(model, texts=len(prompts), cached=cached)
    read = [list(prompt) for prompt in prompts]
    seen_BV: Tensor | None = None
    for _ in range(params.max_new_tokens):
        logits_BV = reader.step(read)
        if seen_BV is None:
            seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
        for row, tokens in enumerate(read):
            seen_BV[row, tokens] = True
        drawn = draw(filtered(logits_BV, seen_BV, params), generators)
        yield drawn
        read = [[token] for token in drawn]


class Decoder:
    """A model that reads texts side by side, each token once, and says what it expects after the last one of each.

    It sees at most `block_size` tokens: of a longer prompt the end; when the window of a text is full, its last half
    stays and is read again. One rule for every scheme of positions, with and without a cache.

    Args:
        cached: whether keys and values are kept; without, every window is read anew at every token, as a reference.
    """

    def __init__(self, model: LanguageModel, texts: int, *, cached: bool = True) -> None:
        self._model = model
        self._cache = model.make_cache(texts) if cached else None
        self._windows: list[list[int]] = [[] for _ in range(texts)]

    def step(self, tokens: Sequence[Sequence[int]]) -> Tensor:
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
        cache = self._model.make_cache(len(rows)) if self._cache else None
        logits_BTV: Tensor = self._model(torch.tensor(padded, device=self._model.device), cache)
        if self._cache and cache:
            cache.advance(torch.tensor(lengths, device=self._model.device))
            self._cache.put(rows, cache)
        return logits_BTV[range(len(rows)), [length - 1 for length in lengths]]
