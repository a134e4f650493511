"""Sampling: from scores to the next token, one token after the other."""

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from gpt.model import GPT, empty_cache
from gpt.params import Section


class SamplingParams(Section):
    """How text is sampled. The only settings with defaults, so that a checkpoint alone is enough to make text."""

    max_new_tokens: int = Field(default=500, ge=1)
    temperature: float = Field(default=0.8, ge=0)
    top_k: int | None = Field(default=None, ge=1)
    seed: int = Field(default=1337, ge=0)


@torch.inference_mode()
def sample(model: GPT, prompt: Sequence[int], params: SamplingParams, seeds: Sequence[int]) -> Iterator[list[int]]:
    """Continue a prompt of at least one token once for each seed, side by side, which takes less time than in turn.

    Yields the new tokens as they are drawn, one a text. The same seed gives the same text.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    reader = Reader(model, texts=len(seeds))
    read_BT = torch.tensor([list(prompt)] * len(seeds))
    for _ in range(params.max_new_tokens):
        logits_BV = keep_top_k(reader.scores(read_BT), params.top_k)
        drawn = [_draw(*each, params.temperature) for each in zip(logits_BV, generators, strict=True)]
        yield drawn
        read_BT = torch.tensor(drawn)[:, None]


class Reader:
    """A model that reads texts side by side, each token once, and says what it expects after the last one.

    It sees at most `block_size` tokens: of a longer prompt the end; when the window is full, its last half stays and is
    read again.

    Args:
        cached: whether keys and values are kept; without, the whole window is read at every token, as a reference.
    """

    def __init__(self, model: GPT, texts: int, *, cached: bool = True) -> None:
        self._model = model
        self._device = model.token_embedding.weight.device
        self._cache = empty_cache(model.params, texts, self._device) if cached else None
        self._window_BT = torch.zeros(texts, 0, dtype=torch.int64)

    def scores(self, tokens_BT: Tensor) -> Tensor:
        """Read on, and score every token as the next one: (B, T) to logits (B, V), float32 on the CPU."""
        window_BT = torch.cat([self._window_BT, tokens_BT], dim=1)
        block = self._model.params.block_size
        if window_BT.shape[1] > block:
            kept = block // 2 + 1 if self._window_BT.shape[1] else block
            window_BT = tokens_BT = window_BT[:, -kept:]
            if self._cache:
                self._cache.clear()
        self._window_BT = window_BT
        unread_BT = tokens_BT if self._cache else window_BT
        logits_BTV: Tensor = self._model(unread_BT.to(self._device), self._cache)
        return logits_BTV[:, -1].float().cpu()


def keep_top_k(logits_BV: Tensor, k: int | None) -> Tensor:
    """Rule out all but the k highest scores (Fan et al. 2018, section 5.4); None and a k over V keep all."""
    if k is None or k >= logits_BV.shape[-1]:
        return logits_BV
    return logits_BV.masked_fill(logits_BV < logits_BV.topk(k).values[..., -1:], -torch.inf)


def _draw(logits_V: Tensor, generator: torch.Generator, temperature: float) -> int:
    """Draw a token; a low temperature sharpens the choice, 0 always takes the highest score."""
    if temperature == 0:
        return int(logits_V.argmax())
    # Subtract the maximum first: at a tiny temperature the quotient alone would overflow.
    probabilities_V = ((logits_V - logits_V.max()) / temperature).softmax(0)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
