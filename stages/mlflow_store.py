"""The only module that imports MLflow: the tracking store, and one run in it. Client calls only, no active run.

The import takes more than a second: stages do it while their child runs (`stages.publish.connect`).
"""

import hashlib
import logging
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from alembic.util.exc import CommandError
from filelock import FileLock
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from gpt.core.files import canonical_json, sha256_file
from stages.run_record import Point, Record, artifacts, digest, dvc_cache

EXPERIMENT = "chargpt"
METRICS_PER_BATCH, ITEMS_PER_BATCH = 1000, 100  # limits of MLflow, as those below
LONGEST_PARAM, LONGEST_TAG, LONGEST_DIGEST = 6000, 8000, 36
MONITOR_END_S = 5
NOTE = "mlflow.note.content"  # the tag with a run's description
SQLITE = "sqlite:///"
T = TypeVar("T")


class StoreError(Exception):
    """The store cannot be opened; the text names the remedy."""


class Store:
    """A tracking store and our experiment in it."""

    def __init__(self, client: MlflowClient, experiment: str, root: Path) -> None:
        self._client, self._experiment, self._root = client, experiment, root

    @classmethod
    def open(cls, address: str, root: Path) -> "Store":
        """Open the store; create it and the experiment if they are missing.

        Under a lock: processes that create one SQLite store at the same time damage it permanently.

        Raises:
            StoreError: MLflow cannot open the SQLite file.
        """
        for name in ("mlflow.store.db.utils", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # no line for every table
        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
        file = Path(address.removeprefix(SQLITE).partition("?")[0]) if address.startswith(SQLITE) else None
        with _lock(root):
            try:
                client = MlflowClient(address)
                found = client.get_experiment_by_name(EXPERIMENT)
                experiment = found.experiment_id if found else _create_experiment(client, address, root)
                if file:
                    with closing(sqlite3.connect(file)) as database:
                        database.execute("PRAGMA journal_mode=WAL")  # persistent; parallel writers wait less
            except (MlflowException, SQLAlchemyError, CommandError, sqlite3.Error) as error:
                if not file:
                    raise
                reason = str(error).partition("\n")[0][:80]
                raise StoreError(f"{reason}; if this persists, delete {file.name} (sync rebuilds it)") from error
        return cls(client, experiment, root)

    def find(self, tag: str, value: str) -> "TrackedRun | None":
        """The newest run with this tag."""
        found = self._client.search_runs(
            [self._experiment], f"tags.`{tag}` = '{value}'", order_by=["attributes.start_time DESC"], max_results=1
        )
        return TrackedRun(self._client, found[0], self._root) if found else None

    def find_or_create(self, tag: str, value: str, record: Record) -> "TrackedRun":
        """The run with this tag; created with the record's name and start time if there is none.

        A run that an evaluation created for the record's checkpoint, without a run folder, becomes this run. Under
        the lock, so that two processes never create it twice.
        """
        with self.lock():
            if found := self.find(tag, value) or self._adopt(tag, value, record.checkpoint):
                return found
            began = int(record.began * 1000)
            created = self._client.create_run(self._experiment, began, {tag: value}, run_name=record.name)
            return TrackedRun(self._client, created, self._root)

    def lock(self) -> AbstractContextManager[None]:
        """Exclude the other processes of this workspace from creating and describing runs."""
        return _lock(self._root)

    def _adopt(self, tag: str, value: str, checkpoint: str) -> "TrackedRun | None":
        """The newest run of this checkpoint without such a tag; it is given the tag."""
        found = self._client.search_runs([self._experiment], f"tags.`checkpoint.sha256` = '{checkpoint}'")
        for run in found if checkpoint else []:
            if tag not in run.data.tags:
                self._client.set_tag(run.info.run_id, tag, value, synchronous=True)
                return TrackedRun(self._client, self._client.get_run(run.info.run_id), self._root)
        return None


class TrackedRun:
    """The MLflow run of one trained model. All operations are idempotent."""

    def __init__(self, client: MlflowClient, run: Run, root: Path) -> None:
        self._client, self._root = client, root
        self.id: str = run.info.run_id
        self.changed = False
        self._cached: Run | None = run  # until something is written
        self._steps: dict[str, set[int]] = {}
        self._artifact_sizes: dict[str, int | None] | None = None

    def log_history(self, points: Iterable[Point]) -> None:
        """Log the points of a history, with their recorded times, except for steps that the run has."""
        new: dict[tuple[str, int], Metric] = {}
        for point in points:
            step = int(point["step"])
            for name, value in point.items():
                if name not in ("step", "time") and step not in self._steps_of(name):
                    new[name, step] = Metric(name, value, int(point["time"] * 1000), step)
        self._log(metrics=list(new.values()))
        for name, step in new:
            self._steps_of(name).add(step)

    def start(self, record: Record) -> None:
        """Set the status RUNNING and log what is known at the start."""
        self._client.update_run(self.id, "RUNNING", record.name)
        self._written()
        self._log_record(record)

    def publish(self, folder: Path, record: Record) -> None:
        """Log what the run lacks of a stage's record and artifacts.

        A tag holds the digest of the artifacts uploaded last, since a listing has only names and sizes.
        """
        self._log_record(record)
        content, tag, present = digest(folder, record.stage), f"published.{record.stage}", self._artifacts()
        same = self._run().data.tags.get(tag) == content
        for name, path in artifacts(folder, record.stage):
            if not same or name not in present or present[name] not in (None, path.stat().st_size):
                self._upload(path, name)
        if not same:
            self._log(tags=[RunTag(tag, content)])
        name = Path(record.checkpoint_file).name
        if record.checkpoint and name not in present and (checkpoint := _checkpoint(record, self._root)):
            self._upload(checkpoint, name)

    def describe(self, text: str) -> None:
        """Set the run's description, unless a user has edited it."""
        tags = self._client.get_run(self.id).data.tags  # not cached: another process may have described it
        present, ours, text = tags.get(NOTE, ""), tags.get("published.page", ""), text[:LONGEST_TAG]
        if present != text and (not present or ours == _sha256(present)):
            self._log(tags=[RunTag(NOTE, text), RunTag("published.page", _sha256(text))])

    def finish(self, record: Record) -> None:
        """Set the record's name, status and end time, unless its status is RUNNING."""
        info, ended = self._run().info, int(record.ended * 1000)
        final = (record.status, ended, record.name)
        if record.status != "RUNNING" and (info.status, info.end_time, info.run_name) != final:
            self._client.update_run(self.id, name=record.name)
            self._client.set_terminated(self.id, record.status, ended)
            self._written()

    def monitor_system(self) -> "SystemMetrics":
        """Start logging system metrics."""
        return SystemMetrics(self.id, self._client.tracking_uri)

    def _run(self) -> Run:
        """The run as it is in the store."""
        self._cached = self._cached or self._client.get_run(self.id)
        return self._cached

    def _written(self) -> None:
        self.changed, self._cached = True, None

    def _steps_of(self, metric: str) -> set[int]:
        if metric not in self._steps:
            self._steps[metric] = {point.step for point in self._client.get_metric_history(self.id, metric)}
        return self._steps[metric]

    def _artifacts(self) -> dict[str, int | None]:
        """The run's artifacts with their sizes; a server reports no size for an empty file."""
        if self._artifact_sizes is None:
            self._artifact_sizes = {}
            folders: list[str | None] = [None]
            while folders:
                for item in self._client.list_artifacts(self.id, folders.pop()):
                    if item.is_dir:
                        folders.append(item.path)
                    else:
                        self._artifact_sizes[item.path] = item.file_size
        return self._artifact_sizes

    def _log_record(self, record: Record) -> None:
        """Log what the run lacks of the record's tags, params, metrics and dataset."""
        run, time = self._run(), int(record.ended * 1000)
        tags = {name: value[:LONGEST_TAG] for name, value in record.tags.items()}
        self._log(
            tags=[RunTag(name, value) for name, value in tags.items() if run.data.tags.get(name) != value],
            params=[Param(k, v[:LONGEST_PARAM]) for k, v in record.params.items() if k not in run.data.params],
            metrics=[Metric(k, v, time, 0) for k, v in record.metrics.items() if run.data.metrics.get(k) != v],
        )
        if record.dataset and not (run.inputs and run.inputs.dataset_inputs):
            with _lock(self._root):  # MLflow fails if two runs log the same dataset at once
                self._client.log_inputs(self.id, [_dataset(record.dataset)])
            self._written()

    def _log(
        self, *, tags: Sequence[RunTag] = (), params: Sequence[Param] = (), metrics: Sequence[Metric] = ()
    ) -> None:
        """Log in batches; synchronously, so that an error is raised here and nothing is lost at exit."""
        for some_tags in _batches(tags, ITEMS_PER_BATCH):
            self._client.log_batch(self.id, tags=some_tags, synchronous=True)
        for some_params in _batches(params, ITEMS_PER_BATCH):
            self._client.log_batch(self.id, params=some_params, synchronous=True)
        for some_metrics in _batches(metrics, METRICS_PER_BATCH):
            self._client.log_batch(self.id, metrics=some_metrics, synchronous=True)
        if tags or params or metrics:
            self._written()

    def _upload(self, file: Path, name: str) -> None:
        """Upload a file as the artifact `name`; MLflow takes the base name from the file."""
        folder = str(Path(name).parent) if "/" in name else None
        with tempfile.TemporaryDirectory() as temporary:
            if file.name != Path(name).name:
                file = Path(shutil.copyfile(file, Path(temporary) / Path(name).name))
            self._client.log_artifact(self.id, str(file), folder)
            self._artifacts()[name] = file.stat().st_size
        self.changed = True


class SystemMetrics:
    """MLflow's system metrics monitor, in a thread of its own; after a resume it continues the steps."""

    def __init__(self, run_id: str, tracking_uri: str) -> None:
        monitor: Any = SystemMetricsMonitor  # it has no types
        self._monitor = monitor(run_id, resume_logging=True, tracking_uri=tracking_uri)
        self._monitor.start()

    def stop(self) -> None:
        """Stop the monitor; wait for it a few seconds at most, since its store may not answer."""
        finishing = Thread(target=self._monitor.finish, daemon=True)
        finishing.start()
        finishing.join(MONITOR_END_S)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _create_experiment(client: MlflowClient, address: str, root: Path) -> str:
    """Create the experiment with a permanent artifact location: in our root, or the default of a server."""
    remote = not address.startswith(("sqlite:", "file:", "/"))
    created: str = client.create_experiment(EXPERIMENT, None if remote else (root / "mlruns").as_uri())
    return created


def _checkpoint(record: Record, root: Path) -> Path | None:
    """A file with a training's checkpoint: its output path or, if that has other content now, DVC's copy of it."""
    output, md5 = Path(record.checkpoint_file), record.checkpoint_md5
    if output.is_file() and sha256_file(output) == record.checkpoint:
        return output
    cache = dvc_cache(root)
    cached = cache / "files" / "md5" / md5[:2] / md5[2:] if cache and md5 else None
    return cached if cached and cached.is_file() and sha256_file(cached) == record.checkpoint else None


def _dataset(meta: Mapping[str, object]) -> DatasetInput:
    """The corpus as an MLflow dataset; its digest is truncated to MLflow's limit, its source holds all of it."""
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
