"""Downloads against real servers on the loopback: right message, right retries, bounded time and disk."""

import hashlib
import ipaddress
import logging
import os
import re
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
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gpt.core.errors import UserError
from gpt.core.params import check_section
from gpt.download.corpus import DownloadParams, download
from gpt.download.transfer import Limits

TEXT = b"Speak, speak.\n" * 500
SHA256 = hashlib.sha256(TEXT).hexdigest()
WRONG = b"something else"
WRONG_SHA256 = hashlib.sha256(WRONG).hexdigest()
REPO = Path(__file__).resolve().parents[2]
LIMITS = Limits(deadline_s=20.0, max_bytes=200_000, backoff_s=0.02, retry_after_s=1.5)
TIGHT = {
    "/stalled": replace(LIMITS, read_s=0.3),
    "/dripping": replace(LIMITS, deadline_s=0.4),
    "/dripping/headers": replace(LIMITS, answer_s=0.3),
    "/never": replace(LIMITS, answer_s=0.3),
}
SLACK_S = 3.0  # what a busy machine may add to a limit; far below the limits that must not be the ones that act


class Handler(BaseHTTPRequestHandler):
    """Answers each path in its own way; counts what was asked."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked[path] += 1
        self.close_connection = True
        getattr(self, "answer" + path.replace("/", "_").replace("-", "_"))()

    def send(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_text(self) -> None:
        self.send(200, TEXT)

    def answer_empty(self) -> None:
        self.send(200)

    def answer_missing(self) -> None:
        self.send(404, b"no such thing")

    def answer_busy_always(self) -> None:
        self.send(503)

    def answer_busy_once(self) -> None:
        self.send(503) if self.server.asked[self.path] == 1 else self.send(200, TEXT)

    def answer_limited(self) -> None:
        self.send(429, Retry_After="1") if self.server.asked[self.path] == 1 else self.send(200, TEXT)

    def answer_limited_until_a_date(self) -> None:
        until = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
        self.send(429, Retry_After=until)

    def answer_truncated(self) -> None:
        self.send(200, TEXT[:1000], length=len(TEXT))

    def answer_truncated_once(self) -> None:
        self.send(200, TEXT[: 1000 if self.server.asked[self.path] == 1 else None], length=len(TEXT))

    def answer_broken(self) -> None:
        self.connection.close()

    def answer_wrong(self) -> None:
        self.send(200, WRONG)

    def answer_page(self) -> None:
        self.send(200, b"<!DOCTYPE html><title>Log in</title>", Content_Type="text/html; charset=utf-8")

    def answer_loop(self) -> None:
        self.send(302, Location="/loop")

    def answer_moved(self) -> None:
        self.send(301, Location="/text")

    def answer_moved_to_a_file(self) -> None:
        self.send(302, Location="file:///etc/passwd")

    def answer_downgrade(self) -> None:
        self.send(302, Location=f"{self.server.other}/text")

    def answer_announced_too_long(self) -> None:
        self.send(200, length=10**12)

    def answer_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        while not self.server.over.is_set():
            self.server.sent += self.wfile.write(b"x" * 50_000)

    def answer_endless_redirect(self) -> None:
        self.send_response(302)
        self.send_header("Location", "/text")
        self.end_headers()
        while not self.server.over.is_set():
            self.wfile.write(b"x" * 50_000)

    def answer_dripping(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(TEXT)))
        self.end_headers()
        self.drip()

    def answer_dripping_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        self.drip()

    def answer_stalled(self) -> None:
        self.send(200, TEXT[:1000], length=len(TEXT))
        self.server.over.wait()

    def answer_never(self) -> None:
        self.server.over.wait()

    def answer_simple_chargpt_text_(self) -> None:
        self.server.over.wait()

    def answer_secret(self) -> None:
        self.send(200 if self.headers["Authorization"] else 401, TEXT)

    def drip(self) -> None:
        while not self.server.over.wait(0.1):
            self.wfile.write(b"x")

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.sent = 0
        self.over = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.other = ""

    def handle_error(self, *args: object) -> None:
        pass  # clients that hang up are what we test


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
    """A key and a certificate for 127.0.0.1 that signs itself, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + signed.public_bytes(serialization.Encoding.PEM)
    )
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
    """The message of a download that must fail and leave nothing behind."""
    with pytest.raises(UserError) as caught:
        get(*sources, out=out, sha256=sha256, limits=limits)
    assert list(out.parent.iterdir()) == []
    return str(caught.value)


