"""Requests that the server refuses or ends: each limit, and what remains of the others."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt.core.errors import UserError
from gpt.generation.decoding import Decoder
from gpt.serving import guard
from gpt.serving.guard import Limits
from gpt.serving.protocol import CompletionRequest
from gpt.serving.server import API_KEY
from tests.support.common import wait_for
from tests.support.serving import TIMEOUT_S, Client, serving

LONG: dict[str, Any] = {"prompt": "the ", "max_tokens": 10**6}
SMALL = Limits(max_tokens=10**6, max_body_size=2000, timeout_s=TIMEOUT_S)


@pytest.fixture(scope="module")
def server(trained: Path) -> Iterator[Client]:
    """A server for one sequence at a time, and none that waits."""
    with serving(trained / "model.pt", limits=SMALL, max_batch_size=1, max_queue_size=0) as client:
        yield client


def is_idle(server: Client) -> bool:
    return server.metric("running_sequences") == server.metric("waiting_sequences") == 0


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"prompt": "thé qüick"}, 400, "prompt", "'é', 'ü'"),
        ({"prompt": "a", "max_tokens": 10**6 + 1}, 400, "max_tokens", "at most 1,000,000"),
        ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p", "more than 0"),
        ({"prompt": "a", "n": 0}, 400, "n", "greater than or equal to 1"),
        ({"prompt": "a", "logit_bias": {}}, 400, "logit_bias", "unknown field"),
        ({"prompt": "a", "stop": [""]}, 400, "stop", "at least 1"),
        ({"prompt": 5}, 400, "prompt", "string"),
        ({"prompt": []}, 400, "prompt", ""),
        ({"prompt": "a", "model": "other"}, 404, "model", "expected one of model"),
        ({"prompt": "a" * 2000}, 413, None, "large"),
        ({"prompt": "a", "n": 2}, 429, None, "queue is full"),
    ],
    ids=lambda value: next(iter(json.dumps(value)[-30:].split()), "") if isinstance(value, dict) else "",
)
def test_a_bad_request_gets_an_error_in_openais_form(
    server: Client, body: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    found, error = server.error(**body)
    assert (found, error["param"]) == (status, param)
    assert message in error["message"]
    assert error["type"]
    assert server.complete(prompt="a", max_tokens=2)["text"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=9),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=2),
    max_leaves=4,
)
FIELDS = st.sampled_from([*CompletionRequest.model_fields, "text", "layer", "\ud800"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(["completions", "next", "inside"]), body=st.dictionaries(FIELDS, VALUES, max_size=3))
def test_no_body_makes_the_server_fail(server: Client, path: str, body: dict[str, Any]) -> None:
    address = f"{server.address}/{'v1' if path == 'completions' else 'explore'}/{path}"
    content = json.dumps({"prompt": "a", "max_tokens": 2, **body} if path == "completions" else {"text": "a", **body})
    headers = {"Content-Type": "application/json"}
    answer = requests.post(address, data=content.encode(), headers=headers, timeout=9)
    if answer.status_code != 200:
        assert answer.status_code in {400, 404, 413, 429}
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff", b'{"prompt": NaN}', b"[" * 1500])
def test_malformed_json_is_refused(server: Client, content: bytes) -> None:
    answer = requests.post(
        f"{server.address}/v1/completions", data=content, headers={"Content-Type": "application/json"}, timeout=9
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_a_body_without_a_length_is_limited_too(server: Client) -> None:
    chunks = (b"x" * 1000 for _ in range(5))
    headers = {"Content-Type": "application/json"}
    assert requests.post(f"{server.address}/v1/completions", data=chunks, headers=headers, timeout=9).status_code == 413


def test_a_form_of_another_web_site_is_refused(server: Client) -> None:
    """A browser sends such a request without asking the server first."""
    for headers in ({"Content-Type": "text/plain"}, {}):
        content = b'{"prompt": "a"}'
        answer = requests.post(f"{server.address}/v1/completions", data=content, headers=headers, timeout=9)
        assert answer.status_code == 400
    assert "access-control-allow-origin" not in server.get("/v1/models", Origin="http://evil.example").headers


def test_a_full_queue_answers_429_and_when_to_try_again(server: Client) -> None:
    with server.post(stream=True, **LONG) as running:
        lines = running.iter_lines()
        next(lines)
        answer = server.post(prompt="a")
        assert answer.status_code == 429
        assert answer.headers["Retry-After"] == "1"
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="model", prompt="a")
    wait_for(lambda: is_idle(server))


@pytest.mark.parametrize("stream", [True, False])
def test_the_place_of_a_client_that_disconnects_is_free_at_once(server: Client, stream: bool) -> None:
    """The whole text would take minutes."""
    content = json.dumps({**LONG, "stream": stream}).encode()
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_for(lambda: server.metric("running_sequences") == 1)
    began = time.monotonic()
    wait_for(lambda: is_idle(server))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("stream", [True, False])
def test_requests_whose_clients_are_gone_at_once_are_not_computed(trained: Path, stream: bool) -> None:
    content = json.dumps({**LONG, "stream": stream}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving(trained / "model.pt", limits=SMALL) as server:
        for _ in range(30):
            with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2]))) as connection:
                connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        began = time.monotonic()
        wait_for(lambda: is_idle(server))
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_ends_after_its_time(trained: Path, stream: bool) -> None:
    with serving(trained / "model.pt", limits=Limits(timeout_s=0.2, max_tokens=10**6)) as server:
        answer = server.post(stream=stream, prompt="the ", max_tokens=10**6)
        if stream:
            last = [line for line in answer.iter_lines(decode_unicode=True) if line][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        else:
            assert answer.status_code == 504
        wait_for(lambda: is_idle(server))


def test_a_client_that_does_not_read_is_disconnected(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "READ_S", 0.3)
    limits = Limits(timeout_s=1, max_tokens=10**6)
    body = json.dumps({"prompt": ["a"] * 16, "max_tokens": 10**6, "logprobs": 20, "stream": True}).encode()
    with serving(trained / "model.pt", limits=limits) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(server.address.rpartition(":")[2])))
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: server.metric("running_sequences") == 16)
        wait_for(lambda: is_idle(server))
        wait_for(lambda: 'path="/v1/completions",status="200"' in server.get("/metrics").text)
        assert server.complete(prompt="a", max_tokens=3)["text"]


def test_a_client_that_does_not_send_its_request_is_disconnected(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "READ_S", 0.1)
    with serving(trained / "model.pt", limits=Limits(timeout_s=0.3)) as server, socket.socket() as connection:
        connection.connect(("127.0.0.1", int(server.address.rpartition(":")[2])))
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n".encode())
        connection.settimeout(5)
        assert b"408" in connection.recv(1000).splitlines()[0]


def test_a_failed_step_ends_its_requests_only(server: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "add", lambda *_: 1 / 0)
        status, error = server.error(prompt="a")
    assert status == 500
    assert "ZeroDivisionError" in error["message"]
    assert server.complete(prompt="a", max_tokens=3)["text"]


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example", 403), ("evil.example:80", 403), ("127.0.0.1.evil.example", 403), ("", 403), ("[x", 403)]
    + [(host, 200) for host in ("localhost:80", "127.0.0.1", "192.168.1.5:8000", "[::1]:80", "proxy.example")],
)
def test_other_host_names_are_refused(named: Client, host: str, status: int) -> None:
    assert named.get("/v1/models", Host=host).status_code == status


@pytest.fixture(scope="module")
def named(trained: Path) -> Iterator[Client]:
    """A server that is reached under another name, too, and needs a key."""
    with serving(trained / "model.pt", allowed_hosts=["Proxy.example"]) as client:
        yield client


def test_a_key_is_needed_where_one_is_set(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, "geheim-ü")
    with serving(trained / "model.pt") as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "geheim-ü".encode().decode("latin-1")},
        ):
            answer = server.get("/v1/models", **headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        key = "geheim-ü".encode().decode("latin-1")
        assert server.get("/v1/models", Authorization=f"Bearer {key}").status_code == 200
        assert server.get("/metrics").status_code == 401
        for path in ("/", "/health"):
            assert server.get(path).status_code == 200


def test_another_address_than_loopback_needs_a_key(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    with pytest.raises(UserError, match=API_KEY), serving(trained / "model.pt", host="0.0.0.0"):
        pass
    monkeypatch.setenv(API_KEY, "secret")
    with serving(trained / "model.pt", host="0.0.0.0") as server:
        assert server.get("/v1/models").status_code == 401


def test_answers_forbid_scripts_of_others(server: Client) -> None:
    policy = server.get("/").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
