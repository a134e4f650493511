"""One transfer of a text, whatever its source: what it may cost, how it fails, and the copying itself."""

import hashlib
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import IO

from tqdm import tqdm

BEGINNING_BYTES = 40  # what a message shows of a wrong file


@dataclass(frozen=True)
class Limits:
    """What fetching from one source may cost; seconds (`_s`) and bytes. A local file is bound by none of them."""

    connect_s: float = 5.0
    answer_s: float = 10.0  # name look-up, connection, redirects and headers together
    read_s: float = 10.0  # silence in the middle of a body
    deadline_s: float = 120.0  # all of one source, with its attempts and waits
    max_bytes: int = 1 << 30
    attempts: int = 3
    backoff_s: float = 0.5  # before the second attempt; doubles with each
    retry_after_s: float = 20.0  # a server that asks for a longer wait is given up


class SourceError(Exception):
    """Why a source gave no text; another attempt would end alike."""


class PassingError(SourceError):
    """Why a source gave no text now; another attempt, `after_s` seconds later, may succeed."""

    def __init__(self, reason: str, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.after_s = after_s


@dataclass(frozen=True)
class Fetched:
    """What came from a source: its length in bytes, its digest and its first few bytes."""

    size: int
    sha256: str
    beginning: bytes


def copy(
    pieces: Generator[bytes, None, None], file: IO[bytes], size: int | None, max_bytes: float = float("inf")
) -> Fetched:
    """Write pieces into `file` from its start, counting and hashing; a bar shows on a terminal.

    Raises SourceError when there are more than `max_bytes`, or none at all.
    """
    digest, written, beginning = hashlib.sha256(), 0, b""
    file.seek(0)
    file.truncate()
    with closing(pieces), tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        if (size or 0) > max_bytes:
            raise SourceError(f"larger than {max_bytes:,} bytes ({size:,})")
        for piece in pieces:
            written += len(piece)
            if written > max_bytes:
                raise SourceError(f"larger than {max_bytes:,} bytes")
            beginning = (beginning + piece)[:BEGINNING_BYTES] if len(beginning) < BEGINNING_BYTES else beginning
            digest.update(piece)
            file.write(piece)
            bar.update(len(piece))
    if not written:
        raise SourceError("expected a text, found 0 bytes")
    return Fetched(written, digest.hexdigest(), beginning)
