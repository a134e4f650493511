"""The tracking store: connect, find and create runs."""

import json
import logging
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from alembic.util.exc import CommandError
from filelock import FileLock
from mlflow.entities import Experiment, Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from gpt.core.errors import UserError
from stages.runs.publish import SQLITE, DeletedRunError
from stages.runs.run_record import Record
from stages.tracking.tracked_run import TrackedRun

PARENT = "chargpt.parent"  # the tag of a run that only groups others
REMEDIES = {  # for errors of SQLite in a file that is not damaged
    "database is locked": "if this persists, end the program that locks it",
    "attempt to write a readonly database": "make the file and its folder writable",
}


class Store:
    """A tracking store and one experiment in it.

    Opening creates the store and the experiment if they are missing, under a lock: processes that create one SQLite
    store at the same time damage it permanently.

    Raises:
        UserError: MLflow cannot open the SQLite file; the text names the remedy.
    """

    def __init__(self, address: str, root: Path, experiment: str) -> None:
        self.root, self._name = root, experiment
        for name in ("alembic", "mlflow.pyfunc"):
            logging.getLogger(name).setLevel(logging.WARNING)  # no line for every table
        for name in ("mlflow.store.db.utils", "mlflow.system_metrics"):  # their errors are raised, too, or harmless
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._file = Path(address.removeprefix(SQLITE).partition("?")[0]) if address.startswith(SQLITE) else None
        with self.lock():
            try:
                self.client = MlflowClient(address)
                found = self.client.get_experiment_by_name(experiment)
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

    def loss_view(self) -> str:
        """The path, on MLflow's web server, of the table of runs with the columns to compare, the best run first.

        A shared view of MLflow's UI, which it keeps in a tag of the experiment.
        """
        columns = [f"attributes.`{name}`" for name in ("Duration", "Models")]
        columns += [f"metrics.`{name}`" for name in ("val/best_loss", "val/bits_per_char", "train/loss")]
        view = {"orderByKey": "metrics.`val/best_loss`", "orderByAsc": True, "selectedColumns": columns}
        self.client.set_experiment_tag(self._experiment, "mlflow.sharedViewState.loss", json.dumps(view))
        return f"#/experiments/{self._experiment}/runs?workflowType=machine_learning&viewStateShareKey=loss"

    def find(self, tag: str, value: str) -> "TrackedRun | None":
        """The newest run with this tag.

        Raises:
            DeletedRunError: there are only runs that a user deleted.
        """
        if runs := self._search(tag, value):
            return TrackedRun(self, runs[0])
        if deleted := self._search(tag, value, ViewType.DELETED_ONLY):
            info = deleted[0].info
            restore = f"mlflow runs restore --run-id {info.run_id}"
            raise DeletedRunError(f"the run {info.run_name} was deleted in MLflow; `{restore}` brings it back")
        return None

    def find_or_create(self, tag: str, value: str, record: Record) -> "TrackedRun":
        """The run with this tag; created with the record's name and start time if there is none.

        A run that an evaluation created for the record's checkpoint, without a run folder, becomes this run. Under
        the lock, so that two processes never create it twice.

        Raises:
            DeletedRunError: a user deleted the run.
        """
        with self.lock():
            if found := self.find(tag, value):
                return found
            evaluated = self._search("checkpoint.sha256", record.checkpoint) if record.checkpoint else []
            for run in evaluated:
                if tag not in run.data.tags:
                    self.client.set_tag(run.info.run_id, tag, value, synchronous=True)
                    return TrackedRun(self, self.client.get_run(run.info.run_id))
            tags = {tag: value, **self._parent(record)}
            began = int(record.began * 1000)
            return TrackedRun(self, self.client.create_run(self._experiment, began, tags, record.name))

    def _parent(self, record: Record) -> dict[str, str]:
        """The tag that names the parent of a new run; a parent that is missing is created."""
        if not record.parent:
            return {}
        found = self._search(PARENT, record.parent)
        if not found:
            began = int(record.began * 1000)
            found = [self.client.create_run(self._experiment, began, {PARENT: record.parent}, record.parent)]
            self.client.set_terminated(found[0].info.run_id, end_time=began)
        return {"mlflow.parentRunId": found[0].info.run_id}

    def _search(self, tag: str, value: str, view: int = ViewType.ACTIVE_ONLY) -> Sequence[Run]:
        quote = '"' if "'" in value else "'"
        newest, query = ["attributes.start_time DESC"], f"tags.`{tag}` = {quote}{value}{quote}"
        return list(self.client.search_runs([self._experiment], query, view, order_by=newest))

    def _checked(self, experiment: Experiment) -> str:
        """The id of an experiment that can be written to; in our own store, its artifacts are in our root."""
        location = urlsplit(experiment.artifact_location)
        folder = Path(unquote(location.path)).resolve()
        elsewhere = location.scheme in ("", "file") and not folder.is_relative_to(self.root.resolve())
        if experiment.lifecycle_stage != "active":
            command = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
            raise UserError(f"the experiment {self._name!r} was deleted in MLflow; to restore it: {command}")
        if elsewhere and self._file == self.root / "mlflow.db":
            text = f"mlflow.db belongs to another folder: its artifacts are in {location.path}"
            raise UserError(f"{text}; delete mlflow.db (sync rebuilds it)")
        return str(experiment.experiment_id)

    def _create_experiment(self, address: str) -> str:
        """Create the experiment with a permanent artifact location: in our root, or the default of a server."""
        remote = not address.startswith(("sqlite:", "file:", "/"))
        location = None if remote else (self.root / "mlruns").as_uri()
        try:
            return str(self.client.create_experiment(self._name, location))
        except MlflowException:
            if found := self.client.get_experiment_by_name(self._name):  # another workspace was faster
                return self._checked(found)
            raise
