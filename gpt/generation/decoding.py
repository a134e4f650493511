"""Decoding: generate tokens one by one for a batch of sequences. Shapes: B sequences, T positions, V tokens."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gpt.generation.sampling import Sampler, SamplingParams, sample_tokens
from gpt.model.gpt import LanguageModel
from gpt.model.kv_cache import KVCache, round_up

MIN_ROWS = 4  # of a matrix product: torch has other kernels for fewer rows, which round differently


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
    decoder = Decoder(model, len(prompts), cached=cached)
    logits_BV = torch.stack([decoder.add(prompt)[-1] for prompt in prompts])
    vocab_size = logits_BV.shape[-1]
    samplers = [Sampler(params, seed, prompt, vocab_size) for prompt, seed in zip(prompts, seeds, strict=True)]
    for step in range(1, params.max_new_tokens + 1):
        tokens = sample_tokens(logits_BV, samplers)
        yield tokens
        if step < params.max_new_tokens:
            logits_BV = decoder.step(tokens)


class Decoder:
    """Computes the logits of the next token for growing sequences, each in a window of `block_size` tokens.

    Sequences can be added and removed at any time. They are computed as one batch, but the logits of a sequence do not
    depend on the others: products have at least `MIN_ROWS` rows, lengths are padded to a multiple of `LENGTH_STEP`, and
    each sequence is prefilled alone.

    Of a longer prompt the window holds the end. A full window keeps its last half and the next token, and is prefilled
    again, since the position of every token changes. This is the same for all position schemes.

    Args:
        capacity: largest number of sequences at a time.
        cached: keep keys and values, so that a step computes one token; without, every step computes the whole window.
    """

    def __init__(self, model: LanguageModel, capacity: int, *, cached: bool = True) -> None:
        self._model, self._block_size = model, model.config.block_size
        self._cache = model.make_cache(max(capacity, MIN_ROWS)) if cached else None
        self._windows: list[list[int]] = []

    @torch.inference_mode()
    def add(self, prompt: Sequence[int]) -> Tensor:
        """Add a sequence as the last one; returns the logits at all positions of its window, (T, V), on the CPU."""
        self._windows.append(list(prompt[-self._block_size :]))
        return self._prefill(len(self._windows) - 1)

    def remove(self, sequence: int) -> None:
        """Remove a sequence; the last one takes its place."""
        last = len(self._windows) - 1
        if self._cache and sequence != last:
            self._row(self._cache, sequence).copy_from(self._row(self._cache, last))
        self._windows[sequence] = self._windows[last]
        self._windows.pop()

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each sequence; returns logits (B, V), float32 on the CPU."""
        prefilled = []
        for sequence, (window, token) in enumerate(zip(self._windows, tokens, strict=True)):
            window.append(token)
            if len(window) > self._block_size:
                del window[: -(self._block_size // 2 + 1)]
                prefilled.append(sequence)
        if self._cache is None or len(prefilled) == len(tokens):
            return torch.stack([self._prefill(sequence)[-1] for sequence in range(len(tokens))])
        for sequence in prefilled:  # they stay in the batch; their logits are replaced below
            self._row(self._cache, sequence).clear()
        logits_BV = self._next(self._cache, tokens)
        for sequence in prefilled:
            logits_BV[sequence] = self._prefill(sequence)[-1]
        return logits_BV

    def _next(self, cache: KVCache, tokens: Sequence[int]) -> Tensor:
        """Compute one token of each sequence, (B, V); unused rows of the cache fill the batch up to `MIN_ROWS`."""
        rows = max(len(tokens), MIN_ROWS)
        cache.rows(len(tokens), rows).clear()
        batch = cache.rows(0, rows)
        last_B1 = torch.tensor([*tokens, *[0] * (rows - len(tokens))], device=self._model.device)[:, None]
        logits_BTV: Tensor = self._model(last_B1, batch)
        batch.advance(1)
        return logits_BTV[: len(tokens), -1].float().cpu()

    def _prefill(self, sequence: int) -> Tensor:
        """Compute the window of a sequence from the start, (T, V)."""
        window = self._windows[sequence]
        padding = min(round_up(len(window)), self._block_size) - len(window)
        row = self._row(self._cache, sequence) if self._cache else None
        if row:
            row.clear()
        logits_BTV: Tensor = self._model(torch.tensor([window + [0] * padding], device=self._model.device), row)
        if row:
            row.advance(len(window))
        return logits_BTV[0, : len(window)].float().cpu()

    @staticmethod
    def _row(cache: KVCache, sequence: int) -> KVCache:
        return cache.rows(sequence, sequence + 1)
