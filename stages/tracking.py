"""The only module that talks to MLflow: the store, and one row of it. Client calls only, no global run.

Importing it takes more than a second: stages do so while their child already runs (`stages.publish.connect`).
"""

import hashlib
import logging
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.tracking import MlflowClient

from gpt.core.files import canonical_json, sha256_file
from stages.history import Point
from stages.record import Record, artifacts, digest, places_of_checkpoint

EXPERIMENT = "chargpt"
METRICS_PER_BATCH, ITEMS_PER_BATCH = 1000, 100  # limits of MLflow, as those below
LONGEST_PARAM, LONGEST_TAG, LONGEST_DIGEST = 6000, 8000, 36
T = TypeVar("T")
SQLITE = "sqlite:///"
NOTE = "mlflow.note.content"  # the tag that MLflow's page of a row shows as its description


class Store:
    """A tracking store and our experiment in it."""

    def __init__(self, client: MlflowClient, experiment: str, root: Path) -> None:
        self._client, self._experiment, self._root = client, experiment, root

    @classmethod
    def open(cls, address: str, root: Path) -> "Store":
        """Open the store; make it and the experiment where they are not there yet.

        Under a lock: processes that make one SQLite store at once leave it broken for good.
        """
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # no word on every table it makes
        logging.getLogger("alembic").setLevel(logging.WARNING)
        with _lock(root):
            file = Path(address.removeprefix(SQLITE).partition("?")[0]) if address.startswith(SQLITE) else None
            if file and not file.exists():
                _make_tables(file)
            client = MlflowClient(address)
            found = client.get_experiment_by_name(EXPERIMENT)
            if file:
                with closing(sqlite3.connect(file)) as database:
                    database.execute("PRAGMA journal_mode=WAL")  # stays in the file; lets several writers take turns
            experiment = found.experiment_id if found else _make_experiment(client, address, root)
        return cls(client, experiment, root)

    def find(self, tag: str, value: str) -> "Row | None":
        """The newest row with this tag."""
        rows = self._client.search_runs(
            [self._experiment], f"tags.`{tag}` = '{value}'", order_by=["attributes.start_time DESC"], max_results=1
        )
        return Row(self._client, rows[0], self._root) if rows else None

    def row(self, tag: str, value: str, record: Record) -> "Row":
        """The row with this tag; opened, by the record's name and beginning, where there is none.

        A row that an evaluation opened for the record's checkpoint, knowing no run, becomes the run's row. Under the
        lock, so that two processes never open it twice.
        """
        with self.locked():
            if found := self.find(tag, value) or self._adopt(tag, value, record.checkpoint):
                return found
            began = int(record.began * 1000)
            made = self._client.create_run(self._experiment, began, {tag: value}, run_name=record.name)
            return Row(self._client, made, self._root)

    def locked(self) -> AbstractContextManager[None]:
        """Keep the other processes of this workspace from opening and describing rows."""
        return _lock(self._root)

    def _adopt(self, tag: str, value: str, checkpoint: str) -> "Row | None":
        """The newest row of this checkpoint that has no such tag, given the tag."""
        found = self._client.search_runs([self._experiment], f"tags.`checkpoint.sha256` = '{checkpoint}'")
        for row in found if checkpoint else []:
            if tag not in row.data.tags:
                self._client.set_tag(row.info.run_id, tag, value)
                return Row(self._client, self._client.get_run(row.info.run_id), self._root)
        return None


