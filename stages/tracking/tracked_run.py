"""One MLflow run, made equal to the files of a run folder."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from gpt.core.errors import UserError
from gpt.core.files import canonical_json, sha256_file
from stages.description import description
from stages.run_record import Point, Record, artifacts, digest, dvc_cache

if TYPE_CHECKING:
    from stages.tracking.store import Store

LONGEST_PARAM, LONGEST_TAG, LONGEST_DIGEST = 6000, 8000, 36  # limits of MLflow
MONITOR_END_S = 5
NOTE = "mlflow.note.content"  # the tag with a run's description


class TrackedRun:
    """The MLflow run of one trained model. All operations are idempotent."""

    def __init__(self, store: "Store", run: Run) -> None:
        self._store, self._client = store, store.client
        self.id: str = run.info.run_id
        self.changed = False
        self._cached: Run | None = run  # until something is written
        self._steps: dict[str, set[int]] = {}

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
        self.log(record)

    def log(self, record: Record) -> None:
        """Log what the run lacks of the record's tags, params, metrics and dataset."""
        run, time = self._run(), int(record.ended * 1000)
        tags = {name: value[:LONGEST_TAG] for name, value in record.tags.items()}
        self._log(
            tags=[RunTag(name, value) for name, value in tags.items() if run.data.tags.get(name) != value],
            params=[Param(k, v[:LONGEST_PARAM]) for k, v in record.params.items() if k not in run.data.params],
            metrics=[Metric(k, v, time, 0) for k, v in record.metrics.items() if run.data.metrics.get(k) != v],
        )
        if record.dataset and not (run.inputs and run.inputs.dataset_inputs):
            with self._store.lock():  # MLflow fails if two runs log the same dataset at once
                self._client.log_inputs(self.id, [_dataset(record.dataset)])
            self._written()

    def upload(self, folder: Path, records: Iterable[Record]) -> None:
        """Upload the artifacts of stages, and the checkpoint, as far as the run lacks them.

        A tag holds the digest of the artifacts uploaded last, since a listing has only names.

        Raises:
            UserError: the artifact store failed.

        """
        try:
            for record in records:
                self._upload_stage(folder, record)
        except (MlflowException, OSError) as error:  # requests raises OSErrors
            raise UserError(f"artifacts not stored: {type(error).__name__}: {error}") from error

    def _upload_stage(self, folder: Path, record: Record) -> None:
        content, tag = digest(folder, record.stage), f"published.{record.stage}"
        same = self._run().data.tags.get(tag) == content
        for name, path in artifacts(folder, record.stage):
            if not same or name not in self._artifacts:
                self._upload(path, name)
        if not same:
            self._log(tags=[RunTag(tag, content)])
        name = Path(record.checkpoint_file).name
        if record.checkpoint and name not in self._artifacts and (file := _checkpoint(record, self._store.root)):
            self._upload(file, name)

    def describe(self, folder: Path) -> None:
        """Set the run's description, unless a user has edited it.

        Under the lock, so that an older text never replaces a newer one.
        """
        with self._store.lock():
            tags = self._client.get_run(self.id).data.tags  # not cached: another process may have described it
            text, present = description(folder, self.id)[:LONGEST_TAG], tags.get(NOTE, "")
            if present != text and (not present or tags.get("published.page") == _sha256(present)):
                self._log(tags=[RunTag(NOTE, text), RunTag("published.page", _sha256(text))])

    def finish(self, record: Record) -> None:
        """Set the record's name, status and end time, unless its status is RUNNING."""
        info, ended = self._run().info, int(record.ended * 1000)
        final = (record.status, ended, record.name)
        if record.status != "RUNNING" and (info.status, info.end_time, info.run_name) != final:
            self._client.update_run(self.id, name=record.name)
            self._client.set_terminated(self.id, record.status, ended)
            self._written()

    def monitor_system(self) -> Callable[[], None]:
        """Log system metrics from now on, after a resume from the next step; returns a function that stops it."""
        monitor: Any = SystemMetricsMonitor  # it has no types
        running = monitor(self.id, resume_logging=True, tracking_uri=self._client.tracking_uri)
        running.start()

        def stop() -> None:
            finishing = Thread(target=running.finish, daemon=True)
            finishing.start()
            finishing.join(MONITOR_END_S)  # at most: the store may not answer

        return stop

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

    @cached_property
    def _artifacts(self) -> set[str]:
        """The paths of the run's artifacts."""
        found: set[str] = set()
        folders: list[str | None] = [None]
        while folders:
            items = self._client.list_artifacts(self.id, folders.pop())
            folders += [item.path for item in items if item.is_dir]
            found |= {item.path for item in items if not item.is_dir}
        return found

    def _log(self, **entities: Sequence[Any]) -> None:
        """Log tags, params and metrics; synchronously, so that an error is raised here and nothing is lost at exit."""
        if any(entities.values()):
            self._client.log_batch(self.id, **entities, synchronous=True)  # in batches of the permitted size
            self._written()

    def _upload(self, file: Path, name: str) -> None:
        """Upload a file as the artifact `name`; MLflow takes the base name from the file."""
        folder = str(Path(name).parent) if "/" in name else None
        with tempfile.TemporaryDirectory() as temporary:
            if file.name != Path(name).name:
                file = Path(shutil.copyfile(file, Path(temporary) / Path(name).name))
            self._client.log_artifact(self.id, str(file), folder)
        self._artifacts.add(name)
        self.changed = True


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
