"""What every request passes first: host name, API key, time limit; and what is counted of it."""

import asyncio
import hmac
import ipaddress
import logging
import time
from collections.abc import Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt.serving.metrics import Metrics
from gpt.serving.protocol import RequestError

OPEN_PATHS = ("/", "/health", "/page/")  # without a key: they tell nothing about the models
READ_S = 5  # that a client may take to read the end of an answer, after the time limit
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

log = logging.getLogger("gpt")


class Guard:
    """Checks and counts the requests to an application.

    Args:
        hosts: names under which the server is reached, in addition to `localhost` and all IP addresses. Another name in
            the header `Host` is refused: a web site that resolves to this machine could read the answers.
        key: the bearer key that requests need; None: no key.
        timeout_s: from the first byte of a request to the last one of its answer.
    """

    def __init__(
        self, app: ASGIApp, *, hosts: Collection[str], key: str | None, timeout_s: float, metrics: Metrics
    ) -> None:
        self._app, self._timeout_s, self._metrics = app, timeout_s, metrics
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
            async with asyncio.timeout(self._timeout_s + READ_S):
                self._check(scope)
                await self._app(scope, receive, send_counted)
        except RequestError as error:
            await JSONResponse(error.content, error.status, error.headers)(scope, receive, send_counted)
        except TimeoutError:
            log.warning("%s: the client did not read the answer, or not send the request, in time", scope["path"])
        finally:
            self._metrics.count_request(scope, status, time.monotonic() - began)

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        """Raise a RequestError for a wrong host or key."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._is_allowed(host):
            message = f"Host: expected localhost, an IP address or a name of --allow-host, found {host[:100]!r}"
            raise RequestError(403, message, code="host_not_allowed")
        if self._authorization is None or any(
            scope["path"] == path or (path.endswith("/") and path != "/" and scope["path"].startswith(path))
            for path in OPEN_PATHS
        ):
            return
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._authorization):
            message = "expected the header `Authorization: Bearer KEY` with the key of this server"
            raise RequestError(401, message, kind="authentication_error", code="invalid_api_key")

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
