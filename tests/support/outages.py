"""Outages of a tracking store: a real MLflow server or an SQLite file, and context managers that break it."""

import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import requests
from mlflow import MlflowClient

from tests.support.common import free_port, wait_for
from tests.support.workspace import Run, Workspace, answers, runs_in, start_server, stop_server

LOCKED_S = 60  # longer than a training and its end: a stage does not wait for the lock


class Proxy(ThreadingHTTPServer):
    """A reverse proxy that can answer with an error, or slowly."""

    daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.status, self.delay = server, 0, 0.0
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """A client or a server that has gone away needs no traceback."""


OF_THE_CONNECTION = ("host", "transfer-encoding")  # headers that are not forwarded


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def _body(self) -> bytes:
        """The body of the request; an empty file is uploaded in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def forward(self) -> None:
        body = self._body()
        time.sleep(self.server.delay)
        if self.server.status:
            status, content, kind = self.server.status, b"out of order", "text/plain"
        else:
            sent = {name: value for name, value in self.headers.items() if name.lower() not in OF_THE_CONNECTION}
            answer = requests.request(
                self.command, self.server.upstream + self.path, data=body, headers=sent, timeout=60
            )
            status, content, kind = answer.status_code, answer.content, answer.headers.get("Content-Type", "")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if status == 503:
            self.send_header("Retry-After", "120")
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward

    def log_message(self, *_: object) -> None:
        pass


class Tracking:
    """A workspace and the store that its stages publish to: its own SQLite file, or a server behind a proxy or not."""

    def __init__(self, folder: Path, kind: str, empty_store: Path) -> None:
        self.place = Workspace(folder / "work space", empty_store)
        self.later = ExitStack()  # what to undo after the test
        self.server: subprocess.Popen[bytes] | None = None
        self.folder, self.artifacts = self.place.folder, self.place.folder / "mlruns"
        self.address = f"sqlite:///{self.folder / 'mlflow.db'}"
        if kind != "sqlite":
            self.folder, self.artifacts = folder / "server", folder / "server/files"
            self.folder.mkdir()
            shutil.copyfile(empty_store, self.folder / "mlflow.db")
            self._port = free_port()
            self.address = f"http://127.0.0.1:{self._port}"
            self.start()
        if kind == "proxy":
            self.proxy = Proxy(self.address)
            self.later.callback(self.proxy.server_close)
            self.later.callback(self.proxy.shutdown)
            self.address = self.proxy.address
        self.place.environment["MLFLOW_TRACKING_URI"] = self.address

    def start(self) -> None:
        """Start the server, if there is one, and wait until it answers."""
        if self.folder != self.place.folder:
            stores = ("--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", str(self.artifacts))
            self.server = start_server(self.folder, self._port, *stores)
            wait_for(lambda: answers(f"http://127.0.0.1:{self._port}"))

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the server."""
        if self.server:
            os.killpg(self.server.pid, number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the server, if there is one."""
        if self.server:
            stop_server(self.server, number)
            self.server = None

    def runs(self) -> list[Run]:
        """What the store holds."""
        return runs_in(MlflowClient(self.address))

    def close(self) -> None:
        """Stop the server and undo the rest."""
        self.stop()
        self.later.close()


Breaking = Callable[[Tracking], AbstractContextManager[None]]  # breaks a store, and repairs it on exit


def ended_by(number: signal.Signals) -> Breaking:
    @contextmanager
    def outage(tracking: Tracking) -> Iterator[None]:
        tracking.stop(number)
        yield
        tracking.start()

    return outage


@contextmanager
def stopped(tracking: Tracking) -> Iterator[None]:
    tracking.send(signal.SIGSTOP)
    yield
    tracking.send(signal.SIGCONT)


def answering(*, status: int = 0, delay: float = 0) -> Breaking:
    @contextmanager
    def outage(tracking: Tracking) -> Iterator[None]:
        tracking.proxy.status, tracking.proxy.delay = status, delay
        yield
        tracking.proxy.status, tracking.proxy.delay = 0, 0

    return outage


@contextmanager
def read_only(tracking: Tracking) -> Iterator[None]:
    file = tracking.folder / "mlflow.db"
    tracking.stop()
    subprocess.run(["mount", "--bind", file, file], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", file], check=True)
    tracking.start()
    yield
    tracking.stop()
    subprocess.run(["umount", file], check=True)
    tracking.start()


@contextmanager
def locked(tracking: Tracking) -> Iterator[None]:
    with closing(sqlite3.connect(tracking.folder / "mlflow.db", timeout=60, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        yield
        time.sleep(max(0, LOCKED_S - (time.monotonic() - began)))


@contextmanager
def store_deleted(tracking: Tracking) -> Iterator[None]:
    for file in tracking.folder.glob("mlflow.db*"):
        file.unlink()
    yield
    tracking.stop()
    tracking.start()  # which creates a new store
    if not tracking.server:
        tracking.address += "?"  # MLflow keeps connections to the deleted file open in this process


@contextmanager
def artifacts_deleted(tracking: Tracking) -> Iterator[None]:
    shutil.rmtree(tracking.artifacts, ignore_errors=True)
    yield


@contextmanager
def artifacts_full(tracking: Tracking) -> Iterator[None]:
    tracking.artifacts.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tracking.artifacts], check=True)
    tracking.later.callback(lambda: subprocess.run(["umount", "--lazy", tracking.artifacts], check=True))
    filler = tracking.artifacts / "filler"
    filler.write_bytes(bytes(4 << 20))
    yield
    filler.unlink()


@dataclass(frozen=True)
class Outage:
    """How to break a store.

    Attributes:
        kinds: of stores that can break in this way.
        from_start: whether it begins before the training, else in its middle.
        warns: whether MLflow lacks something at the end, so that there is a warning.
        cause: a part of the warning.
    """

    begin: Breaking
    kinds: tuple[str, ...]
    from_start: bool = False
    warns: bool = True
    cause: str = ""


BOTH = ("server", "sqlite")
OUTAGES = {
    "absent at start": Outage(ended_by(signal.SIGTERM), ("server",), from_start=True),
    "SIGKILL": Outage(ended_by(signal.SIGKILL), ("server",)),
    "SIGSTOP": Outage(stopped, ("server",)),
    "500": Outage(answering(status=500), ("proxy",), cause="500 error"),
    "503": Outage(answering(status=503), ("proxy",), cause="503 error"),
    "slow": Outage(answering(delay=3), ("proxy",)),
    "read-only": Outage(read_only, BOTH, from_start=True),
    "locked": Outage(locked, BOTH),
    "store deleted": Outage(store_deleted, BOTH),
    "artifacts deleted": Outage(artifacts_deleted, BOTH, warns=False),
    "artifacts full": Outage(artifacts_full, BOTH, from_start=True),
}
