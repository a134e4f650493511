"""Child processes of the wrappers: start, signals, stderr and exit code."""

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
from pathlib import Path

import psutil

from gpt.core.errors import StoppedError, UserError, printable
from gpt.training import parent
from stages.execution import torchrun

POLL_S = 0.5  # between two calls of `on_poll`
JOIN_S = 2
STOPPED_AFTER_SAVING = StoppedError.exit_code
ERROR_LINE = re.compile(r"gpt( [a-z-]+)?: ")  # the beginning of a one-line error of the commands
STOPPED_LINE = "gpt train: stopped after step "  # that of StoppedError
KEPT_LINES, KEPT_LINE_BYTES = 2000, 1 << 16
# Waits until the other end of the pipe closes, then sends SIGTERM to a process.
GUARD = "import os, signal, sys; sys.stdin.read(); os.kill(int(sys.argv[1]), signal.SIGTERM)"


def status_of(code: int) -> str:
    """MLflow's run status for an exit code."""
    if code == 0:
        return "FINISHED"
    return "KILLED" if code == STOPPED_AFTER_SAVING or code > 128 else "FAILED"


def run(
    words: Sequence[str],
    logs: Sequence[Path],
    *,
    stage: str,
    mark: str,
    environment: Mapping[str, str] = {},
    on_poll: Callable[[], None] = lambda: None,
) -> int:
    """Run a command to its end and report its failure on stderr and in its log files.

    Args:
        words: the command.
        logs: the command's log files; may be none.
        mark: the name of this run in the log.
        on_poll: called repeatedly while the command runs; must not raise.

    Returns:
        The exit code; see `_exit_code`.

    Raises:
        UserError: there is no such command.

    """
    started = time.monotonic()
    with _signals() as (received, forward_to):
        child = _start(words, environment)
        forward_to.append(child)
        stderr = _StderrReader(child)
        with _guard(child):
            code = _wait(child, on_poll)
        seconds = time.monotonic() - started
        stderr.join(JOIN_S)  # a grandchild that is still alive would keep the pipe open
    by_torchrun = torchrun.is_torchrun(words)
    worker = torchrun.first_failure(stderr.text) if by_torchrun else None
    code = _exit_code(code, worker, received if by_torchrun else [], saved=stderr.has_stopped)
    if code:
        message = f"{Path(words[0]).name} ended with exit code {code}"
        _log_failure(logs, mark, message, stderr.text)
        if received:
            number = signal.SIGHUP if signal.SIGHUP in received else received[-1]  # SIGTERM may have followed SIGHUP
            print(f"stages.{stage}: stopped by {signal.Signals(number).name}", file=sys.stderr)
        elif worker and (worker.code < 0 or not stderr.errors):  # a killed worker leaves no message of its own
            crash = torchrun.without_summary(stderr.text) if worker.code > 0 else ""
            when = f"after {seconds:.0f} s; run again to continue"
            when += f"; details in {os.path.relpath(logs[0])}" if logs else ""
            print(f"{crash}stages.{stage}: {worker} {when}", file=sys.stderr)
        elif by_torchrun and (alone := torchrun.missing_nodes(stderr.text)):
            print(f"stages.{stage}: {alone}", file=sys.stderr)
        elif not stderr.errors:
            print(stderr.text or f"stages.{stage}: {message}\n", end="", file=sys.stderr)
    return code


def _wait(child: subprocess.Popen[bytes], on_poll: Callable[[], None]) -> int:
    """Wait for the child's end, polling; returns its exit code."""
    while True:
        on_poll()  # first at once: the connection to the store takes less time while the child imports its libraries
        with suppress(subprocess.TimeoutExpired):
            return child.wait(POLL_S)


def _exit_code(code: int, worker: torchrun.Worker | None, received: Sequence[int], *, saved: bool) -> int:
    """The exit code that a wrapper passes on.

    Torchrun itself ends with 1 whatever happened. So, in this order: 75 for a training that saved its state and
    stopped when torchrun received a signal; the code of the worker that failed first; 128 + n for a signal n; the
    child's own code.
    """
    if received and saved:
        return STOPPED_AFTER_SAVING
    if worker:
        code = worker.code
    elif code and received:
        code = -received[-1]
    return code if code >= 0 else 128 - code


