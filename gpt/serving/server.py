"""Running the server: address, key, signals."""

import logging
import os
import signal
import socket
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import ip_address

import uvicorn

from gpt.core.cli import report
from gpt.core.errors import UserError
from gpt.serving.app import make_app
from gpt.serving.guard import Limits
from gpt.serving.models import ModelPool, Source

API_KEY = "CHARGPT_API_KEY"  # environment variable
MAX_CONNECTIONS = 1000  # more are answered with 503


@dataclass(frozen=True)
class ServerOptions:
    """The options of the server; times in seconds.

    `watch_s` is the time between two looks for new versions of the models, `grace_s` how long running requests may take
    to finish after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: Collection[str] = ()
    max_batch_size: int = 32
    max_queue_size: int = 64
    limits: Limits = field(default_factory=Limits)
    watch_s: float | None = None
    grace_s: float = 30


def serve(sources: Sequence[Source], options: ServerOptions) -> None:
    """Serve the models until SIGTERM or SIGINT, then finish the running requests.

    Raises:
        UserError: the address cannot be used, a checkpoint is missing or damaged, or the key is missing.
    """
    server, listener = make_server(sources, options)
    # Uvicorn raises the signal again after its shutdown: for SIGTERM, nothing is left to do then.
    signal.signal(signal.SIGTERM, lambda *_: None)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    report(f"{', '.join(source.name for source in sources)}: {address}")
    server.run(sockets=[listener])


def make_server(sources: Sequence[Source], options: ServerOptions) -> tuple[uvicorn.Server, socket.socket]:
    """Load the models; returns a server, and the socket that it has to be run with.

    Raises:
        UserError: as `serve`.
    """
    key = os.environ.get(API_KEY) or None
    if key is None and not _is_loopback(options.host):
        raise UserError(
            f"--host {options.host}: expected the environment variable {API_KEY}, found none; set it to a secret that "
            "clients send as bearer key, or take the default host, which only this machine reaches"
        )
    listener = _listen(options)
    pool = ModelPool(sources, max_batch_size=options.max_batch_size, max_queue_size=options.max_queue_size)
    with ExitStack() as stack:
        stack.callback(listener.close)
        pool.load()
        stack.pop_all()
    hosts = (*options.allowed_hosts, options.host)
    config = uvicorn.Config(
        make_app(pool, options.limits, watch_s=options.watch_s, hosts=hosts, key=key),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=int(options.grace_s),
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    return uvicorn.Server(config), listener


def _listen(options: ServerOptions) -> socket.socket:
    """A socket that listens on the address."""
    try:
        address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[4][:2], family=address[0])
    except OSError as error:
        raise UserError(
            f"--host {options.host} --port {options.port}: expected a free address, found: {error}; choose another port"
        ) from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: connections whose client does not read end, also while closing
        milliseconds = int(1000 * options.limits.timeout_s)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
