"""The only module that talks to MLflow: the store, and one row of it. Client calls only, no global run.

Importing it takes more than a second: stages do so while their child already runs (`stages.publish.connect`).
"""

import logging
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.tracking import MlflowClient

from gpt.files import canonical_json, sha256_file
from stages.history import Point
from stages.record import Record, artifacts, digest

EXPERIMENT = "chargpt"
METRICS_PER_BATCH, ITEMS_PER_BATCH = 1000, 100  # limits of MLflow, as those below
LONGEST_PARAM, LONGEST_TAG, LONGEST_DIGEST = 6000, 8000, 36
T = TypeVar("T")
SQLITE = "sqlite:///"


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
            client = MlflowClient(address)
            found = client.get_experiment_by_name(EXPERIMENT)
            if address.startswith(SQLITE):
                with sqlite3.connect(address.removeprefix(SQLITE).partition("?")[0]) as database:
                    database.execute("PRAGMA journal_mode=WAL")  # stays in the file; lets several writers take turns
                database.close()
            experiment = found.experiment_id if found else _make_experiment(client, address, root)
        return cls(client, experiment, root)

    def find(self, tag: str, value: str) -> "Row | None":
        """The newest row with this tag."""
        rows = self._client.search_runs(
            [self._experiment], f"tags.`{tag}` = '{value}'", order_by=["attributes.start_time DESC"], max_results=1
        )
        return Row(self._client, rows[0].info.run_id) if rows else None

    def row(self, tag: str, value: str, record: Record) -> "Row":
        """The row with this tag; opened, by the record's name and beginning, where there is none.

        Under the lock, so that two processes never open it twice.
        """
        with _lock(self._root):
            if found := self.find(tag, value):
                return found
            began = int(record.began * 1000)
            made = self._client.create_run(self._experiment, began, {tag: value}, run_name=record.name)
            return Row(self._client, made.info.run_id)


class Row:
    """One trained model in the store. Whatever is done to it twice changes nothing the second time."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._id = client, run_id
        self._steps: dict[str, set[int]] = {}

    def replay(self, points: Iterable[Point]) -> None:
        """Bring the points of a history to the row, at their recorded times, except for the steps it has."""
        new: dict[tuple[str, int], Metric] = {}
        for point in points:
            step = int(point["step"])
            for name, value in point.items():
                if name not in ("step", "time") and step not in self._steps_of(name):
                    new[name, step] = Metric(name, value, int(point["time"] * 1000), step)
        for batch in _batches(list(new.values()), METRICS_PER_BATCH):
            self._client.log_batch(self._id, metrics=batch)
            for metric in batch:
                self._steps_of(metric.key).add(metric.step)

    def open_again(self, record: Record) -> None:
        """Mark the row as running and give it what is known of the run at its beginning."""
        self._client.update_run(self._id, "RUNNING", record.name)
        self._write(record, self._client.get_run(self._id))

    def publish(self, run: Path, record: Record) -> None:
        """Bring a stage's record and its artifacts to the row, unless the row says that it has these very ones."""
        row = self._client.get_run(self._id)
        content, mark = digest(run, record), f"published.{record.stage}"
        if row.data.tags.get(mark) != content:
            self._write(record, row)
            for name, path in artifacts(run, record.stage):
                self._client.log_artifact(self._id, str(path), str(Path(name).parent) if "/" in name else None)
            self._client.set_tag(self._id, mark, content)
        if record.checkpoint_file:
            self._upload_checkpoint(Path(record.checkpoint_file), record.checkpoint)

    def has(self, run: Path, record: Record) -> bool:
        """Whether the row holds this very record, with its artifacts and its history."""
        return self._client.get_run(self._id).data.tags.get(f"published.{record.stage}") == digest(run, record)

    def finish(self, record: Record) -> None:
        """Give the row the record's name, status and end; one that still runs is left running."""
        info = self._client.get_run(self._id).info
        ended = int(record.ended * 1000)
        if record.status != "RUNNING" and (info.status, info.end_time, info.run_name) != (
            record.status,
            ended,
            record.name,
        ):
            self._client.update_run(self._id, name=record.name)
            self._client.set_terminated(self._id, record.status, ended)

    def _steps_of(self, metric: str) -> set[int]:
        if metric not in self._steps:
            self._steps[metric] = {seen.step for seen in self._client.get_metric_history(self._id, metric)}
        return self._steps[metric]

    def _write(self, record: Record, row: Run) -> None:
        """Write tags, and of params, figures and dataset what the row does not have."""
        tags = [RunTag(name, value[:LONGEST_TAG]) for name, value in record.tags.items()]
        params = [Param(k, v[:LONGEST_PARAM]) for k, v in record.params.items() if k not in row.data.params]
        time = int(record.ended * 1000)
        metrics = [Metric(k, v, time, 0) for k, v in record.metrics.items() if row.data.metrics.get(k) != v]
        for some_tags in _batches(tags, ITEMS_PER_BATCH):
            self._client.log_batch(self._id, tags=some_tags)
        for some_params in _batches(params, ITEMS_PER_BATCH):
            self._client.log_batch(self._id, params=some_params)
        self._client.log_batch(self._id, metrics=metrics)
        if record.dataset and not (row.inputs and row.inputs.dataset_inputs):
            self._client.log_inputs(self._id, [_dataset(record.dataset)])

    def _upload_checkpoint(self, file: Path, sha256: str) -> None:
        """Upload the checkpoint unless the row has one, where the file with that content still lies."""
        there = {artifact.path for artifact in self._client.list_artifacts(self._id)}
        if file.name not in there and file.is_file() and sha256_file(file) == sha256:
            self._client.log_artifact(self._id, str(file))


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


def _batches(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    folder = root / ".runs"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "store.lock", timeout=60):
        yield
