"""Fetch the corpus from the first source that gives it, and prove by its SHA-256 that it is the right one."""

from pathlib import Path
from typing import Annotated

import typer

from gpt.command import LOG_FILE, Changes, LogFile, ParamsFile, logging_to, say
from gpt.files import atomic_write, prepare_output, sha256_file
from gpt.params import Section, read_section
from gpt.pinned import Digest, Sources, fetch_first
from gpt.sources import LIMITS
from gpt.transfer import Limits


class DownloadParams(Section):
    """The section `download`."""

    sources: Sources
    sha256: Digest | None


def download(*, params: DownloadParams, out: Path, limits: Limits = LIMITS) -> str:
    """Put the text of the first good source at `out`, unless the pinned text is there; return its SHA-256.

    Raises UserError when no source gives the text; `out` is then as it was.
    """
    prepare_output(out)
    if params.sha256 and out.is_file() and sha256_file(out) == params.sha256:
        say(f"{out} already has the pinned SHA-256")
        return params.sha256
    with atomic_write(out) as file:
        fetched = fetch_first("download.sources", params.sources, params.sha256, file, to=str(out), limits=limits)
    return fetched.sha256


def command(
    params: ParamsFile,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File that the text is put into.")],
    changes: Changes = [],  # noqa: B006 (Typer copies it)
    log_file: LogFile = LOG_FILE,
) -> None:
    """Read the section, fetch the text."""
    with logging_to(log_file, "download"):
        download(params=read_section(params, "download", DownloadParams, changes), out=out)
