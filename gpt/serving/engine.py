"""Continuous batching: sequences join and leave a running batch between tokens. Shapes: T positions, V tokens."""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.core.errors import OneLineError
from gpt.generation.decoding import Decoder
from gpt.generation.sampling import Sampler, SamplingParams, sample_tokens
from gpt.model.gpt import LanguageModel

MAX_JOINING = 4  # sequences that are prefilled between two tokens of the others, which wait for it

log = logging.getLogger("gpt")


class BusyError(OneLineError):
    """The queue is full."""


class StepError(OneLineError):
    """A step failed, and the sequences of its batch are lost."""


@dataclass(frozen=True)
class ScoredToken:
    """A token, its log-probability, and the most probable tokens at its position with theirs, highest first.

    The probabilities are those of the model, before temperature and filters. `logprob` is None if it was not computed.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Generation:
    """One sequence: what to generate, and where its tokens go.

    Args:
        max_new_tokens: replaces that of the settings, and may be 0.
        top: number of most probable tokens to report for each token; None: compute no probabilities.
        score_prompt: report the tokens of the prompt, too.
        events: receives the tokens of each step, or the error that ended the generation. May be shared.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        seed: int,
        *,
        max_new_tokens: int,
        vocab_size: int,
        top: int | None,
        score_prompt: bool,
        events: "asyncio.Queue[Event]",
    ) -> None:
        self.prompt, self.top, self.score_prompt = prompt, top, score_prompt
        self.sampler = Sampler(params, seed, prompt, vocab_size)
        self.missing = max_new_tokens
        self.cancelled = False
        self.last = 0  # the token that was sampled last
        self._events = events

    def cancel(self) -> None:
        """Generate no more tokens: the place in the batch is free before the next step."""
        self.cancelled = True

    @property
    def ended(self) -> bool:
        """Whether a running sequence has to leave the batch."""
        return self.cancelled or not self.missing

    def deliver(self, tokens: list[ScoredToken] | OneLineError) -> None:
        """Pass on tokens, or an error."""
        self._events.put_nowait((self, tokens))


Event = tuple[Generation, list[ScoredToken] | OneLineError]


class Engine:
    """Runs the batch of one model.

    All state belongs to the event loop's thread; a step runs in the executor while nothing else touches the state.

    Args:
        executor: of one thread, in which all models compute.
        max_batch_size: sequences that are computed at a time.
        max_queue_size: sequences that may wait.
    """

    def __init__(self, model: LanguageModel, executor: Executor, *, max_batch_size: int, max_queue_size: int) -> None:
        self.running: list[Generation] = []  # in the order of the decoder's sequences
        self.waiting: deque[Generation] = deque()
        self._model, self._executor = model, executor
        self._max_batch_size, self._max_queue_size = max_batch_size, max_queue_size
        self._decoder = self._make_decoder()
        self._submitted, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue sequences.

        Raises:
            BusyError: they would exceed the size of the queue.
        """
        present = len(self.running) + len(self.waiting)
        if present + len(generations) > self._max_batch_size + self._max_queue_size:
            raise BusyError(f"the queue is full ({len(self.waiting)} sequences wait); try again later")
        self.waiting.extend(generations)
        self._idle.clear()
        self._submitted.set()

    async def drained(self) -> None:
        """Wait until no sequence is running or waiting."""
        await self._idle.wait()

    async def run(self) -> None:
        """Compute step after step, forever; waits while there is nothing to do."""
        loop = asyncio.get_running_loop()
        while True:
            self.waiting = deque(generation for generation in self.waiting if not generation.cancelled)
            if not self.running and not self.waiting:
                self._idle.set()
                self._submitted.clear()
                await self._submitted.wait()
            await self._run_step(loop)

    def _make_decoder(self) -> Decoder:
        decoder = Decoder(self._model, self._max_batch_size)
        log.info("decoding: %s", "compiled" if decoder.compiled_step else "torch")  # compiled now, not for a request
        return decoder

    async def _run_step(self, loop: asyncio.AbstractEventLoop) -> None:
        """Compute one token of each sequence and pass them on."""
        leaving = [generation for generation in self.running if generation.ended]
        free = self._max_batch_size - len(self.running) + len(leaving)
        joining = [self.waiting.popleft() for _ in range(min(free, MAX_JOINING, len(self.waiting)))]
        try:
            scored = await loop.run_in_executor(self._executor, self._step, leaving, joining)
        except Exception as error:
            log.exception("a step failed")
            for generation in {*self.running, *joining}:
                generation.deliver(StepError(f"the model failed: {type(error).__name__}; try again"))
            self.running, self._decoder = [], self._make_decoder()
            return
        for generation, tokens in zip(self.running, scored, strict=True):
            generation.deliver(tokens if generation.missing else tokens[:-1])
            generation.missing = max(generation.missing - 1, 0)

    @torch.inference_mode()
    def _step(self, leaving: Sequence[Generation], joining: Sequence[Generation]) -> list[list[ScoredToken]]:
        """Remove and add sequences, then sample the next token of each; runs in the executor."""
        for generation in leaving:
            index = self.running.index(generation)
            self._decoder.remove(index)
            self.running[index] = self.running[-1]
            self.running.pop()
        logits = list(self._decoder.step([each.last for each in self.running])) if self.running else []
        scored: list[list[ScoredToken]] = [[] for _ in self.running]
        prefilled = self._decoder.add([each.prompt for each in joining])
        for generation, logits_TV in zip(joining, prefilled, strict=True):
            self.running.append(generation)
            logits.append(logits_TV[-1])
            scored.append(_score_prompt(generation, logits_TV) if generation.score_prompt else [])
        tokens = sample_tokens(torch.stack(logits), [each.sampler for each in self.running]) if logits else []
        for generation, token, logits_V, before in zip(self.running, tokens, logits, scored, strict=True):
            generation.last = token
            before.append(_score(token, logits_V, generation.top))
        return scored


def _score(token: int, logits_V: Tensor, top: int | None) -> ScoredToken:
    if top is None:
        return ScoredToken(token)
    logprobs_V = logits_V.log_softmax(-1)
    highest = logprobs_V.topk(min(top, len(logprobs_V)))
    pairs = zip(highest.indices.tolist(), highest.values.tolist(), strict=True)
    return ScoredToken(token, float(logprobs_V[token]), tuple(pairs))


def _score_prompt(generation: Generation, logits_TV: Tensor) -> list[ScoredToken]:
    """The tokens of the prompt; the first one of the window, and those before it, were not predicted."""
    prompt, before = generation.prompt, len(generation.prompt) - len(logits_TV) + 1
    predicted = zip(prompt[before:], logits_TV[:-1], strict=True)
    scored = (_score(token, logits_V, generation.top) for token, logits_V in predicted)
    return [*map(ScoredToken, prompt[:before]), *scored]