def wheel(folder: Path, members: dict[str, bytes]) -> Path:
    """Put a wheel `chargpt_text==1.0` with these members into a folder."""
    folder.mkdir()
    about = {
        "chargpt_text-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: chargpt_text\nVersion: 1.0\n",
        "chargpt_text-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "chargpt_text-1.0.dist-info/RECORD": b"",
    }
    path = folder / "chargpt_text-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (members | about).items():
            archive.writestr(name, content)
    return path


# -- addresses


@pytest.mark.parametrize("pinned", [SHA256, None])
def test_a_text_comes_whole(server: Server, out: Path, pinned: str | None) -> None:
    assert get(f"{server.address}/text", out=out, sha256=pinned) == SHA256
    assert [path.name for path in out.parent.iterdir()] == ["corpus.txt"]
    assert out.read_bytes() == TEXT


@pytest.mark.parametrize("path", ["/busy/once", "/truncated/once", "/moved"])
def test_what_passes_is_tried_again(server: Server, out: Path, path: str) -> None:
    get(f"{server.address}{path}", out=out)
    assert out.read_bytes() == TEXT
    assert sum(server.asked.values()) == 2


@pytest.mark.parametrize(
    ("path", "reason", "times"),
    [
        ("/missing", "status 404 Not Found", 1),
        ("/busy/always", "status 503 Service Unavailable, 3 times", 3),
        ("/truncated", "the body broke off, 3 times", 3),
        ("/broken", "no connection (RemoteDisconnected), 3 times", 3),
        ("/wrong", f"expected SHA-256 {SHA256}, found {WRONG_SHA256} (14 bytes that begin with 'something else')", 1),
        ("/page", "expected SHA-256", 1),
        ("/empty", "expected a text, found 0 bytes", 1),
        ("/loop", "redirects more than 5 times", 6),
        ("/moved/to/a/file", "redirects to an address that is neither https nor http", 1),
        ("/announced/too/long", "larger than 200,000 bytes", 1),
        ("/stalled", "the body stopped for 0.3 s", 1),
        ("/dripping", "not done in 0.4 s", 1),
        ("/dripping/headers", "no answer in 0.3 s", 1),
        ("/never", "no answer in 0.3 s", 1),
    ],
)
def test_an_address_that_gives_nothing(server: Server, out: Path, path: str, reason: str, times: int) -> None:
    began = time.monotonic()
    message = refusal(f"{server.address}{path}", "next.txt", out=out, limits=TIGHT.get(path, LIMITS))
    assert time.monotonic() - began < SLACK_S
    assert f"{server.address}{path}: {reason}" in message
    assert "next.txt: there is no such file" in message
    assert server.asked[path] == times


def test_a_host_that_nobody_knows_is_not_asked_again(out: Path) -> None:
    assert "nobody.invalid/: no connection (Name or service not known)" in refusal("http://nobody.invalid/", out=out)


@pytest.mark.parametrize("path", ["/wrong", "/endless", "/truncated"])
def test_the_next_source_replaces_what_came_from_the_one_before(server: Server, out: Path, path: str) -> None:
    get(f"{server.address}{path}", f"{server.address}/text", out=out)
    assert out.read_bytes() == TEXT


def test_the_wait_that_a_server_asks_for_is_kept(server: Server, out: Path) -> None:
    began = time.monotonic()
    get(f"{server.address}/limited", out=out)
    assert 1.0 <= time.monotonic() - began < 1.0 + SLACK_S
    assert server.asked["/limited"] == 2


def test_too_long_a_wait_is_not_kept(server: Server, out: Path) -> None:
    message = refusal(f"{server.address}/limited/until/a/date", out=out)
    assert re.search(
        r"status 429 Too Many Requests, and waiting 3[56]\d\d s for another attempt takes too long", message
    )
    assert server.asked["/limited/until/a/date"] == 1


