"""Decoding with CUDA graphs: a step with fixed shapes, recorded once and replayed, so that it costs no Python.

The decoder of `gpt.generation` attends to as many positions as are filled, which needs their number on the CPU at each
step. Here attention is over all positions of the cache with a mask. On a CPU the same step runs without a graph.
"""

import statistics
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks.cuda_checks import BABY, FLOAT32, VOCABULARY, CheckFailedError, random_model
from benchmarks.cuda_training import TINY, peak_memory, reset_peak_memory, synchronize
from benchmarks.parts import Results, Setup, Task
from benchmarks.races import ROOT
from benchmarks.steps import seconds
from gpt.core.params import read_section
from gpt.generation.decoding import Decoder
from gpt.model.config import ModelConfig
from gpt.model.device import choose_device
from gpt.model.gpt import LanguageModel
from gpt.model.kv_cache import KVCache, NextTokens

BATCH_SIZES = (1, 64)
PROMPT, TEMPERATURE, WARM_UP, ROUNDS = 8, 0.8, 3, 3


class FixedCache(KVCache):
    """A cache whose `next_tokens` has the same shapes at every step."""

    def next_tokens(self, count: int) -> NextTokens:
        """See `KVCache`; S is the length of the cache."""
        if self._next is None:
            device, end = self.lengths_B.device, self.keys_LBHSD.shape[3]
            positions_BT = self.lengths_B[:, None] + torch.arange(count, device=device)
            mask_BTS = positions_BT[..., None] >= torch.arange(end, device=device)
            self._next = NextTokens(positions_BT, end, mask_BTS[:, None])
        return self._next


class GraphDecoder:
    """Continues B sequences of equal length by sampling; nothing leaves the device.

    Attributes:
        tokens_B1: the last token of each sequence, input of the next step.
        logits_BV: those of the last step.
    """

    @torch.no_grad()
    def __init__(self, model: LanguageModel, batch_size: int) -> None:
        cache = model.make_cache(batch_size)
        self._model = model
        self._cache = FixedCache(cache.keys_LBHSD, cache.values_LBHSD, cache.tokens_BS, cache.lengths_B)
        self.tokens_B1 = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)
        self.logits_BV = torch.zeros(batch_size, VOCABULARY, device=model.device)
        self._graph = self._record() if model.device.type == "cuda" else None

    def _record(self) -> "torch.cuda.CUDAGraph":
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate their memory in the first calls
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._cache.clear()
        return graph

    @torch.no_grad()
    def prefill(self, prompt_BT: Tensor) -> None:
        """Start new sequences with prompts of equal length; their last token is the input of the first step."""
        self._cache.clear()
        self._model(prompt_BT[:, :-1], self._cache)
        self._cache.advance(prompt_BT.shape[1] - 1)
        self.tokens_B1.copy_(prompt_BT[:, -1:])

    @torch.no_grad()
    def step(self) -> None:
        """Append a token to each sequence; the caller takes care that there are at most `block_size`."""
        if self._graph:
            self._graph.replay()
        else:
            self._step()

    def _step(self) -> None:
        self.logits_BV.copy_(self._model(self.tokens_B1, self._cache)[:, -1])
        self._cache.advance(1)
        probabilities_BV = torch.softmax(self.logits_BV / TEMPERATURE, dim=-1)
        # The first of exponential clocks with these rates rings with these probabilities: sampling without a transfer.
        clocks_BV = torch.empty_like(probabilities_BV).exponential_()
        self.tokens_B1.copy_((probabilities_BV / clocks_BV).argmax(-1, keepdim=True))


def decodings(setup: Setup) -> Mapping[str, Task]:
    """Each model and batch size."""
    changes = [change for change in TINY if change.startswith("model.")] if setup.tiny else []
    return {
        f"{recipe}, batch {batch_size}": partial(
            decode, read_section(ROOT / recipe, "model", ModelConfig, changes), batch_size, setup
        )
        for recipe in ("params.yaml", BABY)
        for batch_size in BATCH_SIZES
    }


def decode(config: ModelConfig, batch_size: int, setup: Setup) -> Results:
    """Tokens per second of all sequences together, of the recorded step and of the usual decoder.

    Raises:
        CheckFailedError: the logits of the two differ.
    """
    device = choose_device(setup.device, "--device")
    reset_peak_memory(device)
    model = random_model(config).to(device)
    decoder = GraphDecoder(model, batch_size)
    difference = compare(decoder, model, batch_size)
    steps = config.block_size - PROMPT
    prompt_BT = torch.zeros(batch_size, PROMPT, dtype=torch.int64, device=device)

    def recorded() -> None:
        decoder.prefill(prompt_BT)
        for _ in range(steps):
            decoder.step()
        synchronize(device)

    def usual() -> None:
        other = Decoder(model, batch_size)
        logits_BV = torch.stack([logits_TV[-1] for logits_TV in other.add(prompt_BT.tolist())])
        for _ in range(steps):
            logits_BV = other.step(logits_BV.argmax(-1).tolist())

    speeds = {
        name: batch_size * steps / statistics.median(seconds(run, 1) for _ in range(ROUNDS))
        for name, run in {"graph": recorded, "usual": usual}.items()
    }
    return {
        "tokens_per_second": speeds,
        "recorded": device.type == "cuda",
        "relative_difference": difference,
        "peak_memory_gb": peak_memory(device) / 1e9,
    }


def compare(decoder: GraphDecoder, model: LanguageModel, batch_size: int) -> float:
    """The largest difference to the logits of the usual decoder, for random tokens, relative to the largest logit.

    Raises:
        CheckFailedError: it is above `FLOAT32`.
    """
    torch.manual_seed(2)
    tokens_BT = torch.randint(VOCABULARY, (batch_size, model.config.block_size))
    usual = Decoder(model, batch_size)
    usual.add(tokens_BT[:, : PROMPT - 1].tolist())
    decoder.prefill(tokens_BT[:, :PROMPT].to(model.device))
    worst = largest = 0.0
    for position in range(PROMPT - 1, model.config.block_size):
        decoder.tokens_B1.copy_(tokens_BT[:, position : position + 1])
        decoder.step()
        expected_BV = usual.step(tokens_BT[:, position].tolist())
        worst = max(worst, float((decoder.logits_BV.cpu() - expected_BV).abs().max()))
        largest = max(largest, float(expected_BV.abs().max()))
    if not worst < FLOAT32 * largest:
        raise CheckFailedError(f"expected logits within {FLOAT32}, found a difference of {worst / largest:.2g}")
    return worst / largest
