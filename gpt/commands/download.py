"""Fetch the corpus from the first source that gives it, and prove by its SHA-256 that it is the right one."""

from pathlib import Path
from typing import Annotated

import typer

from gpt.core.cli import LOG_FILE, Changes, LogFile, ParamsFile, logging_to
from gpt.core.params import read_section
from gpt.download.sources import DownloadParams, download


def command(
    params: ParamsFile,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File that the text is put into.")],
    changes: Changes = [],  # noqa: B006 (Typer copies it)
    log_file: LogFile = LOG_FILE,
) -> None:
    """Read the section, fetch the text."""
    with logging_to(log_file, "download"):
        download(params=read_section(params, "download", DownloadParams, changes), out=out)
