"""Downloads from real servers on the loopback interface, local paths and wheels: retries, limits, error messages."""

import hashlib
import os
import ssl
import subprocess
import sys
import termios
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gpt.core.errors import UserError
from gpt.core.params import check_section
from gpt.download import sources
from gpt.download.sources import DownloadParams, download
from tests.support.common import environment, only_line, run

TEXT = b"Speak, speak.\n" * 500
SHA256 = hashlib.sha256(TEXT).hexdigest()

Answer = tuple[int, bytes, dict[str, str]]
ANSWERS: dict[str, list[Answer]] = {  # to the first, second, … request; the last one is repeated
    "/text": [(200, TEXT, {})],
    "/busy-once": [(503, b"", {}), (200, TEXT, {})],
    "/limited": [(429, b"", {"Retry-After": "3600"}), (200, TEXT, {})],
    "/moved": [(301, b"x" * 100, {"Location": "/text"})],
    "/page": [(200, b"<!DOCTYPE html>", {"Content-Type": "text/html; charset=utf-8"})],
    "/slow": [(200, b"", {"Content-Length": "7000"})],
}
FAILURES: dict[str, tuple[Answer, str, int]] = {  # answer, reason in the message, number of requests
    "/missing": ((404, b"no such file", {}), "status 404", 1),
    "/busy": ((503, b"", {}), "503", 3),
    "/disconnected": ((0, b"", {}), "closed connection", 3),
    "/truncated": ((200, b"Speak,", {"Content-Length": "7000"}), "IncompleteRead", 1),
    "/wrong": ((200, b"something else", {}), f"expected SHA-256 {SHA256}, found ", 1),
    "/loop": ((302, b"", {"Location": "/loop"}), "redirects", 6),
    "/moved-to-file": ((302, b"", {"Location": "file:///etc/passwd"}), "file:///etc/passwd", 1),
    "/moved-to-invalid": ((302, b"", {"Location": "http://[x"}), "Invalid", 1),
    "/announced-too-long": ((200, b"", {"Content-Length": "1000000000000"}), "larger than 200,000 bytes", 1),
    "/endless": ((200, b"", {"Content-Length": ""}), "larger than 200,000 bytes", 1),
}
ANSWERS |= {path: [answer] for path, (answer, _, _) in FAILURES.items()}


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests[path] += 1
        answers = ANSWERS.get(path, [])
        if path == "/downgrade":
            answers = [(302, b"", {"Location": self.server.other})]
        elif path == "/secret":
            answers = [(200 if self.headers["Authorization"] else 401, TEXT, {})]
        elif not answers:  # also a package index
            self.server.over.wait()
            return
        status, body, headers = answers[: self.server.requests[path]][-1]
        if status:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        while path in ("/slow", "/endless") and not self.server.over.wait(0.05 if path == "/slow" else 0):
            self.wfile.write(b"x" if path == "/slow" else b"x" * 50_000)

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: Counter[str] = Counter()
        self.over = threading.Event()
        self.host = f"127.0.0.1:{self.server_port}"
        self.address, self.other = f"{'https' if context else 'http'}://{self.host}", ""
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def handle_error(self, *args: object) -> None:
        pass  # clients disconnect in these tests


