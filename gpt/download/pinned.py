"""A file from the first of several sources that gives it, and the proof by its SHA-256 that it is the right one."""

import re
from collections.abc import Sequence
from typing import IO, Annotated

from pydantic import AfterValidator, BeforeValidator

from gpt.core.cli import report
from gpt.core.errors import UserError
from gpt.download.sources import LIMITS, fault, fetch
from gpt.download.transfer import Fetched, Limits, SourceError
from gpt.download.web import shown


def _sources(value: object) -> object:
    """Errors never repeat a source: an address may hold a password."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise ValueError(f"expected a list of at least one source, found {found}; write [SOURCE, …], in brackets")
    for number, source in enumerate(value, 1):
        problem = fault(source) if isinstance(source, str) else f"expected a text, found {type(source).__name__}"
        if problem:
            raise ValueError(f"source {number} of {len(value)}: {problem}; correct it")
    return value


def _digest(value: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise ValueError(f"expected 64 hexadecimal digits, found {value!r}; sha256sum FILE prints the digest of a file")
    return value.lower()


Sources = Annotated[list[str], BeforeValidator(_sources)]
Digest = Annotated[str, AfterValidator(_digest)]


def fetch_first(
    key: str, sources: Sequence[str], sha256: str | None, file: IO[bytes], *, to: str, limits: Limits = LIMITS
) -> Fetched:
    """Write what the first good source holds into `file`; with a digest, nothing else is good.

    Args:
        key: of the params file, that names the sources.
        to: where the bytes go, in words for the person who reads along.

    Raises:
        UserError: no source gives it.
    """
    failures: list[str] = []
    for source in sources:
        try:
            fetched = fetch(source, file, pinned=sha256 is not None, limits=limits)
            _check_digest(fetched, sha256)
        except SourceError as error:
            failures.append(f"{shown(source)}: {error}")
            report(f"gave nothing: {failures[-1]}")
        else:
            report(f"{fetched.size:,} bytes from {shown(source)} -> {to} (SHA-256 {fetched.sha256})")
            return fetched
    raise UserError(_all_down(key, failures, sha256))


def _check_digest(fetched: Fetched, pinned: str | None) -> None:
    if pinned and fetched.sha256 != pinned:
        beginning = fetched.beginning.decode("utf-8", errors="replace")
        raise SourceError(
            f"expected SHA-256 {pinned}, found {fetched.sha256} ({fetched.size:,} bytes that begin with {beginning!r})"
        )


def _all_down(key: str, failures: list[str], pinned: str | None) -> str:
    text = f"the text with SHA-256 {pinned}" if pinned else "the text"
    return (
        f"{key}: expected one of {len(failures)} to give {text}, found: {'; '.join(failures)}. "
        "By hand: save the text in a file of your own and name it with its whole path: "
        f"-S \"{key}=['/path/to/it.txt']\""
    )
