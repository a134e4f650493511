"""Fetch the corpus from the first source that gives it, and prove by its SHA-256 that it is the right one."""

import re
from pathlib import Path
from typing import Annotated

import typer
from pydantic import field_validator

from gpt.command import LOG_FILE, Changes, LogFile, ParamsFile, logging_to, say
from gpt.errors import UserError
from gpt.files import atomic_write, prepare_output, sha256_file
from gpt.params import Section, read_section
from gpt.sources import LIMITS, fault, fetch
from gpt.transfer import Fetched, Limits, SourceError
from gpt.web import shown


class DownloadParams(Section):
    """The section `download`. Its errors never repeat a source: an address may hold a password."""

    sources: list[str]
    sha256: str | None

    @field_validator("sources", mode="before")
    @classmethod
    def _list_of_sources(cls, value: object) -> object:
        if not isinstance(value, list) or not value:
            found = "an empty list" if value == [] else f"a {type(value).__name__}"
            raise ValueError(f"expected a list of at least one source, found {found}; write [SOURCE, …], in brackets")
        for number, source in enumerate(value, 1):
            problem = fault(source) if isinstance(source, str) else f"expected a text, found {type(source).__name__}"
            if problem:
                raise ValueError(f"source {number} of {len(value)}: {problem}; correct it")
        return value

    @field_validator("sha256")
    @classmethod
    def _hexadecimal(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            raise ValueError(
                f"expected 64 hexadecimal digits or null, found {value!r}; sha256sum FILE prints the digest of a file"
            )
        return value.lower() if value else value


def download(*, params: DownloadParams, out: Path, limits: Limits = LIMITS) -> str:
    """Put the text of the first good source at `out`, unless the pinned text is there; return its SHA-256.

    Raises UserError when no source gives the text; `out` is then as it was.
    """
    prepare_output(out)
    if params.sha256 and out.is_file() and sha256_file(out) == params.sha256:
        say(f"{out} already has the pinned SHA-256")
        return params.sha256
    failures: list[str] = []
    with atomic_write(out) as file:
        for source in params.sources:
            try:
                fetched = fetch(source, file, pinned=params.sha256 is not None, limits=limits)
                _check_digest(fetched, params.sha256)
            except SourceError as error:
                failures.append(f"{shown(source)}: {error}")
                say(f"gave nothing: {failures[-1]}")
            else:
                say(f"{fetched.size:,} bytes from {shown(source)} -> {out} (SHA-256 {fetched.sha256})")
                return fetched.sha256
        raise UserError(_all_down(failures, params.sha256))


def command(
    params: ParamsFile,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File that the text is put into.")],
    changes: Changes = [],  # noqa: B006 (Typer copies it)
    log_file: LogFile = LOG_FILE,
) -> None:
    """Read the section, fetch the text."""
    with logging_to(log_file, "download"):
        download(params=read_section(params, "download", DownloadParams, changes), out=out)


def _check_digest(fetched: Fetched, pinned: str | None) -> None:
    if pinned and fetched.sha256 != pinned:
        beginning = fetched.beginning.decode("utf-8", errors="replace")
        raise SourceError(
            f"expected SHA-256 {pinned}, found {fetched.sha256} ({fetched.size:,} bytes that begin with {beginning!r})"
        )


def _all_down(failures: list[str], pinned: str | None) -> str:
    text = f"the text with SHA-256 {pinned}" if pinned else "the text"
    return (
        f"download.sources: expected one of {len(failures)} to give {text}, found: {'; '.join(failures)}. "
        "By hand: save the text in a file of your own and name it with its whole path: "
        "-S \"download.sources=['/path/to/it.txt']\""
    )
