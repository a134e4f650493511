"""Decoding: generate tokens one by one for a batch of sequences. Shapes: B sequences, T positions, V tokens."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gpt.generation.sampling import SamplingParams, next_token_probabilities, sample_tokens
from gpt.model.gpt import LanguageModel
from gpt.model.kv_cache import KVCache


@torch.inference_mode()
def generate_tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    seeds: Sequence[int],
    *,
    cached: bool = True,
) -> Iterator[list[int]]:
    """Continue a batch of prompts of at least one token each; yield the next token of each sequence, step by step.

    Args:
        seeds: one for each prompt. The same seed gives the same tokens.
        cached: see `Decoder`.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    decoder = Decoder(model, cached=cached)
    logits_BV = decoder.prefill(prompts)
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    for sequence, prompt in enumerate(prompts):
        seen_BV[sequence, list(prompt)] = True
    for step in range(1, params.max_new_tokens + 1):
        tokens = sample_tokens(next_token_probabilities(logits_BV, seen_BV, params), generators)
        yield tokens
        if step < params.max_new_tokens:
            seen_BV[range(len(tokens)), tokens] = True
            logits_BV = decoder.step(tokens)


class Decoder:
    """Computes the logits of the next token for a batch of growing sequences, each in a window of `block_size` tokens.

    Of a longer prompt the window holds the end. A full window keeps its last half and the next token, and is prefilled
    again, since the position of every token changes. This is the same for all position schemes.

    Args:
        cached: keep keys and values, so that a step computes one token; without, every step computes the whole window.
    """

    def __init__(self, model: LanguageModel, *, cached: bool = True) -> None:
        self._model, self._cached = model, cached
        self._block_size = model.config.block_size
        self._windows: list[list[int]] = []
        self._cache: KVCache | None = None

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start with these prompts; returns logits (B, V), float32 on the CPU."""
        self._windows = [list(prompt[-self._block_size :]) for prompt in prompts]
        self._cache = self._model.make_cache(len(prompts)) if self._cached else None
        return self._prefill(list(range(len(prompts))))

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each sequence; returns logits (B, V), float32 on the CPU."""
        overflowed = []
        for sequence, (window, token) in enumerate(zip(self._windows, tokens, strict=True)):
            window.append(token)
            if len(window) > self._block_size:
                del window[: -(self._block_size // 2 + 1)]
                overflowed.append(sequence)
        if self._cache is None or len(overflowed) == len(tokens):
            return self._prefill(list(range(len(tokens))))
        self._cache.reset(overflowed)  # they stay in the batch; their logits are replaced below
        last_B1 = torch.tensor(tokens, device=self._model.device)[:, None]
        logits_BV: Tensor = self._model(last_B1, self._cache)[:, -1].float().cpu()
        self._cache.advance(1)
        if overflowed:
            logits_BV[overflowed] = self._prefill(overflowed)
        return logits_BV

    def _prefill(self, sequences: list[int]) -> Tensor:
        """Compute the windows of some sequences from the start, the shorter ones padded at the end."""
        windows = [self._windows[sequence] for sequence in sequences]
        lengths_B = torch.tensor([len(window) for window in windows], device=self._model.device)
        padded = [window + [0] * (int(lengths_B.max()) - len(window)) for window in windows]
        cache = self._model.make_cache(len(sequences)) if self._cache else None
        logits_BTV: Tensor = self._model(torch.tensor(padded, device=self._model.device), cache)
        if self._cache and cache:
            cache.advance(lengths_B)
            self._cache.copy_from(cache, sequences)
        return logits_BTV[range(len(windows)), lengths_B - 1].float().cpu()
