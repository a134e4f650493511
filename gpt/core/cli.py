"""What every command shares: its common options, the log file, progress that suits a terminal or a file."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from gpt.core.files import explain_os_errors

ParamsFile = Annotated[
    Path,
    typer.Option("--params", metavar="FILE", help="Params file to read; start from one in presets/."),
]
Changes = Annotated[
    list[str],
    typer.Option("--set", "-S", metavar="SECTION.KEY=VALUE", help="Override one key of the params file; repeatable."),
]
LogFile = Annotated[
    Path,
    typer.Option("--log-file", metavar="FILE", help="File that the command's log is appended to."),
]
LOG_FILE = Path("gpt_nano.log")

log = logging.getLogger("gpt")


@contextmanager
def logging_to(path: Path, verb: str, about: str = "") -> Iterator[None]:
    r"""Append what the block logs to `path`, framed by a line at the start and one with the seconds at the end.

    Args:
        about: what the command works on (the head of a run's key, of a checkpoint's SHA-256). It stands in brackets
            behind the verb in every line, so that `grep 'train\[1a2b3c4d\]'` finds all of one run and nothing else.
    """
    name = f"{verb}[{about}]" if about else verb
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {name}: %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    began = time.monotonic()
    try:
        log.info("started")
        yield
        log.info("done in %.1f s", time.monotonic() - began)
    except BaseException as error:
        reason = str(error) or type(error).__name__
        log.log(logging.ERROR, "ended after %.1f s: %s", time.monotonic() - began, reason)
        raise
    finally:
        log.removeHandler(handler)
        handler.close()


def report(text: str) -> None:
    """Tell the person something that the log should hold too."""
    print(text, flush=True)
    log.info("%s", text)
