"""Text generation: continue prompts with a trained model, as a stream of chunks or as one document."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import tee
from operator import itemgetter
from typing import Annotated

import torch
from pydantic import Field

from gpt.core.errors import UserError
from gpt.generation.decoding import generate_tokens
from gpt.generation.sampling import SamplingParams
from gpt.model.checkpoint import Checkpoint
from gpt.model.device import CPU_THREADS
from gpt.model.memory import Term, activations, cache, check_memory, position_tables, weights

CPU = torch.device("cpu")
BATCH_SIZE = 16  # larger batches need more memory and are hardly faster
COPIES = 4  # of the weights: in the file, as loaded, in the model, in the compiled step
BYTES_PER_STEP = 200  # the tokens of a batch that are kept until their sample is read
BYTES_PER_SAMPLE = 100  # in the list of all samples


class GenerateParams(SamplingParams):
    """The section `generate`; in a params file every key is required."""

    prompts: list[str] = Field(default=[""], min_length=1)
    samples: Annotated[int, Field(ge=1, le=10**6)] = 1
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[])


def generate_texts(
    checkpoint: Checkpoint, params: GenerateParams, *, cached: bool = True
) -> Iterator[tuple[str, int, Iterator[str]]]:
    """Generate all samples of all prompts: yields the prompt, the number of the sample (from 1) and its text in chunks.

    An empty prompt stands for a newline, or for the first token of a vocabulary without one. Runs on the CPU: for one
    token at a time a GPU is no faster, and gives other bits.

    Raises:
        UserError: a prompt contains characters that are not in the vocabulary, or the memory does not suffice.
    """
    torch.set_num_threads(CPU_THREADS)
    tokenizer = checkpoint.tokenizer
    encoded = {prompt: _encode(checkpoint, prompt) if prompt else [tokenizer.start_token] for prompt in params.prompts}
    check_memory("generation", generation_memory(checkpoint, params, max(map(len, encoded.values()))), CPU)
    model = checkpoint.build()
    samples = [(prompt, number) for prompt in params.prompts for number in range(1, params.samples + 1)]
    for first in range(0, len(samples), BATCH_SIZE):
        batch = samples[first : first + BATCH_SIZE]
        seeds = range(params.seed + first, params.seed + first + len(batch))
        steps = generate_tokens(model, [encoded[prompt] for prompt, _ in batch], params, seeds, cached=cached)
        # The first sample is streamed as it is generated; tee keeps the tokens of the others until they are read.
        for index, ((prompt, number), copy) in enumerate(zip(batch, tee(steps, len(batch)), strict=True)):
            yield prompt, number, stop_before(tokenizer.stream(map(itemgetter(index), copy)), params.stop)


def generation_memory(checkpoint: Checkpoint, params: GenerateParams, longest_prompt: int) -> list[Term]:
    """An estimate of the memory; stop strings may end a text long before `max_new_tokens`."""
    samples = {"generate.samples": params.samples, "generate.prompts": len(params.prompts)}
    batch = min(BATCH_SIZE, params.samples * len(params.prompts))
    terms = [
        *decoding_memory(checkpoint, {"generate.samples": batch}, longest_prompt + params.max_new_tokens),
        Term(samples, BYTES_PER_SAMPLE),
    ]
    kept = batch > 1 and not params.stop
    return [*terms, Term({"generate.max_new_tokens": params.max_new_tokens}, BYTES_PER_STEP)] if kept else terms


def decoding_memory(checkpoint: Checkpoint, batch: Mapping[str, int], length: int) -> list[Term]:
    """An estimate of the memory of a model and its decoder.

    Args:
        batch: number of sequences, by the key or option that it depends on.
        length: tokens of the longest sequence.
    """
    model, vocab_size = checkpoint.model, checkpoint.tokenizer.vocab_size
    return [
        *(term.times(COPIES) for term in weights(model, vocab_size)),
        *position_tables(model),
        *activations(model, vocab_size, batch, 1, backward=False),
        *activations(model, vocab_size, {}, min(model.block_size, length), backward=False),
        *cache(model, math.prod(batch.values())),
    ]


class StopFilter:
    """Passes on the text up to the first stop string; text that may be the start of one is held back."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.found = False
        self._stop, self._longest = stop, max(map(len, stop), default=1)
        self._held = ""

    def push(self, text: str) -> str:
        """Add text; returns what is ready."""
        self._held += text
        starts = [index for index in map(self._held.find, self._stop) if index >= 0]
        self.found = bool(starts)
        ready = min(starts) if starts else max(len(self._held) - self._longest + 1, 0)
        passed, self._held = self._held[:ready], "" if self.found else self._held[ready:]
        return passed

    def end(self) -> str:
        """The text that was held back, at the end of a text without a stop string."""
        return self._held


def stop_before(chunks: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """Pass on the text up to the first stop string."""
    stop_filter = StopFilter(stop)
    for chunk in chunks:
        if ready := stop_filter.push(chunk):
            yield ready
        if stop_filter.found:
            return
    yield stop_filter.end()


def samples_document(checkpoint: Checkpoint, params: GenerateParams, digest: str, *, cached: bool) -> str:
    """All samples as one text, with a header that names the checkpoint and corpus by SHA-256, and the settings."""
    lines = [
        f"checkpoint SHA-256 {digest}",
        f"corpus     SHA-256 {checkpoint.about['corpus_sha256']}",
        _describe_sampling(params),
    ]
    rule = "=" * 80
    for prompt, number, chunks in generate_texts(checkpoint, params, cached=cached):
        lines += ["", rule, f"prompt {prompt!r}, sample {number} of {params.samples}", rule, prompt + "".join(chunks)]
    return "\n".join(lines) + "\n"


def _describe_sampling(params: GenerateParams) -> str:
    """The sampling settings in one line; optional ones are listed if they differ from their defaults."""
    optional = {name: getattr(params, name) for name in ("top_p", "min_p", "repetition_penalty", "stop")}
    fields = GenerateParams.model_fields
    used = "".join(f", {name} {value}" for name, value in optional.items() if value != fields[name].default)
    return f"temperature {params.temperature}, top_k {params.top_k or 'all'}{used}, seed {params.seed}"


def _encode(checkpoint: Checkpoint, prompt: str) -> list[int]:
    try:
        return [int(token) for token in checkpoint.tokenizer.encode(prompt)]
    except UserError as error:
        raise UserError(
            f"prompt {prompt!r}: {error}, or choose another prompt: generate.prompts in the params file, or --prompt; "
            "an empty one always works"
        ) from None