@contextmanager
def running(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with running(Server()) as started:
        yield started


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also no proxy, certificate or package index of this machine."""
    for name in list(os.environ):
        if name.startswith("PIP_") or name.lower().endswith("_proxy") or name.endswith("_CA_BUNDLE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(sources, "MAX_BYTES", 200_000)
    monkeypatch.setattr(sources, "RETRY", sources.RETRY.new(backoff_factor=0.02, retry_after_max=1))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "data" / "corpus.txt"


def get(*addresses: str, out: Path, sha256: str | None = SHA256) -> bytes:
    download(params=DownloadParams(sources=list(addresses), sha256=sha256), out=out)
    assert [path.name for path in out.parent.iterdir()] == ["corpus.txt"]
    return out.read_bytes()


def refusal(*addresses: str, out: Path, sha256: str | None = SHA256) -> str:
    """The message of a download that must fail and leave no file."""
    with pytest.raises(UserError) as caught:
        get(*addresses, out=out, sha256=sha256)
    assert list(out.parent.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize(("path", "requests"), [("/text", 1), ("/busy-once", 2), ("/limited", 2), ("/moved", 2)])
def test_a_file_is_written_after_retries_and_redirects(server: Server, out: Path, path: str, requests: int) -> None:
    began = time.monotonic()
    assert get(server.address + path, out=out, sha256=None) == TEXT
    assert server.requests.total() == requests
    assert path != "/limited" or time.monotonic() - began >= 1  # Retry-After, up to its maximum


def test_the_next_source_is_used_after_a_failure_and_no_message_contains_a_secret(
    server: Server, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    addresses = (f"http://me:hidden@{server.host}{path}?key=hidden" for path in (*FAILURES, "/secret"))
    assert get(*addresses, out=out) == TEXT
    output, errors = capfd.readouterr()
    assert "hidden" not in output + errors
    for line, (path, (_, reason, requests)) in zip(output.splitlines(), FAILURES.items(), strict=False):
        assert line.startswith(f"source failed: {server.address}{path}?…: ")
        assert reason in line
        assert server.requests[path] == requests


def test_slow_servers_and_web_pages_are_refused(server: Server, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DEADLINE_S", 0.4)
    monkeypatch.setattr(sources, "READ_S", 0.2)
    message = refusal(*(server.address + path for path in ("/slow", "/never", "/page")), out=out, sha256=None)
    for reason in ("not complete after 0.4 s", "timed out", "text/html"):
        assert reason in message


def test_tls_errors_and_redirects_to_http_are_refused(
    server: Server, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "-days 2 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -subj /CN=test"
    options += " -addext subjectAltName=IP:127.0.0.1 -keyout both.pem -out both.pem"
    run(["openssl", "req", "-x509", *options.split()], tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    with running(Server(context)) as secure:
        assert "self-signed certificate" in refusal(f"{secure.address}/text", out=out)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "both.pem"))
        secure.other = f"{server.address}/text"
        assert secure.other in refusal(f"{secure.address}/downgrade", out=out)
        assert not server.requests
        get(f"{secure.address}/text", out=out)


def test_local_paths(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_BYTES", 1)  # of a download
    (tmp_path / "a poem.txt").write_bytes(TEXT)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for source in ("a poem.txt", "~/a poem.txt", str(tmp_path / "a poem.txt")):
        assert get(source, out=out) == TEXT
        out.unlink()
    for source, found in (("none.txt", f"{tmp_path}/none.txt"), ("/dev/zero", "/dev/zero"), ("~nobody-such/x", "home")):
        assert found in refusal(source, out=out)


def test_a_file_with_the_pinned_digest_is_kept_and_a_failure_changes_nothing(out: Path) -> None:
    out.parent.mkdir()
    out.write_bytes(TEXT)
    assert get("none.txt", out=out, sha256=SHA256.upper()) == TEXT
    out.write_bytes(b"old")
    with pytest.raises(UserError):
        get("none.txt", out=out)
    assert [path.read_bytes() for path in out.parent.iterdir()] == [b"old"]


def test_a_member_of_a_wheel(
    out: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wheels").mkdir()
    folder = "chargpt_text-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "wheels" / "chargpt_text-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("a text.txt", TEXT)
        wheel.writestr(f"{folder}/METADATA", "Metadata-Version: 2.1\nName: chargpt_text\nVersion: 1.0\n")
        wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{folder}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    name = "pypi:chargpt_text=="
    assert get(f"{name}1.0#x.txt", f"{name}2.0#x.txt", f"{name}1.0#a text.txt", out=out) == TEXT
    printed = capsys.readouterr().out
    assert "'x.txt' in the archive" in printed
    assert "pip download --no-deps chargpt_text==2.0" in printed
    out.unlink()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:hidden@{server.host}/simple")  # never answers
    monkeypatch.setattr(sources, "DEADLINE_S", 0.4)
    message = refusal("pypi:other==1.0#x.txt", out=out)
    assert "more than 0.4 s" in message
    assert "hidden" not in message


@pytest.mark.parametrize(
    "source", ["ftp://me:hidden@host/x", "https:///x", "https://me:hidden@host:x/", "pypi:--x==1#x", " "]
)
def test_an_invalid_source_is_refused(source: str) -> None:
    for value, where in ((["x", source], "sources.1: expected https://"), (source, "sources: expected a valid list")):
        with pytest.raises(UserError) as caught:
            check_section(Path("p"), "download", DownloadParams, {"download": {"sources": value, "sha256": None}})
        assert str(caught.value).startswith(f"p: download.{where}")
        assert "hidden" not in str(caught.value)


def test_the_command_shows_progress_on_a_terminal_and_lists_every_failed_source(tmp_path: Path, server: Server) -> None:
    (tmp_path / "params.yaml").write_text(f"download:\n  sources: ['{server.address}/text']\n  sha256: {SHA256}\n")
    line = [sys.executable, "-m", "gpt", "download", "--params", "params.yaml", "--out", "corpus.txt"]
    master, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    subprocess.run(line, cwd=tmp_path, env=environment(), stderr=terminal, stdout=subprocess.DEVNULL, check=True)
    assert b"/7.00k [" in os.read(master, 4096)
    os.close(master)
    os.close(terminal)
    line += ["-S", f"download.sources=[none.txt, {server.address}/missing]", "-S", "download.sha256=null"]
    message = only_line(run(line, tmp_path, code=2).stderr)
    for part in ("gpt download: download.sources: ", f"{tmp_path}/none.txt", "/missing: HTTP status 404", "-S "):
        assert part in message
    assert (tmp_path / "corpus.txt").read_bytes() == TEXT
