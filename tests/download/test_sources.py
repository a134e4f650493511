"""Downloads from real servers on the loopback interface, local paths and wheels: retries, limits, error messages."""

import hashlib
import ipaddress
import logging
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
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gpt.core.errors import UserError
from gpt.core.params import check_section
from gpt.download.sources import DownloadParams, Limits, download
from tests.support.common import environment, only_line

TEXT = b"Speak, speak.\n" * 500
SHA256 = hashlib.sha256(TEXT).hexdigest()
LIMITS = Limits(deadline_s=20.0, max_bytes=200_000, backoff_s=0.02, retry_after_s=1)
WHEEL = "pypi:chargpt_text==1.0#chargpt_text/a text.txt"


class Handler(BaseHTTPRequestHandler):
    """Answers each path as `ANSWERS` or its own method says; counts the requests."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    ANSWERS = {  # noqa: RUF012 (only read)
        "/text": (200, TEXT, {}),
        "/empty": (200, b"", {}),
        "/missing": (404, b"no such file", {}),
        "/busy": (503, b"", {}),
        "/wrong": (200, b"something else", {}),
        "/page": (200, b"<!DOCTYPE html>", {"Content-Type": "text/html; charset=utf-8"}),
        "/loop": (302, b"", {"Location": "/loop"}),
        "/moved": (301, b"x" * 100, {"Location": "/text"}),
        "/moved-to-file": (302, b"", {"Location": "file:///etc/passwd"}),
        "/moved-to-invalid": (302, b"", {"Location": "http://[x"}),
        "/announced-too-long": (200, b"", {"Content-Length": "1000000000000"}),
        "/truncated": (200, TEXT[:1000], {"Content-Length": str(len(TEXT))}),
    }

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests[path] += 1
        self.close_connection = True
        match path:
            case "/busy-once" | "/limited" if self.server.requests[path] == 1:
                self.send(
                    503 if path == "/busy-once" else 429, b"", {"Retry-After": "3600"} if path == "/limited" else {}
                )
            case "/busy-once" | "/limited":
                self.send(200, TEXT, {})
            case "/downgrade":
                self.send(302, b"", {"Location": f"{self.server.other}/text"})
            case "/endless":
                self.send(200, b"", {"Transfer-Encoding": "identity"})
                while not self.server.over.is_set():
                    self.wfile.write(b"x" * 50_000)
            case "/slow":
                self.send(200, b"", {"Content-Length": str(len(TEXT))})
                while not self.server.over.wait(0.1):
                    self.wfile.write(b"x")
            case "/disconnected":
                self.connection.close()
            case "/secret":
                self.send(200 if self.headers["Authorization"] else 401, TEXT, {})
            case _ if path in self.ANSWERS:
                self.send(*self.ANSWERS[path])
            case _:  # also pip's requests
                self.server.over.wait()

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "Connection": "close"} | headers).items():
            if not (name == "Content-Length" and "Transfer-Encoding" in headers):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: Counter[str] = Counter()
        self.over = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.other = ""

    def handle_error(self, *args: object) -> None:
        pass  # clients disconnect in these tests


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
    yield from running(Server())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key and a self-signed certificate for 127.0.0.1, in one file."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = (
        builder.serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    )
    builder = builder.add_extension(address, critical=False)
    signed = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(
        key, hashes.SHA256()
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + signed.public_bytes(pem))
    return path


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = Server()
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.address = server.address.replace("http:", "https:")
    yield from running(server)


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PIP_") or name.lower().endswith("_proxy") or name.endswith("_CA_BUNDLE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "data" / "corpus.txt"


def get(*sources: str, out: Path, sha256: str | None = SHA256, limits: Limits = LIMITS) -> str:
    return download(params=DownloadParams(sources=list(sources), sha256=sha256), out=out, limits=limits)


def refusal(*sources: str, out: Path, sha256: str | None = SHA256, limits: Limits = LIMITS) -> str:
    """The message of a download that must fail and leave no file."""
    with pytest.raises(UserError) as caught:
        get(*sources, out=out, sha256=sha256, limits=limits)
    assert list(out.parent.iterdir()) == []
    return str(caught.value)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a wheel `chargpt_text==1.0`, where pip finds it."""
    (tmp_path / "wheels").mkdir()
    about = "chargpt_text-1.0.dist-info"
    with zipfile.ZipFile(
        tmp_path / "wheels" / "chargpt_text-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED
    ) as archive:
        archive.writestr("chargpt_text/a text.txt", TEXT)
        archive.writestr("bomb.txt", bytes(10**7))
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: chargpt_text\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))


