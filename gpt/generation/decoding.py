"""Decoding: generate tokens one by one for a batch of sequences. Shapes: B sequences, T positions, V tokens."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt.generation.sampling import Sampler, SamplingParams, sample_tokens
from gpt.model.gpt import LanguageModel
from gpt.model.kv_cache import KVCache, round_up

if TYPE_CHECKING:
    from gpt.generation.compiled_step import CompiledStep

MIN_ROWS = 4  # of a matrix product: torch has other kernels for fewer rows, which round differently


@torch.inference_mode()
def generate_tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    seeds: Sequence[int],
    *,
    cached: bool = True,
    compiled: bool = True,
) -> Iterator[list[int]]:
    """Continue a batch of prompts of at least one token each; yield the next token of each sequence, step by step.

    Args:
        seeds: one for each prompt. The same seed gives the same tokens.
        cached: see `Decoder`.
        compiled: see `Decoder`.
    """
    decoder = Decoder(model, len(prompts), cached=cached, compiled=compiled)
    logits_BV = torch.stack([logits_TV[-1] for logits_TV in decoder.add(prompts)])
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
    depend on the others: see `CompiledStep`; in torch, products have at least `MIN_ROWS` rows, and lengths are padded
    to a multiple of `LENGTH_STEP`.

    Of a longer prompt the window holds the end. A full window keeps its last half and the next token, and is computed
    again, since the position of every token changes. This is the same for all position schemes.

    Args:
        capacity: largest number of sequences at a time.
        cached: keep keys and values, so that a step computes one token; without, every step computes the whole window.
        compiled: compute the steps by `CompiledStep` where it applies. Prompts are computed in torch.
    """

    def __init__(self, model: LanguageModel, capacity: int, *, cached: bool = True, compiled: bool = True) -> None:
        self._model, self._block_size = model, model.config.block_size
        self._cache = model.make_cache(max(capacity, MIN_ROWS)) if cached else None
        self._compiled = compiled and cached
        self._windows: list[list[int]] = []

    @cached_property
    def compiled_step(self) -> "CompiledStep | None":
        """The compiled step; the first use loads it, or compiles it where it has never been used (5 seconds)."""
        if not self._compiled:
            return None
        from gpt.generation.compiled_step import CompiledStep  # noqa: PLC0415 (Numba takes half a second)

        return CompiledStep.of(self._model)

    @torch.inference_mode()
    def add(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Add sequences after the others; returns the logits at all positions of their windows, (T, V) each."""
        first = len(self._windows)
        self._windows += [list(prompt[-self._block_size :]) for prompt in prompts]
        return self._prefill(range(first, len(self._windows)))

    def remove(self, sequence: int) -> None:
        """Remove a sequence; the last one takes its place."""
        last = len(self._windows) - 1
        if self._cache:
            if sequence != last:
                self._row(self._cache, sequence).copy_from(self._row(self._cache, last))
            self._row(self._cache, last).clear()
        self._windows[sequence] = self._windows[last]
        self._windows.pop()

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each sequence; returns logits (B, V), float32 on the CPU."""
        full = []
        for sequence, (window, token) in enumerate(zip(self._windows, tokens, strict=True)):
            window.append(token)
            if len(window) > self._block_size:
                del window[: -(self._block_size // 2 + 1)]
                full.append(sequence)
        if self._cache is None or (self.compiled_step is None and len(full) == len(tokens)):
            return torch.stack([logits_TV[-1] for logits_TV in self._prefill(range(len(tokens)))])
        for sequence in full:
            self._row(self._cache, sequence).clear()
        if self.compiled_step:
            lengths = self._cache.lengths_B.tolist()
            missing = [window[length:] for window, length in zip(self._windows, lengths, strict=False)]
            return self.compiled_step(missing, self._cache)
        logits_BV = self._next(self._cache, tokens)  # the full windows stay in the batch
        for sequence, logits_TV in zip(full, self._prefill(full), strict=True):
            logits_BV[sequence] = logits_TV[-1]
        return logits_BV

    def _next(self, cache: KVCache, tokens: Sequence[int]) -> Tensor:
        """Compute one token of each sequence, (B, V); unused rows of the cache fill the batch up to `MIN_ROWS`."""
        rows = max(len(tokens), MIN_ROWS)
        if len(cache.lengths_B) != rows:
            cache = cache.rows(0, rows)
        last_B1 = torch.tensor([*tokens, *[0] * (rows - len(tokens))], device=self._model.device)[:, None]
        logits_BTV: Tensor = self._model(last_B1, cache)
        cache.advance(1, len(tokens))
        return logits_BTV[: len(tokens), -1].float().cpu()

    def _prefill(self, sequences: Sequence[int]) -> list[Tensor]:
        """Compute the windows of sequences from the start, (T, V) each; those of the same padded length together."""
        logits: dict[int, Tensor] = {}
        groups: dict[int, list[int]] = {}
        for sequence in sequences:
            groups.setdefault(round_up(len(self._windows[sequence])), []).append(sequence)
        for length, group in groups.items():
            windows = [self._windows[sequence] for sequence in group]
            padded = [window + [0] * (min(length, self._block_size) - len(window)) for window in windows]
            cache = self._model.make_cache(len(group)) if self._cache else None
            logits_BTV = self._model(torch.tensor(padded, device=self._model.device), cache).float().cpu()
            for row, (sequence, window) in enumerate(zip(group, windows, strict=True)):
                logits[sequence] = logits_BTV[row, : len(window)]
                if self._cache and cache:
                    filled = self._row(cache, row)
                    filled.advance(len(window))
                    self._row(self._cache, sequence).copy_from(filled)
        return [logits[sequence] for sequence in sequences]

    @staticmethod
    def _row(cache: KVCache, sequence: int) -> KVCache:
        return cache.rows(sequence, sequence + 1)