def _log_failure(files: Sequence[Path], mark: str, message: str, stderr: str) -> None:
    """Append an error to the log files, followed by what the child wrote on stderr."""
    entry = f"{time.strftime('%Y-%m-%d %H:%M:%S')} ERROR {mark}: {message}\n{stderr}"
    for path in files:
        with suppress(OSError):  # a full disk must not hide the child's failure
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(entry)


def _start(words: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a child; on Linux, it receives SIGTERM when this process dies."""
    own = os.getpid()

    def die_with_parent() -> None:
        parent.end_with_parent(signal.SIGTERM)  # so that torchrun ends its workers too
        if os.getppid() != own:
            os._exit(1)  # this process died before the line above

    try:
        return subprocess.Popen(  # no thread runs yet, so a function before exec is safe
            words,
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            preexec_fn=die_with_parent if parent.LIBC else None,  # noqa: PLW1509
        )
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(
            f"{words[0]}: expected an executable command, found: {error.strerror}; "
            "put the environment's bin folder on PATH"
        ) from None


@contextmanager
def _guard(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Send the child SIGTERM when this process dies, where the system does not do it."""
    if parent.LIBC:
        yield
        return
    words = [sys.executable, "-c", GUARD, str(child.pid)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True) as guard:
        try:
            yield
        finally:
            guard.kill()  # before its pipe is closed


@contextmanager
def _signals() -> Iterator[tuple[list[int], list[subprocess.Popen[bytes]]]]:
    """Survive SIGINT and SIGHUP, which a terminal sends to the child as well, and forward SIGTERM to the child.

    Under nohup, SIGHUP stays ignored. After SIGHUP, SIGTERM is not forwarded: it reports the death of dvc, and a second
    signal would end torchrun before its workers have saved their state.

    Afterwards SIGINT interrupts again. SIGTERM does not, so that the results are published; but if it came because dvc
    was killed, this process exits, and `stages.sync` publishes the rest.
    """
    received: list[int] = []
    forward_to: list[subprocess.Popen[bytes]] = []
    parent_id = os.getppid()

    def handle(number: int, _frame: object) -> None:
        received.append(number)
        if os.getppid() != parent_id and forward_to and forward_to[0].returncode is not None:
            sys.exit(128 + number)
        if number == signal.SIGTERM and signal.SIGHUP not in received:
            for child in forward_to:
                _forward(child, number)

    previous = signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, handle)
    try:
        yield received, forward_to
    finally:
        signal.signal(signal.SIGINT, previous)


def _forward(child: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the processes that torchrun started, each in a session of its own; else to the child itself.

    They may receive it more than once. Torchrun ends without waiting for them at its third signal, and gets some itself
    where all processes of a job are signalled, as by Slurm and systemd.
    """
    workers: list[int] = []
    with suppress(psutil.Error, ProcessLookupError):
        workers = [each.pid for each in psutil.Process(child.pid).children() if os.getsid(each.pid) == each.pid]
    for worker in workers:
        with suppress(ProcessLookupError):
            os.kill(worker, number)
    if not workers:
        child.send_signal(number)


class _StderrReader(threading.Thread):
    """Reads a child's stderr: prints the commands' one-line errors at once, keeps the rest."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        assert child.stderr
        self._pipe = child.stderr
        self._kept: deque[str] = deque(maxlen=KEPT_LINES)
        self.errors: set[str] = set()  # one-line errors, printed
        self.start()

    @property
    def text(self) -> str:
        """The last lines without the one-line errors."""
        return "".join(self._kept)

    @property
    def has_stopped(self) -> bool:
        """Whether a training reported that it saved its state and stopped."""
        return any(line.startswith(STOPPED_LINE) for line in self.errors)

    def run(self) -> None:
        """Read to the end; print an error that several ranks report once."""
        for raw in iter(lambda: self._pipe.readline(KEPT_LINE_BYTES), b""):
            line = printable(raw.decode(errors="replace"))
            if not ERROR_LINE.match(line):
                self._kept.append(line)
            elif line not in self.errors:
                self.errors.add(line)
                print(line, end="", file=sys.stderr, flush=True)