def test_a_body_without_end_stops_at_the_cap(server: Server, out: Path) -> None:
    assert "larger than 200,000 bytes" in refusal(f"{server.address}/endless", out=out)
    assert server.sent < 20_000_000, "the rest stayed in the sockets' buffers"


def test_the_body_of_a_redirect_is_not_read(server: Server, out: Path) -> None:
    get(f"{server.address}/endless/redirect", out=out)
    assert out.read_bytes() == TEXT


def test_a_web_page_is_refused_when_nothing_is_pinned(server: Server, out: Path) -> None:
    assert "expected a text, found a web page (text/html)" in refusal(f"{server.address}/page", out=out, sha256=None)


def test_a_redirect_from_https_to_http_is_refused(
    tls_server: Server, server: Server, certificate: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    get(f"{tls_server.address}/text", out=out)
    out.unlink()
    tls_server.other = server.address
    message = refusal(f"{tls_server.address}/downgrade", out=out)
    assert f"redirects from https to http ({server.address}/text)" in message
    assert not server.asked


def test_an_unknown_certificate_is_refused_at_once(
    tls_server: Server, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gpt")
    message = refusal(f"{tls_server.address}/text", out=out)
    assert "no trustworthy TLS connection (self-signed certificate)" in message
    assert "next attempt" not in caplog.text


def test_passwords_and_queries_are_not_shown(
    server: Server, out: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, "gpt")
    host = server.address.removeprefix("http://")
    message = refusal(*(f"http://me:hidden@{host}/{path}?key=hidden" for path in ("wrong", "broken", "loop")), out=out)
    get(f"http://me:hidden@{host}/secret?key=hidden", out=out)
    printed = capsys.readouterr()
    told = message + caplog.text + printed.out + printed.err
    assert f"http://{host}/wrong?…" in told
    assert "hidden" not in told


# -- local files


def test_a_local_path_with_spaces(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my books").mkdir()
    (tmp_path / "my books" / "a poem.txt").write_bytes(TEXT)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for source in ("my books/a poem.txt", "~/my books/a poem.txt", str(tmp_path / "my books/a poem.txt")):
        get(source, out=out, limits=replace(LIMITS, max_bytes=1))  # one's own file may be of any size
        assert out.read_bytes() == TEXT
        out.unlink()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("nothing.txt", "there is no such file"),
        ("/dev/zero", "it is no regular file"),
        ("x" * 300, "it cannot be read: File name too long"),
        ("~nobody-here/x.txt", "there is no such home folder"),
    ],
)
def test_a_local_path_that_gives_nothing(out: Path, source: str, reason: str) -> None:
    assert f"{source}: {reason}" in refusal(source, out=out)


def test_a_pinned_text_that_is_there_is_kept(out: Path) -> None:
    out.parent.mkdir()
    out.write_bytes(TEXT)
    assert get("nothing.txt", out=out) == SHA256


def test_a_failure_leaves_the_old_file(out: Path) -> None:
    out.parent.mkdir()
    out.write_bytes(b"old")
    with pytest.raises(UserError):
        get("nothing.txt", out=out)
    assert [(path.name, path.read_bytes()) for path in out.parent.iterdir()] == [("corpus.txt", b"old")]


# -- wheels


def test_a_member_of_a_wheel(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(tmp_path / "wheels", {"chargpt_text/a text.txt": TEXT, "big.txt": b"x" * 200_001})
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    roomy = replace(LIMITS, max_bytes=10**6)
    get("pypi:chargpt_text==1.0#chargpt_text/a text.txt", out=out, limits=roomy)
    assert out.read_bytes() == TEXT
    out.unlink()
    assert "the wheel has no member 'x.txt'" in refusal("pypi:chargpt_text==1.0#x.txt", out=out, limits=roomy)
    assert "pip's files grew beyond 200,000 bytes" in refusal("pypi:chargpt_text==1.0#big.txt", out=out)


def test_a_member_that_unpacks_beyond_the_cap(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = wheel(tmp_path / "wheels", {})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.txt", bytes(10**7))
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    assert "larger than 200,000 bytes" in refusal("pypi:chargpt_text==1.0#bomb.txt", out=out)


def test_no_such_wheel_and_no_path_of_this_machine(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(tmp_path / "wheels", {})
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    message = refusal("pypi:chargpt_text==2.0#x.txt", out=out)
    assert "pypi:chargpt_text==2.0#x.txt: pip found no wheel of chargpt_text==2.0" in message
    assert "wheels" not in message


def test_an_index_that_never_answers(server: Server, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:hidden@{server.address.removeprefix('http://')}/simple")
    began = time.monotonic()
    message = refusal("pypi:chargpt-text==1.0#x.txt", out=out, limits=replace(LIMITS, deadline_s=1.5))
    assert time.monotonic() - began < SLACK_S
    assert server.asked["/simple/chargpt-text/"] == 1
    assert "pip was not done in 1.5 s" in message
    assert "hidden" not in message
    assert "127.0.0.1" not in message


# -- the section and the command


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sources", [], "download.sources: expected a list of at least one source, found an empty list"),
        (
            "sources",
            "https://me:hidden@host/x",
            "download.sources: expected a list of at least one source, found a ",
        ),
        ("sources", ["x.txt", 3], "download.sources: source 2 of 2: expected a text, found int"),
        ("sources", ["ftp://me:hidden@host/x"], "found the scheme ftp://"),
        ("sources", ["  "], "found a blank text"),
        ("sources", ["https:///x"], "expected an address with a host"),
        ("sources", ["https://me:hidden@host:x/"], "found one that cannot be read"),
        ("sources", ["pypi:--index-url==1#x"], "expected pypi:NAME==VERSION#MEMBER, found 'pypi:--index-url==1#x'"),
        ("sources", ["pypi:name#x"], "expected pypi:NAME==VERSION#MEMBER"),
        ("sha256", "86c4", "download.sha256: expected 64 hexadecimal digits, found '86c4'"),
        ("sha256", 86, "download.sha256: expected"),
    ],
)
def test_a_wrong_section_is_refused(key: str, value: object, message: str) -> None:
    section = {"sources": ["x"], "sha256": None} | {key: value}
    with pytest.raises(UserError) as caught:
        check_section(
            Path("params.yaml"),
            "download",
            DownloadParams,
            {"download": section},
        )
    assert message in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_a_digest_in_capitals_is_the_same_digest() -> None:
    assert DownloadParams(sources=["x"], sha256=SHA256.upper()).sha256 == SHA256


def command(folder: Path, *arguments: str, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Run the real command in a folder with a params file that pins TEXT and names a source that is not there."""
    (folder / "params.yaml").write_text(f"download:\n  sources: [not here.txt]\n  sha256: {SHA256}\n")
    line = [sys.executable, "-m", "gpt", "download", "--params", "params.yaml", "--out", "data/corpus.txt", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    return subprocess.run(
        line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False, timeout=60
    )


def test_the_command_fetches_ones_own_text(tmp_path: Path) -> None:
    (tmp_path / "my book.txt").write_bytes(TEXT)
    ended = command(tmp_path, "-S", "download.sources=[my book.txt]", "-S", "download.sha256=null", "--log-file", "log")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert SHA256 in ended.stdout
    assert (tmp_path / "data/corpus.txt").read_bytes() == TEXT
    assert SHA256 in (tmp_path / "log").read_text()


def test_a_bar_shows_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "not here.txt").write_bytes(TEXT)
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    try:
        termios.tcsetwinsize(theirs, (24, 80))
        assert command(tmp_path, stderr=theirs).returncode == 0
        assert b"/7.00k [" in os.read(ours, 4096)
    finally:
        os.close(ours)
        os.close(theirs)


def test_the_command_lists_all_sources_that_are_down(tmp_path: Path, server: Server) -> None:
    ended = command(
        tmp_path, "-S", f"download.sources=[not here.txt, {server.address}/missing, {server.address}/wrong]"
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    for part in (
        "gpt download: download.sources: expected one of 3",
        f"not here.txt: there is no such file in {tmp_path}; give its whole path",
        f"{server.address}/missing: status 404 Not Found",
        f"{server.address}/wrong: expected SHA-256 {SHA256}, found ",
        "name it with its whole path: -S \"download.sources=['/path/to/it.txt']\"",
    ):
        assert part in line
    assert list((tmp_path / "data").iterdir()) == []
