"""The shared log file: which of its lines belong to one run, and how a failed child's last words get into it.

A line of ours reads `2026-11-21 07:00:00 INFO train[1a2b3c4d]: message`; in brackets stands what the command worked on.
Lines without such a beginning continue the line before them.
"""

import re
import time
from pathlib import Path

_BEGINNING = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [A-Z]+ (\S+): ")


def frame(verb: str, about: str) -> str:
    """How the lines about one run are marked: verb and the first 8 digits of a run's key or a checkpoint's SHA-256."""
    return f"{verb}[{about[:8]}]" if about else verb


def part_of_log(path: Path, marked: str) -> str:
    """The lines of the log that carry this mark, with the lines that continue them."""
    found: list[str] = []
    ours = False
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                beginning = _BEGINNING.match(line)
                ours = beginning[1] == marked if beginning else ours
                if ours:
                    found.append(line)
    return "".join(found)


def append_failure(path: Path, marked: str, message: str, text: str) -> None:
    """Append an error and, as its continuation, what the child had written on stderr."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR {marked}: {message}\n{text}")
