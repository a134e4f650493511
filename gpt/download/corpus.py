"""Fetch the corpus from the first source that gives it, and prove by its SHA-256 that it is the right one."""

from pathlib import Path

from gpt.core.cli import report
from gpt.core.files import atomic_write, prepare_output, sha256_file
from gpt.core.params import Section
from gpt.download.pinned import Digest, Sources, fetch_first
from gpt.download.sources import LIMITS
from gpt.download.transfer import Limits


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
        report(f"{out} already has the pinned SHA-256")
        return params.sha256
    with atomic_write(out) as file:
        fetched = fetch_first("download.sources", params.sources, params.sha256, file, to=str(out), limits=limits)
    return fetched.sha256
