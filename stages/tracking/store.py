"""The tracking store: connect, find and create runs."""

import logging
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from alembic.util.exc import CommandError
from filelock import FileLock
from mlflow.entities import Experiment, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from gpt.core.errors import UserError
from stages.publish import SQLITE
from stages.run_record import Record
from stages.tracking.tracked_run import TrackedRun

EXPERIMENT = "chargpt"
REMEDIES = {  # for errors of SQLite in a file that is not damaged
    "database is locked": "if this persists, end the program that locks it",
    "attempt to write a readonly database": "make the file and its folder writable",
}


class Store:
    """A tracking store and our experiment in it.

    Opening creates the store and the experiment if they are missing, under a lock: processes that create one SQLite
    store at the same time damage it permanently.

    Raises:
        UserError: MLflow cannot open the SQLite file; the text names the remedy.
    """

    def __init__(self, address: str, root: Path) -> None:
        self.root = root
        logging.getLogger("alembic").setLevel(logging.WARNING)  # no line for every table
        for name in ("mlflow.store.db.utils", "mlflow.system_metrics"):  # their errors are raised, too, or harmless
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._file = Path(address.removeprefix(SQLITE).partition("?")[0]) if address.startswith(SQLITE) else None
        with self.lock():
            try:
                self.client = MlflowClient(address)
                found = self.client.get_experiment_by_name(EXPERIMENT)
                self._experiment = self._checked(found) if found else self._create_experiment(address)
                if self._file:
                    with closing(sqlite3.connect(self._file)) as database:
                        database.execute("PRAGMA journal_mode=WAL")  # persistent; parallel writers wait less
            except (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error) as error:
                if not self._file:
                    raise
                reason = str(error).partition("\n")[0].replace("<database_uri>", address)
                damaged = f"if this persists, delete {self._file.name} (sync rebuilds it)"
                remedy = next((remedy for text, remedy in REMEDIES.items() if text in reason), damaged)
                raise UserError(f"{reason}; {remedy}") from error
        self._inode = self._file.stat().st_ino if self._file else 0

    def check_file(self) -> None:
        """Detect a lost SQLite file: its open connections go on writing to it without an error.

        Raises:
            UserError: the file was deleted or replaced after this store had opened it.

        """
        if self._file and not (self._file.exists() and self._file.stat().st_ino == self._inode):
            raise UserError(f"{self._file.name} was deleted or replaced while it was in use")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Exclude the other processes of this workspace from creating and describing runs."""
        folder = self.root / ".runs"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "store.lock", timeout=60):
            yield

    def find(self, tag: str, value: str) -> "TrackedRun | None":
        """The newest run with this tag."""
        return next((TrackedRun(self, run) for run in self._search(tag, value)), None)

    def find_or_create(self, tag: str, value: str, record: Record) -> "TrackedRun":
        """The run with this tag; created with the record's name and start time if there is none.

        A run that an evaluation created for the record's checkpoint, without a run folder, becomes this run. Under
        the lock, so that two processes never create it twice.
        """
        with self.lock():
            if found := self.find(tag, value):
                return found
            evaluated = self._search("checkpoint.sha256", record.checkpoint) if record.checkpoint else []
            for run in evaluated:
                if tag not in run.data.tags:
                    self.client.set_tag(run.info.run_id, tag, value, synchronous=True)
                    return TrackedRun(self, self.client.get_run(run.info.run_id))
            began = int(record.began * 1000)
            return TrackedRun(self, self.client.create_run(self._experiment, began, {tag: value}, record.name))

    def _search(self, tag: str, value: str) -> Sequence[Run]:
        newest, query = ["attributes.start_time DESC"], f"tags.`{tag}` = '{value}'"
        return list(self.client.search_runs([self._experiment], query, order_by=newest))

    def _checked(self, experiment: Experiment) -> str:
        """The id of an experiment that can be written to; in our own store, its artifacts are in our root."""
        location = urlsplit(experiment.artifact_location)
        folder = Path(unquote(location.path)).resolve()
        elsewhere = location.scheme in ("", "file") and not folder.is_relative_to(self.root.resolve())
        if experiment.lifecycle_stage != "active":
            command = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
            raise UserError(f"the experiment {EXPERIMENT!r} was deleted in MLflow; to restore it: {command}")
        if elsewhere and self._file == self.root / "mlflow.db":
            text = f"mlflow.db belongs to another folder: its artifacts are in {location.path}"
            raise UserError(f"{text}; delete mlflow.db (sync rebuilds it)")
        return str(experiment.experiment_id)

    def _create_experiment(self, address: str) -> str:
        """Create the experiment with a permanent artifact location: in our root, or the default of a server."""
        remote = not address.startswith(("sqlite:", "file:", "/"))
        return str(self.client.create_experiment(EXPERIMENT, None if remote else (self.root / "mlruns").as_uri()))
