"""Fetching a web address in bounded time and space. No message holds a password or a query string."""

import logging
import re
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.client import responses
from socket import EAI_NONAME, gaierror
from threading import Thread
from typing import IO, NoReturn, TypeVar
from urllib.parse import urljoin, urlsplit

import requests
from requests.exceptions import ChunkedEncodingError, SSLError
from urllib3 import Retry
from urllib3.exceptions import HTTPError, InvalidHeader, ReadTimeoutError

from gpt.download.transfer import Fetched, Limits, PassingError, SourceError, copy

PIECE_BYTES = 1 << 16
REDIRECTS = 5

WEB = re.compile(r"https?://", re.IGNORECASE)

T = TypeVar("T")
log = logging.getLogger("gpt")


def fetch_web(url: str, file: IO[bytes], pinned: bool, limits: Limits) -> Fetched:
    """Fetch an address; what can pass is tried again after a growing wait, all before one deadline."""
    end = time.monotonic() + limits.deadline_s
    attempt = 1
    while True:
        try:
            answer_s = min(limits.answer_s, end - time.monotonic())
            response = _in_time(lambda: _open(url, limits), answer_s, f"no answer in {limits.answer_s:g} s")
            with response:
                return copy(_body(response, pinned, end, limits), file, _length(response), limits.max_bytes)
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


def shown(source: str) -> str:
    """A source as it may be printed and logged: an address without user, password and query, others as they are."""
    if not WEB.match(source):
        return source
    parts = urlsplit(source)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{'?…' * bool(parts.query)}"


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
        raise SourceError(f"no trustworthy TLS connection ({_words(_root(error))})") from None
    except requests.ConnectTimeout:  # the system has already knocked several times
        raise SourceError(f"no connection in {limits.connect_s:g} s") from None
    except requests.Timeout:
        raise SourceError(f"no answer in {limits.read_s:g} s") from None
    except ChunkedEncodingError:
        raise PassingError("the body broke off") from None
    except requests.ConnectionError as error:
        if error.args and isinstance(error.args[0], ReadTimeoutError):
            raise SourceError(f"the body stopped for {limits.read_s:g} s") from None
        root = _root(error)
        unknown = isinstance(root, gaierror) and root.errno == EAI_NONAME  # no such host: asking again helps nobody
        raise (SourceError if unknown else PassingError)(f"no connection ({_words(root)})") from None
    except (requests.RequestException, HTTPError) as error:
        raise SourceError(f"the exchange failed ({type(error).__name__})") from None
    except OSError as error:  # certificates that the environment names but that are not there
        raise SourceError(f"the exchange failed ({error})") from None


def _root(error: BaseException) -> BaseException:
    """The error at the bottom of a chain."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return error


def _words(error: BaseException) -> str:
    """The system's own words for an error, which hold no address."""
    words = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or ""
    return words.rstrip(".") or type(error).__name__