class Row:
    """One trained model in the store. Whatever is done to it twice changes nothing the second time."""

    def __init__(self, client: MlflowClient, row: Run, root: Path) -> None:
        self._client, self._root = client, root
        self.id: str = row.info.run_id
        self.changed = False
        self._seen: Run | None = row  # until something is written
        self._steps: dict[str, set[int]] = {}
        self._listing: dict[str, int | None] | None = None

    def replay(self, points: Iterable[Point]) -> None:
        """Bring the points of a history to the row, at their recorded times, except for the steps it has."""
        new: dict[tuple[str, int], Metric] = {}
        for point in points:
            step = int(point["step"])
            for name, value in point.items():
                if name not in ("step", "time") and step not in self._steps_of(name):
                    new[name, step] = Metric(name, value, int(point["time"] * 1000), step)
        self._log(metrics=list(new.values()))
        for name, step in new:
            self._steps_of(name).add(step)

    def open_again(self, record: Record) -> None:
        """Mark the row as running and give it what is known of the run at its beginning."""
        self._client.update_run(self.id, "RUNNING", record.name)
        self._wrote()
        self._write(record)

    def publish(self, run: Path, record: Record) -> None:
        """Bring to the row what it lacks of a stage's record and of its artifacts.

        A tag of the row says which artifacts were uploaded last, since a listing tells names and sizes only.
        """
        self._write(record)
        content, mark, there = digest(run, record.stage), f"published.{record.stage}", self._files()
        same = self._row().data.tags.get(mark) == content
        for name, path in artifacts(run, record.stage):
            if not same or name not in there or there[name] not in (None, path.stat().st_size):
                self._upload(path, name)
        if not same:
            self._log(tags=[RunTag(mark, content)])
        if record.checkpoint and (name := Path(record.checkpoint_file).name) not in there:
            copies = (file for file in places_of_checkpoint(record) if sha256_file(file) == record.checkpoint)
            if checkpoint := next(copies, None):
                self._upload(checkpoint, name)

    def describe(self, text: str) -> None:
        """Give the row's page its description, unless a person has written another."""
        tags = self._client.get_run(self.id).data.tags  # of this moment: another command may have described it
        there, ours, text = tags.get(NOTE, ""), tags.get("published.page", ""), text[:LONGEST_TAG]
        if there != text and (not there or ours == _sha256(there)):
            self._log(tags=[RunTag(NOTE, text), RunTag("published.page", _sha256(text))])

    def finish(self, record: Record) -> None:
        """Give the row the record's name, status and end; one that still runs is left running."""
        info = self._row().info
        ended = int(record.ended * 1000)
        if record.status != "RUNNING" and (info.status, info.end_time, info.run_name) != (
            record.status,
            ended,
            record.name,
        ):
            self._client.update_run(self.id, name=record.name)
            self._client.set_terminated(self.id, record.status, ended)
            self._wrote()

    def _row(self) -> Run:
        """The row as it is."""
        self._seen = self._seen or self._client.get_run(self.id)
        return self._seen

    def _wrote(self) -> None:
        self.changed, self._seen = True, None

    def _steps_of(self, metric: str) -> set[int]:
        if metric not in self._steps:
            self._steps[metric] = {seen.step for seen in self._client.get_metric_history(self.id, metric)}
        return self._steps[metric]

    def _files(self) -> dict[str, int | None]:
        """The row's artifacts and their sizes, where the store tells them (a server does not tell a zero)."""
        if self._listing is None:
            self._listing = {}
            folders: list[str | None] = [None]
            while folders:
                for item in self._client.list_artifacts(self.id, folders.pop()):
                    if item.is_dir:
                        folders.append(item.path)
                    else:
                        self._listing[item.path] = item.file_size
        return self._listing

    def _write(self, record: Record) -> None:
        """Write what the row does not have of the record's tags, params, figures and dataset."""
        row, time = self._row(), int(record.ended * 1000)
        tags = {name: value[:LONGEST_TAG] for name, value in record.tags.items()}
        self._log(
            tags=[RunTag(name, value) for name, value in tags.items() if row.data.tags.get(name) != value],
            params=[Param(k, v[:LONGEST_PARAM]) for k, v in record.params.items() if k not in row.data.params],
            metrics=[Metric(k, v, time, 0) for k, v in record.metrics.items() if row.data.metrics.get(k) != v],
        )
        if record.dataset and not (row.inputs and row.inputs.dataset_inputs):
            with _lock(self._root):  # MLflow fails when two rows bring the same dataset at once
                self._client.log_inputs(self.id, [_dataset(record.dataset)])
            self._wrote()

    def _log(
        self, *, tags: Sequence[RunTag] = (), params: Sequence[Param] = (), metrics: Sequence[Metric] = ()
    ) -> None:
        for some_tags in _batches(tags, ITEMS_PER_BATCH):
            self._client.log_batch(self.id, tags=some_tags)
        for some_params in _batches(params, ITEMS_PER_BATCH):
            self._client.log_batch(self.id, params=some_params)
        for some_metrics in _batches(metrics, METRICS_PER_BATCH):
            self._client.log_batch(self.id, metrics=some_metrics)
        if tags or params or metrics:
            self._wrote()

    def _upload(self, file: Path, name: str) -> None:
        """Upload a file under a name of our choice: MLflow takes the last part of it from the file."""
        folder = str(Path(name).parent) if "/" in name else None
        with tempfile.TemporaryDirectory() as nowhere:
            if file.name != Path(name).name:
                file = Path(shutil.copyfile(file, Path(nowhere) / Path(name).name))
            self._client.log_artifact(self.id, str(file), folder)
            self._files()[name] = file.stat().st_size
        self.changed = True


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _make_tables(file: Path) -> None:
    """Let MLflow make its tables under another name first: killed in the midst of it, it leaves what it cannot open."""
    making, made = (file.with_name(f"{file.name}.{word}") for word in ("making", "made"))
    _delete_database(making)
    _delete_database(file)  # what may be left beside a store that was deleted
    made.unlink(missing_ok=True)
    MlflowClient(f"{SQLITE}{making}")
    with closing(sqlite3.connect(making)) as database:
        database.execute("VACUUM INTO ?", (str(made),))
    made.replace(file)
    _delete_database(making)


def _delete_database(file: Path) -> None:
    for suffix in ("", "-journal", "-wal", "-shm"):
        file.with_name(f"{file.name}{suffix}").unlink(missing_ok=True)


def _make_experiment(client: MlflowClient, address: str, root: Path) -> str:
    """Make the experiment with its place for artifacts, fixed for good: our root, or what a server chooses itself."""
    remote = not address.startswith(("sqlite:", "file:", "/"))
    made: str = client.create_experiment(EXPERIMENT, None if remote else (root / "mlruns").as_uri())
    return made


def _dataset(meta: Mapping[str, object]) -> DatasetInput:
    """The corpus as MLflow's dataset; its digest there is cut to fit, the source holds all of it."""
    sha256 = str(meta.get("corpus_sha256", ""))
    source, profile = canonical_json({"sha256": sha256}), canonical_json(meta)
    dataset = Dataset("corpus", sha256[:LONGEST_DIGEST], "content", source, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    folder = root / ".runs"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "store.lock", timeout=60):
        yield