@pytest.mark.parametrize(("path", "requests"), [("/text", 1), ("/busy-once", 2), ("/limited", 2), ("/moved", 2)])
def test_a_file_is_written_after_retries_and_redirects(server: Server, out: Path, path: str, requests: int) -> None:
    began = time.monotonic()
    assert get(f"{server.address}{path}", out=out, sha256=None) == SHA256
    assert {file.name: file.read_bytes() for file in out.parent.iterdir()} == {"corpus.txt": TEXT}
    assert server.requests.total() == requests
    assert path != "/limited" or time.monotonic() - began >= 1.0  # Retry-After, up to Limits.retry_after_s


@pytest.mark.parametrize(
    ("path", "reason", "requests", "limits"),
    [
        ("/missing", "status 404 Not Found", 1, LIMITS),
        ("/busy", "status 503 Service Unavailable", 3, LIMITS),
        ("/disconnected", "RemoteDisconnected", 3, LIMITS),
        ("/truncated", "IncompleteRead", 1, LIMITS),
        ("/wrong", f"expected SHA-256 {SHA256}, found ", 1, LIMITS),
        ("/empty", "expected content, found 0 bytes", 1, LIMITS),
        ("/loop", "TooManyRedirects", 6, LIMITS),
        ("/moved-to-file", "InvalidSchema", 1, LIMITS),
        ("/moved-to-invalid", "Invalid", 1, LIMITS),
        ("/announced-too-long", "larger than 200,000 bytes", 1, LIMITS),
        ("/endless", "larger than 200,000 bytes", 1, LIMITS),
        ("/slow", "not complete after 0.4 s", 1, replace(LIMITS, deadline_s=0.4)),
        ("/never", "no answer", 1, replace(LIMITS, read_s=0.2, attempts=1)),
    ],
)
def test_the_next_source_is_used_after_a_failure(
    server: Server, out: Path, path: str, reason: str, requests: int, limits: Limits, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gpt")
    get(f"{server.address}{path}", f"{server.address}/text", out=out, limits=limits)
    assert out.read_bytes() == TEXT
    assert f"{server.address}{path}: " in caplog.text
    assert reason in caplog.text
    assert server.requests[path] == requests


def test_a_web_page_is_refused_without_a_digest(server: Server, out: Path) -> None:
    assert "found a web page (text/html)" in refusal(f"{server.address}/page", out=out, sha256=None)


def test_tls_errors_and_redirects_to_http_are_refused(
    tls_server: Server, server: Server, certificate: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "self-signed certificate" in refusal(f"{tls_server.address}/text", out=out)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    tls_server.other = server.address
    assert "unsafe redirect from https to http" in refusal(f"{tls_server.address}/downgrade", out=out)
    assert not server.requests
    get(f"{tls_server.address}/text", out=out)


def test_messages_and_logs_contain_no_password_or_query_string(
    server: Server, out: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    host = server.address.removeprefix("http://")
    paths = ("wrong", "disconnected", "busy", "loop", "truncated")
    message = refusal(*(f"http://me:hidden@{host}/{path}?key=hidden" for path in paths), out=out)
    get(f"http://me:hidden@{host}/secret?key=hidden", out=out)
    printed = capsys.readouterr()
    output = message + caplog.text + printed.out + printed.err
    assert f"http://{host}/wrong?…" in output
    assert "hidden" not in output


def test_local_paths(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a poem.txt").write_bytes(TEXT)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for source in ("a poem.txt", "~/a poem.txt", str(tmp_path / "a poem.txt")):
        get(source, out=out, limits=replace(LIMITS, max_bytes=1))  # the size of a local file is not limited
        assert out.read_bytes() == TEXT
        out.unlink()
    assert f"no file {tmp_path}/none.txt" in refusal("none.txt", out=out)
    assert "/dev/zero is not a regular file" in refusal("/dev/zero", out=out)
    assert "File name too long" in refusal("x" * 300, out=out)
    assert "home directory" in refusal("~no-such-user/x.txt", out=out)


def test_a_file_with_the_pinned_digest_is_kept_and_a_failure_changes_nothing(out: Path) -> None:
    out.parent.mkdir()
    out.write_bytes(TEXT)
    assert get("none.txt", out=out) == SHA256
    out.write_bytes(b"old")
    with pytest.raises(UserError):
        get("none.txt", out=out)
    assert [(path.name, path.read_bytes()) for path in out.parent.iterdir()] == [("corpus.txt", b"old")]


@pytest.mark.usefixtures("wheels")
def test_a_member_of_a_wheel(out: Path) -> None:
    assert "no member 'x.txt'" in refusal("pypi:chargpt_text==1.0#x.txt", out=out)
    assert "larger than 200,000 bytes" in refusal("pypi:chargpt_text==1.0#bomb.txt", out=out)
    message = refusal("pypi:chargpt_text==2.0#x.txt", out=out)
    assert "pip download --no-deps chargpt_text==2.0" in message
    assert "wheels" not in message  # a path of this machine
    get("pypi:chargpt_text==2.0#x.txt", WHEEL, out=out)
    assert out.read_bytes() == TEXT


def test_a_package_index_that_never_answers(server: Server, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:hidden@{server.address.removeprefix('http://')}/simple")
    message = refusal(WHEEL, out=out, limits=replace(LIMITS, deadline_s=2))
    assert "pip timed out" in message
    assert "hidden" not in message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sources", "https://me:hidden@host/x", "expected a list of at least one source, found a str"),
        ("sources", ["x.txt", 3], "source 2 of 2: expected a string, found 3"),
        ("sources", ["ftp://me:hidden@host/x"], "'ftp:'"),
        ("sources", ["  "], "path of a local file"),
        ("sources", ["https:///x"], "https://HOST/FILE"),
        ("sources", ["https://me:hidden@host:x/"], "https://HOST/FILE"),
        ("sources", ["pypi:--index-url==1#x"], "'pypi:--index-url==1#x'"),
        ("sources", ["pypi:name#x"], "pypi:NAME==VERSION#MEMBER"),
        ("sha256", "86c4", "expected 64 hexadecimal digits, found '86c4'"),
    ],
)
def test_an_invalid_section_is_refused(key: str, value: object, message: str) -> None:
    section = {"sources": ["x"], "sha256": SHA256.upper()}
    assert check_section(Path("p"), "download", DownloadParams, {"download": section}).sha256 == SHA256
    with pytest.raises(UserError) as caught:
        check_section(Path("p"), "download", DownloadParams, {"download": section | {key: value}})
    assert f"download.{key}: " in str(caught.value)
    assert message in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_the_command_shows_progress_on_a_terminal_and_lists_every_failed_source(tmp_path: Path, server: Server) -> None:
    (tmp_path / "my book.txt").write_bytes(TEXT)
    (tmp_path / "params.yaml").write_text(f"download:\n  sources: [my book.txt]\n  sha256: {SHA256}\n")
    line = [sys.executable, "-m", "gpt", "download", "--params", "params.yaml", "--out", "corpus.txt"]
    master, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    subprocess.run(line, cwd=tmp_path, env=environment(), stderr=terminal, stdout=subprocess.DEVNULL, check=True)
    assert b"/7.00k [" in os.read(master, 4096)
    os.close(master)
    os.close(terminal)
    line += ["-S", f"download.sources=[none.txt, {server.address}/missing]", "-S", "download.sha256=null"]
    done = subprocess.run(line, cwd=tmp_path, env=environment(), text=True, capture_output=True, check=False)
    assert done.returncode == 2
    for part in ("gpt download: download.sources: ", f"no file {tmp_path}/none.txt", "/missing: status 404", "-S "):
        assert part in only_line(done.stderr)
    assert (tmp_path / "corpus.txt").read_bytes() == TEXT
