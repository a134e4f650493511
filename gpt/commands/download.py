"""Download the corpus and verify it by its SHA-256."""

from pathlib import Path
from typing import Annotated

import typer

from gpt.core.cli import LOG_FILE, Changes, LogFile, ParamsFile, logging_to
from gpt.core.params import read_section
from gpt.download.sources import DownloadParams, download


def command(
    params: ParamsFile,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write the corpus to.")],
    changes: Changes = [],  # noqa: B006 (Typer copies it)
    log_file: LogFile = LOG_FILE,
) -> None:
    """Read the section and download the corpus."""
    with logging_to(log_file, "download"):
        download(params=read_section(params, "download", DownloadParams, changes), out=out)
