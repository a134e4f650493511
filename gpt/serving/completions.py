"""A completion: from a request to sequences of the engine, and from their tokens to chunks of text."""

import asyncio
import codecs
import random
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from gpt.core.errors import OneLineError, UserError
from gpt.generation.text import StopFilter
from gpt.serving.engine import BusyError, Event, Generation, ScoredToken
from gpt.serving.models import ServedModel
from gpt.serving.protocol import CompletionRequest, RequestError, usage
from gpt.tokenizers.base import Tokenizer

MAX_SEED = 1 << 31


@dataclass
class Chunk:
    """The next part of a choice: its text, the scored tokens that it consists of, and whether it is the last one.

    `tokens` are pairs of a token and its offset in the text of the choice.
    """

    text: str = ""
    tokens: list[tuple[ScoredToken, int]] = field(default_factory=list)
    finish_reason: str | None = None


class Choice:
    """One generated text: decodes the tokens, and ends at the first stop string or after `max_tokens`."""

    def __init__(self, index: int, tokenizer: Tokenizer, stop: list[str], max_tokens: int) -> None:
        self.index, self.finished, self.count, self._max_tokens = index, False, 0, max_tokens
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._filter = StopFilter(stop)
        self._passed = self._decoded = 0  # characters
        self._pending: list[tuple[ScoredToken, int]] = []

    def echo(self, prompt: str, tokens: list[ScoredToken]) -> Chunk:
        """The prompt as the first part of the text."""
        self._passed = self._decoded = len(prompt)
        offset, scored = 0, []
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            scored.append((token, offset))
            offset += len(decoder.decode(self._token_bytes[token.token]))
        return Chunk(prompt, scored if prompt else [])

    def push(self, tokens: list[ScoredToken]) -> Chunk:
        """Add generated tokens."""
        text = "".join(self._ready(token) for token in tokens if not self._filter.found)
        if not self._filter.found and self.count == self._max_tokens:
            text += self._filter.push(self._decoder.decode(b"", final=True))
            text += self._filter.end()
            self.finished = True
            return self._chunk(text, "length")
        self.finished = self._filter.found
        return self._chunk(text, "stop" if self.finished else None)

    def _ready(self, token: ScoredToken) -> str:
        """Add one token; returns the text that is not the start of a stop string."""
        decoded = self._decoder.decode(self._token_bytes[token.token])
        self._pending.append((token, self._decoded))
        self._decoded += len(decoded)
        self.count += 1
        return self._filter.push(decoded)

    def _chunk(self, text: str, finish_reason: str | None) -> Chunk:
        """The text, with the tokens that begin in it or before it."""
        self._passed += len(text)
        ready = sum(offset < self._passed for _, offset in self._pending)
        tokens, self._pending = self._pending[:ready], self._pending[ready:]
        return Chunk(text, tokens, finish_reason)


