"""What every request passes first: host name, API key, time limit; and what is counted of it."""

import asyncio
import hmac
import ipaddress
import logging
import time
from collections.abc import Collection, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt.serving.metrics import Metrics
from gpt.serving.protocol import RequestError

OPEN_PATHS, PAGE_FILES = ("/", "/health"), "/page/"  # without a key: they tell nothing about the models
READ_S = 5  # that a client may take to read the end of an answer, after the time limit
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

log = logging.getLogger("gpt")


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    `max_body_size` is in bytes, `timeout_s` in seconds from the first byte of a request to the last of its answer.
    """

    max_tokens: int = 4096
    max_body_size: int = 256 * 1024
    timeout_s: float = 120


class Guard:
    """Checks and counts the requests to an application.

    Args:
        hosts: names under which the server is reached, in addition to `localhost` and all IP addresses. Another name in
            the header `Host` is refused: a web site that resolves to this machine could read the answers.
        key: the bearer key that requests need; None: no key.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Collection[str], key: str | None, limits: Limits, metrics: Metrics
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._hosts = {"localhost", *(host.lower() for host in hosts)}
        self._authorization = f"Bearer {key}".encode() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; the interface of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        try:
            async with asyncio.timeout(self._limits.timeout_s + READ_S):
                self._check(scope)
                await self._app(scope, receive, send_counted)
        except RequestError as error:
            await JSONResponse(error.content, error.status, error.headers)(scope, receive, send_counted)
        except TimeoutError:
            log.warning("%s: the client did not send the request or read the answer in time", scope["path"])
            if not status:
                late = RequestError(408, "the request was not complete in time", kind="timeout_error", code="timeout")
                await JSONResponse(late.content, late.status)(scope, receive, send_counted)
        finally:
            self._metrics.count_request(scope, status, time.monotonic() - began)

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        """Raise a RequestError for a wrong host, a wrong key, or a body that is too large."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._is_allowed(host):
            message = f"Host: expected localhost, an IP address or a name of --allow-host, found {host[:100]!r}"
            raise RequestError(403, message, code="host_not_allowed")
        is_open = scope["path"] in OPEN_PATHS or scope["path"].startswith(PAGE_FILES)
        given = headers.get(b"authorization", b"")
        if self._authorization and not is_open and not hmac.compare_digest(given, self._authorization):
            message = "expected the header `Authorization: Bearer KEY` with the key of this server"
            raise RequestError(401, message, kind="authentication_error", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.max_body_size:
            message = f"the body is too large: expected at most {self._limits.max_body_size:,} bytes"
            raise RequestError(413, message)

    def _is_allowed(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._hosts
        return True
