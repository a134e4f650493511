"""A real server in a thread of the test, on a free port of the loopback interface."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from gpt.serving.guard import Limits
from gpt.serving.models import FileSource, Source
from gpt.serving.server import ServerOptions, make_server
from tests.support.common import wait_for

TIMEOUT_S = 30


@contextmanager
def serving(*checkpoints: Path | Source, limits: Limits | None = None, **options: Any) -> Iterator["Client"]:
    """Serve checkpoints, or other sources."""
    sources: Sequence[Source] = [
        FileSource(each, each.stem) if isinstance(each, Path) else each for each in checkpoints
    ]
    server, listener = make_server(sources, ServerOptions(port=0, limits=limits or Limits(), **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Client(f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join()


class Client:
    """A client that sends JSON."""

    def __init__(self, address: str) -> None:
        self.address = address

    def get(self, path: str, **headers: str) -> requests.Response:
        return requests.get(self.address + path, headers=headers, timeout=TIMEOUT_S)

    def post(self, path: str = "/v1/completions", *, stream: bool = False, **body: Any) -> requests.Response:
        content = {**body, "stream": True} if stream else body
        return requests.post(self.address + path, json=content, stream=stream, timeout=TIMEOUT_S)

    def complete(self, **body: Any) -> dict[str, Any]:
        """The only choice of a completion."""
        answer = self.post(**body)
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        return dict(choice)

    def error(self, path: str = "/v1/completions", **body: Any) -> tuple[int, dict[str, Any]]:
        """The status and the error of a request that is refused."""
        answer = self.post(path, **body)
        return answer.status_code, dict(answer.json()["error"])

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        (line,) = [line for line in self.get("/metrics").text.splitlines() if line.startswith(f"chargpt_{name} ")]
        return float(line.split()[1])
