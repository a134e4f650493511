"""Options that the commands share, and their log."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from gpt.core.errors import printable
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
    list[Path],
    typer.Option("--log-file", metavar="FILE", help="File to append the command's log to; repeatable."),
]
LOG_FILE = [Path("gpt_nano.log")]

log = logging.getLogger("gpt")


class _LineFormatter(logging.Formatter):
    """One line for each message: text from outside can neither add lines nor send commands to a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record)).replace("\n", "\\n")


@contextmanager
def logging_to(paths: Sequence[Path], verb: str, about: str = "") -> Iterator[None]:
    r"""Append the log messages of the block to each file, between a line at its start and one with its duration.

    Args:
        about: subject of the command (the first digits of a run key or of a checkpoint's SHA-256). It follows the verb
            in brackets in each line, so that `grep 'train\[1a2b3c4d\]'` finds the lines of one run.
    """
    name = f"{verb}[{about}]" if about else verb
    formatter = _LineFormatter(f"%(asctime)s %(levelname)s {name}: %(message)s", "%Y-%m-%d %H:%M:%S")
    with ExitStack() as stack:
        for path in dict.fromkeys(paths):
            with explain_os_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                handler = logging.FileHandler(path, encoding="utf-8")
            handler.setFormatter(formatter)
            log.addHandler(handler)
            stack.callback(handler.close)
            stack.callback(log.removeHandler, handler)
        log.setLevel(logging.INFO)
        start = time.monotonic()
        try:
            log.info("started")
            yield
            log.info("done in %.1f s", time.monotonic() - start)
        except BaseException as error:
            log.log(
                logging.ERROR, "ended after %.1f s: %s", time.monotonic() - start, str(error) or type(error).__name__
            )
            raise


def report(text: str) -> None:
    """Print a message and log it."""
    print(printable(text), flush=True)
    log.info("%s", text)