class Completion:
    """A request that is being answered.

    Args:
        max_tokens: the largest allowed number of tokens.
        timeout_s: from now to the last token.

    Raises:
        RequestError: the request cannot be answered, or the queue is full.
    """

    def __init__(self, request: CompletionRequest, model: ServedModel, *, max_tokens: int, timeout_s: float) -> None:
        if (request.max_tokens or 0) > max_tokens:
            message = f"max_tokens: expected at most {max_tokens:,}, found {request.max_tokens:,}; lower it"
            raise RequestError(400, message, param="max_tokens")
        self.request, self._tokenizer = request, model.tokenizer
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        seed = random.randrange(MAX_SEED) if request.seed is None else request.seed
        self.head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.sha256[:16],
            "seed": seed,
        }
        encoded = [_encode(model.tokenizer, prompt) for prompt in request.prompts]
        if longest := [len(tokens) for tokens in encoded if len(tokens) > model.block_size]:
            text = f"prompt: {max(longest)} tokens; the last {model.block_size}, the context of the model, are used"
            self.head["warnings"] = [text]
        self.prompt_tokens = sum(map(len, encoded))
        self._choices: dict[Generation, tuple[Choice, str]] = {}
        for prompt, tokens in zip(request.prompts, encoded, strict=True):
            for _ in range(request.n or 1):
                choice = Choice(len(self._choices), model.tokenizer, request.stops, request.max_new_tokens)
                generation = self._generation(tokens, seed + choice.index, model)
                self._choices[generation] = choice, prompt
        try:
            model.engine.submit(list(self._choices))
        except BusyError as error:
            raise RequestError(
                429, str(error), kind="rate_limit_error", code="rate_limit_exceeded", retry_after=1
            ) from None

    async def chunks(self) -> AsyncIterator[tuple[int, Chunk]]:
        """Yield the parts of all choices as they are generated, each with the index of its choice.

        Raises:
            RequestError: the time is over, or the model failed.
        """
        if self.request.echo and self.request.logprobs is None:
            for choice, prompt in self._choices.values():
                yield choice.index, choice.echo(prompt, [])
        missing = len(self._choices)
        while missing:
            generation, tokens = await self._next_event()
            choice, prompt = self._choices[generation]
            if choice.finished:
                continue
            for chunk in self._parts(generation, choice, prompt, tokens):
                yield choice.index, chunk
            if choice.finished:
                generation.cancel()
                missing -= 1

    def cancel(self) -> None:
        """Generate no more; to be called at the end in any case, even if `chunks` was never iterated."""
        for generation in self._choices:
            generation.cancel()

    def usage(self) -> dict[str, Any]:
        """The number of tokens so far."""
        return usage(self.prompt_tokens, sum(choice.count for choice, _ in self._choices.values()))

    def choice(self, index: int, chunk: Chunk) -> dict[str, Any]:
        """A part of a choice in OpenAI's form."""
        content: dict[str, Any] = {"index": index, "text": chunk.text, "logprobs": None}
        if self.request.logprobs is not None:
            content["logprobs"] = {
                "tokens": [self._name(scored.token) for scored, _ in chunk.tokens],
                "token_logprobs": [scored.logprob for scored, _ in chunk.tokens],
                "top_logprobs": [self._top(scored) for scored, _ in chunk.tokens],
                "text_offset": [offset for _, offset in chunk.tokens],
            }
        return {**content, "finish_reason": chunk.finish_reason}

    def _generation(self, tokens: list[int], seed: int, model: ServedModel) -> Generation:
        request = self.request
        return Generation(
            tokens,
            request.sampling(),
            seed,
            max_new_tokens=request.max_new_tokens,
            vocab_size=model.tokenizer.vocab_size,
            top=request.logprobs,
            score_prompt=bool(request.echo and request.logprobs is not None),
            events=self._events,
        )

    async def _next_event(self) -> Event:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._events.get()
        except TimeoutError:
            raise RequestError(504, "the time of the request is over", kind="timeout_error", code="timeout") from None

    @staticmethod
    def _parts(
        generation: Generation, choice: Choice, prompt: str, tokens: list[ScoredToken] | OneLineError
    ) -> list[Chunk]:
        """The chunks that an event of the engine adds to a choice."""
        if isinstance(tokens, OneLineError):
            raise RequestError(500, str(tokens), kind="server_error")
        if not generation.score_prompt:
            return [choice.push(tokens)]
        generation.score_prompt = False  # the first event has the tokens of the prompt
        length = len(generation.prompt)
        return [choice.echo(prompt, tokens[:length]), choice.push(tokens[length:])]

    def _name(self, token: int) -> str:
        """A token as text; as its bytes, if they are no valid UTF-8."""
        data = self._tokenizer.token_bytes[token]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _top(self, scored: ScoredToken) -> dict[str, float] | None:
        top = {self._name(token): logprob for token, logprob in scored.top}
        return top if scored.logprob is not None else None


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt; an empty one stands for the start token."""
    try:
        return [int(token) for token in tokenizer.encode(prompt)] if prompt else [tokenizer.start_token]
    except UserError as error:
        raise RequestError(400, f"prompt: {error}", param="prompt", code="unknown_characters") from None
