"""Children: how they are started and end, what they hear of signals, and which of their words a person sees."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import IO, NoReturn

from gpt.core.errors import UserError
from stages import lock_list, torchrun
from stages.log import append_failure, frame

LOOK_S = 0.5  # between two looks at what the child has written
JOIN_S = 2
STOPPED_AFTER_SAVING = 75  # a training command's own code for "asked to stop, state saved"
OURS = re.compile(r"gpt( [a-z-]+)?: ")  # how a line begins that a command says to a person
KEPT_LINES, KEPT_LINE_BYTES = 2000, 1 << 16
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before any fork


def enter(stage: str, main: Callable[[list[str]], int]) -> NoReturn:
    """Run a stage on this process's arguments; a person's mistake becomes one line and exit code 2."""
    if "DVC_STAGE" in os.environ:
        _end_with_parent()  # dvc killed by SIGKILL would leave us, and a second `dvc repro` would start beside us
        if os.getpgid(os.getppid()) != os.getpgrp():  # it was killed before the line above: we have been adopted
            os._exit(1)
        lock_list.sign(stage)
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"stages.{stage}: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    if "DVC_STAGE" in os.environ:
        lock_list.withdraw()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without taking MLflow's thousands of modules apart, which costs half a second


def options(command: Sequence[str], *names: str) -> list[str]:
    """All values that a command line gives to an option, in the forms `--name value` and `--name=value`."""
    found = [after for word, after in pairwise(command) if word in names]
    return found + [
        value for word in command for name, equals, value in [word.partition("=")] if equals and name in names
    ]


def option(command: Sequence[str], name: str) -> Path:
    """The path that a command line gives to an option.

    Raises:
        UserError: the option is not there.

    """
    values = options(command, name)
    if not values:
        raise UserError(
            f"{name}: expected this option in the command to run, found: {' '.join(command) or 'no command'}"
        )
    return Path(values[-1])


def with_option(command: Sequence[str], name: str, value: object) -> list[str]:
    """The command with an option at its end, unless the person gave that option."""
    return [*command] if options(command, name) else [*command, name, str(value)]


def status_of(code: int) -> str:
    """MLflow's word for an exit code."""
    if code == 0:
        return "FINISHED"
    return "KILLED" if code == STOPPED_AFTER_SAVING or code > 128 else "FAILED"


def run(
    command: Sequence[str],
    *,
    stage: str,
    about: str,
    log_file: Path,
    environment: Mapping[str, str] = {},
    meanwhile: Callable[[], None] = lambda: None,
) -> int:
    """Run a command to its end and see to its errors.

    Args:
        about: the run's key or the checkpoint's SHA-256, for the log.
        meanwhile: called again and again while the command runs; must not raise.

    Returns:
        The exit code; that of the worker where torchrun hides it, 128 + n for signal n.

    Raises:
        UserError: there is no such command.

    """
    began, parent = time.monotonic(), os.getppid()
    with _signals() as (received, forward_to):
        child = _start(command, environment)
        forward_to.append(child)
        words = _Words(child.stderr)
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = child.wait(LOOK_S)  # first, so that a command which refuses at once is not kept waiting
                break
            if os.getppid() != parent:
                lock_list.withdraw()  # dvc is dead; whoever comes next shall wait for us instead of being refused
            meanwhile()
        seconds = time.monotonic() - began
        words.join(JOIN_S)  # a grandchild that lives on would keep the pipe open
        text = "".join(words.kept)
        code = torchrun.exit_code(code, text if torchrun.is_torchrun(command) else "", received)
        if received and any(": stopped after step " in line for line in words.passed_on):
            code = STOPPED_AFTER_SAVING  # torchrun hides it when it is asked to stop itself
    if code:
        name = command[0]
        with suppress(OSError):  # a full disk must not hide why the child failed
            append_failure(log_file, frame(stage, about), f"{Path(name).name} ended with exit code {code}", text)
        worker = torchrun.failed_first(text) if torchrun.is_torchrun(command) else None
        if received:
            print(f"stages.{stage}: stopped by {signal.Signals(received[-1]).name}", file=sys.stderr)
        elif worker and (worker.code < 0 or not words.passed_on):  # a worker that was killed could not say so itself
            _print_failure(stage, worker, text, f"after {seconds:.0f} s", log_file)
        elif not words.passed_on:
            print(text or f"stages.{stage}: {name} ended with exit code {code}\n", end="", file=sys.stderr)
    return code


def _print_failure(stage: str, worker: torchrun.Worker, text: str, when: str, log_file: Path) -> None:
    """Say in one line which worker failed first; one that crashed by itself has left a traceback to show before."""
    crash = torchrun.without_box(text) if worker.code > 0 else ""
    file = log_file.name if log_file.parent == Path.cwd() else log_file
    print(f"{crash}stages.{stage}: {worker} {when}; run again to continue; details in {file}", file=sys.stderr)


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a child that is asked to end when this process dies, however it dies (Linux only)."""
    parent = os.getpid()

    def die_with_parent() -> None:
        _end_with_parent()
        if os.getppid() != parent:
            os._exit(1)  # died before the line above

    try:
        return subprocess.Popen(  # no thread runs yet, so that a function before exec is safe
            command,
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            preexec_fn=die_with_parent,  # noqa: PLW1509
        )
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(
            f"{command[0]}: expected a command that can be run, found: {error.strerror}; "
            "put the environment's bin folder on PATH"
        ) from None


def _end_with_parent() -> None:
    """Ask the system for a SIGTERM when this process's parent dies, however it dies (Linux only)."""
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # SIGTERM, since torchrun then takes its workers along


@contextmanager
def _signals() -> Iterator[tuple[list[int], list[subprocess.Popen[bytes]]]]:
    """Outlive SIGINT, which a terminal sends to the child as well, and pass SIGTERM on to it.

    Afterwards SIGINT interrupts again; SIGTERM still does not, so that what is left to publish is published. But if
    it came because dvc was killed, this process ends too: the next command of the project publishes what is missing.
    """
    received: list[int] = []
    forward_to: list[subprocess.Popen[bytes]] = []
    parent = os.getppid()

    def handle(number: int, _frame: object) -> None:
        received.append(number)
        if os.getppid() != parent and forward_to and forward_to[0].returncode is not None:
            os._exit(128 + number)
        if number == signal.SIGTERM:
            for child in forward_to:
                child.send_signal(number)

    before = signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    try:
        yield received, forward_to
    finally:
        signal.signal(signal.SIGINT, before)


class _Words(threading.Thread):
    """Reads a child's stderr: passes our one-line errors on at once, keeps the rest."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        super().__init__(daemon=True)
        assert pipe
        self._pipe = pipe
        self.kept: deque[str] = deque(maxlen=KEPT_LINES)
        self.passed_on: set[str] = set()
        self.start()

    def run(self) -> None:
        """Read to the end; several ranks say the same, a person hears it once."""
        for raw in iter(lambda: self._pipe.readline(KEPT_LINE_BYTES), b""):
            line = raw.decode(errors="replace")
            if not OURS.match(line):
                self.kept.append(line)
            elif line not in self.passed_on:
                self.passed_on.add(line)
                print(line, end="", file=sys.stderr, flush=True)
