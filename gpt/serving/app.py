"""The HTTP application: OpenAI's completions API, health, metrics, and the page with what it needs."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from gpt.core.errors import UserError
from gpt.serving.completions import Chunk, Completion
from gpt.serving.explore import look_inside, next_tokens
from gpt.serving.guard import Guard, Limits
from gpt.serving.metrics import Metrics
from gpt.serving.models import ModelPool
from gpt.serving.protocol import CompletionRequest, InsideRequest, RequestError, TextRequest

PAGE = Path(__file__).parent / "page"

R = TypeVar("R")


def make_app(
    pool: ModelPool,
    limits: Limits,
    *,
    watch_s: float | None = None,
    hosts: tuple[str, ...] = (),
    key: str | None = None,
) -> Guard:
    """The application. It serves the models of the pool while it runs; the other arguments are those of `Guard`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        app.state.running = task = asyncio.create_task(pool.run(watch_s))
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    app = FastAPI(
        title="chargpt",
        lifespan=lifespan,
        max_body_size=limits.max_body_size,  # also of a body without Content-Length
        docs_url=None,  # the pages of FastAPI load scripts from elsewhere
        redoc_url=None,
    )
    metrics = Metrics()
    metrics.watch("running_sequences", "Sequences in the batch.", lambda: pool.count("running"))
    metrics.watch("waiting_sequences", "Sequences in the queue.", lambda: pool.count("waiting"))
    _handle_errors(app)
    _add_completions(app, pool, limits, metrics)
    _add_exploration(app, pool)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model.describe() for model in pool.models.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return pool.get(name).describe()

    @app.get("/health")
    async def health() -> dict[str, str]:
        if app.state.running.done():
            raise RequestError(503, "the models no longer run; restart the server", kind="server_error")
        return {"status": "ok"}

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return Guard(app, hosts=hosts, key=key, limits=limits, metrics=metrics)


def _add_completions(app: FastAPI, pool: ModelPool, limits: Limits, metrics: Metrics) -> None:
    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        began = time.monotonic()
        completion = Completion(body, pool.get(body.model), max_tokens=limits.max_tokens, timeout_s=limits.timeout_s)
        metrics.tokens.labels("prompt").inc(completion.prompt_tokens)

        async def measured() -> AsyncIterator[tuple[int, Chunk]]:
            first = True
            try:
                async for index, chunk in completion.chunks():
                    if first:
                        metrics.first_token.observe(time.monotonic() - began)
                        first = False
                    yield index, chunk
            finally:
                metrics.tokens.labels("generated").inc(completion.usage()["completion_tokens"])

        if body.stream:
            return _Stream(completion, _events(completion, measured()))
        try:
            content = await _unless_disconnected(request, _collect(completion, measured()))
        finally:
            completion.cancel()
        return JSONResponse(content) if content else Response(status_code=499)


class _Stream(StreamingResponse):
    """A stream of events that cancels its completion when it ends, also if the client disconnects before it begins."""

    def __init__(self, completion: Completion, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._completion = completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._completion.cancel()


async def _collect(completion: Completion, chunks: AsyncIterator[tuple[int, Chunk]]) -> dict[str, Any]:
    """The whole answer."""
    whole: dict[int, Chunk] = {}
    async for index, chunk in chunks:
        part = whole.setdefault(index, Chunk())
        part.text += chunk.text
        part.tokens += chunk.tokens
        part.finish_reason = chunk.finish_reason
    choices = [completion.choice(index, chunk) for index, chunk in sorted(whole.items())]
    return {**completion.head, "choices": choices, "usage": completion.usage()}


async def _events(completion: Completion, chunks: AsyncIterator[tuple[int, Chunk]]) -> AsyncIterator[str]:
    """The answer as server-sent events, one for each part of a choice."""
    head = completion.head
    try:
        async for index, chunk in chunks:
            if chunk != Chunk():
                yield _event({**head, "choices": [completion.choice(index, chunk)]})
    except RequestError as error:
        yield _event(error.content)
        return
    options = completion.request.stream_options
    if options and options.include_usage:
        yield _event({**head, "choices": [], "usage": completion.usage()})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _unless_disconnected(request: Request, answer: Any) -> dict[str, Any] | None:
    """The answer; None, and the answer is cancelled, if the client disconnects before."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(answer), asyncio.create_task(disconnected())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        result: dict[str, Any] | None = tasks[0].result() if tasks[0].done() else None
        return result
    finally:
        for task in tasks:
            task.cancel()


def _add_exploration(app: FastAPI, pool: ModelPool) -> None:
    """The page, and what it shows of a model; computed in the thread of the models, between two steps."""

    async def compute(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        try:
            return await asyncio.get_running_loop().run_in_executor(pool.executor, function, *arguments)
        except UserError as error:
            raise RequestError(400, f"text: {error}", param="text") from None

    @app.post("/explore/next")
    async def explore_next(body: TextRequest) -> dict[str, Any]:
        model = pool.get(body.model)
        return await compute(next_tokens, model.module, model.tokenizer, body.text, body.sampling())

    @app.post("/explore/inside")
    async def explore_inside(body: InsideRequest) -> dict[str, Any]:
        model = pool.get(body.model)
        return await compute(look_inside, model.module, model.tokenizer, body.text, body.layer, body.head)

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))


def _handle_errors(app: FastAPI) -> None:
    """Answer all errors in OpenAI's form."""

    @app.exception_handler(RequestError)
    async def request_error(_: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(error.content, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = max(error.errors(), key=lambda each: len(each["loc"]))  # of the most similar form that a field can have
        where = first["loc"][1:2] if first["type"] != "json_invalid" else ()
        param = str(where[0]) if where else None
        text = {"json_invalid": "expected JSON", "extra_forbidden": "unknown field"}.get(first["type"], first["msg"])
        text = re.sub(
            "^(Input should be|Value error,) ?", lambda match: "expected " if match[1][0] == "I" else "", text
        )
        if where:
            text = f"{param}: {text}"
        elif ": " in text:  # of a setting that SamplingParams checked
            param = text.partition(":")[0]
        return await request_error(request, RequestError(400, text, param=param))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return await request_error(request, RequestError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        message = f"unexpected error: {type(error).__name__}"
        return await request_error(request, RequestError(500, message, kind="server_error"))
