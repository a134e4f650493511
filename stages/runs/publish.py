"""Publication of run folders to MLflow: connect while the child runs, tolerate errors, make the run equal to files."""

import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from gpt.core.errors import UserError, printable
from gpt.fast_import import no_collections
from stages.runs import run_record
from stages.runs.run_record import HistoryReader

if TYPE_CHECKING:
    from stages.tracking.store import Store

SQLITE = "sqlite:///"
LONGEST_ERROR = 1000  # characters
RETRY_S = 30  # between two attempts to reach a store that failed
LAST_S = 25  # by which publication delays the end of a stage, at most
# MLflow's defaults let a server that does not answer block for four minutes.
CLIENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # a server may ask for minutes
    # Else MLflow would send files past the server to its artifact store, which need not be reachable from here.
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def tracking_uri(root: Path) -> str:
    """The address of the tracking store; a relative path is relative to the main workspace."""
    address = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    scheme, separator, path = address.partition(SQLITE)
    return address if scheme or not separator else f"{SQLITE}{root / path}"


def connect(root: Path, experiment: str) -> "Store":
    """Import MLflow, which takes more than a second, and open the store."""
    for name, value in CLIENT.items():
        os.environ.setdefault(name, value)
    for name in ("no_proxy", "NO_PROXY"):  # a proxy cannot reach a server on this machine's loopback interface
        given = filter(None, os.environ.get(name, "").split(","))
        os.environ[name] = ",".join(dict.fromkeys([*given, "localhost", "127.0.0.1", "::1"]))
    with no_collections():  # the import, and what MLflow imports to open a store
        from stages.tracking.store import Store  # noqa: PLC0415

        return Store(tracking_uri(root), root, experiment)


class DeletedRunError(UserError):
    """A user deleted the run of this model in MLflow."""


class Publisher:
    """Performs actions on the store, one at a time, in a thread: neither the training nor its output waits for them.

    If the store fails, it warns once and continues: the training never fails.
    """

    def __init__(self, stage: str, root: Path, experiment: str) -> None:
        self._stage, self._root, self._experiment = stage, root, experiment
        self._address = without_credentials(tracking_uri(root))
        self._store: Store | None = None
        self._thread: Thread | None = None
        self._warned = False
        self._retry_at = 0.0

    def attempt(self, action: Callable[["Store"], object]) -> None:
        """Start an action, unless the previous one still runs or failed a short time ago; errors become the warning."""
        running = self._thread and self._thread.is_alive()
        if not running and time.monotonic() >= self._retry_at:
            self._start(action)

    def finish(self, action: Callable[["Store"], object]) -> None:
        """Perform the last action, after the previous one; give up both after `LAST_S` seconds."""
        deadline = time.monotonic() + LAST_S
        with self.tolerating_errors(self._address):
            self._join(deadline)
            self._start(action)
            self._join(deadline)

    @contextmanager
    def tolerating_errors(self, what: str) -> Iterator[None]:
        """Turn any error in the block into the one warning, which names `what` failed."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:  # of MLflow, requests, SQLAlchemy, the disk …
            if not self._warned:
                self._warned = True
                text = f"tracking is unavailable ({what}): {brief(error)}; run `python -m stages.sync` later to publish"
                print(f"stages.{self._stage}: {text}", file=sys.stderr, flush=True)

    def _start(self, action: Callable[["Store"], object]) -> None:
        self._thread = Thread(target=self._perform, args=[action], daemon=True)  # a daemon does not delay the exit
        self._thread.start()

    def _perform(self, action: Callable[["Store"], object]) -> None:
        """Connect if necessary, then perform the action."""
        with self.tolerating_errors(self._address):
            self._retry_at = time.monotonic() + RETRY_S
            self._store = self._store or connect(self._root, self._experiment)
            action(self._store)
            self._store.check_file()
            self._retry_at = 0.0

    def _join(self, deadline: float) -> None:
        if self._thread:
            self._thread.join(max(0, deadline - time.monotonic()))
            if self._thread.is_alive():
                raise UserError(f"the store did not finish within {LAST_S} s after the end of the stage")


def publish_run(store: "Store", folder: Path, stages: Sequence[str] = run_record.STAGES) -> bool:
    """Make the MLflow run of a run folder equal to the folder; returns whether MLflow changed.

    Args:
        stages: those whose results are new, if the run has all others.

    """
    train = run_record.read(folder, "train")
    if not train:
        return False
    records = [record for stage in stages if (record := run_record.read(folder, stage))]
    run = store.find_or_create("run.key", folder.name, train)
    if train.restored and not run.restored:  # that of the training is better
        records = [record for record in records if not record.restored]
        stages = [record.stage for record in records]
    for record in records:
        run.log(record)
    if records:
        run.describe(folder)
    if "train" in stages:
        run.log_history(HistoryReader(folder / "history.jsonl").new_points())
        run.finish(train)
    run.upload(folder, records)  # last: artifacts may lie in another store, which fails alone
    return run.changed


def brief(error: BaseException) -> str:
    """An error on one line; of a library's error with its type, without a part that is too long for a remedy."""
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    text = text.partition("\n[SQL: ")[0]  # the query and its values follow
    return printable(without_credentials(textwrap.shorten(text, LONGEST_ERROR, placeholder=" …")))


def without_credentials(text: str) -> str:
    """The text with user names and passwords removed from addresses."""
    return re.sub(r"//[^/\s@]+@", "//", text)
