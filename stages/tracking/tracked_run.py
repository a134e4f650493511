"""One MLflow run, made equal to the files of a run folder."""

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
from stages.runs.description import description, is_unedited
from stages.runs.run_record import Point, Record, checksums, dvc_cache
from stages.tracking.logged_model import link_metrics, log_model

if TYPE_CHECKING:
    from stages.tracking.store import Store

LONGEST_PARAM, LONGEST_TAG, LONGEST_DIGEST = 6000, 8000, 36  # limits of MLflow
MONITOR_END_S = 5
ORIGIN = "run.origin"  # a tag: training, or dvc.lock
NOTE = "mlflow.note.content"  # the tag with a run's description


class TrackedRun:
    """The MLflow run of one trained model. All operations are idempotent."""

    def __init__(self, store: "Store", run: Run) -> None:
        self._store, self._client = store, store.client
        self.id: str = run.info.run_id
        self.changed = False
        self._cached: Run | None = run  # until something is written
        self._steps: dict[str, set[int]] = {}

    @property
    def restored(self) -> bool:
        """Whether the run is new, or one that was built from dvc.lock without its training."""
        return self._run().data.tags.get(ORIGIN, "dvc.lock") == "dvc.lock"

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
        if record.stage == "train":
            tags[ORIGIN] = "dvc.lock" if record.restored else "training"
        self._log(
            tags=[RunTag(name, value) for name, value in tags.items() if run.data.tags.get(name) != value],
            params=[Param(k, v[:LONGEST_PARAM]) for k, v in record.params.items() if k not in run.data.params],
            metrics=[Metric(k, v, time, 0) for k, v in record.metrics.items() if run.data.metrics.get(k) != v],
        )
        if record.dataset and not (run.inputs and run.inputs.dataset_inputs):
            self._log_dataset(_dataset(record.dataset))
            self._written()

    def _log_dataset(self, dataset: DatasetInput) -> None:
        """Log the dataset; MLflow fails if two runs do that for a new dataset at once, also of other workspaces."""
        with self._store.lock():
            try:
                self._client.log_inputs(self.id, [dataset])
            except MlflowException:  # the other one has created it now, unless the store failed
                self._client.log_inputs(self.id, [dataset])

    def upload(self, folder: Path, records: Sequence[Record]) -> None:
        """Upload the artifacts of stages, the checkpoint and the LoggedModel, as far as the run lacks them.

        Raises:
            UserError: the artifact store failed.

        """
        try:
            for record in records:
                self._upload_stage(folder, record)
                if record.checkpoint:
                    self._upload_model(record)
            link_metrics(self._client, self._run(), records)
        except (MlflowException, OSError) as error:  # requests raises OSErrors
            raise UserError(f"artifacts not stored: {type(error).__name__}: {error}") from error

    def _upload_stage(self, folder: Path, record: Record) -> None:
        """Upload the artifacts that changed, and last their checksums: a listing of artifacts has only names."""
        with tempfile.TemporaryDirectory() as temporary:
            name, content = f"checksums/{record.stage}.sha256", checksums(folder, record.stage)
            present = name in self._artifacts and Path(self._client.download_artifacts(self.id, name, temporary))
            same = set(present.read_text(encoding="utf-8").splitlines() if present else [])
            for line, path in content:
                artifact = line.partition("  ")[2]
                if line not in same or artifact not in self._artifacts:
                    self._upload(path, artifact)
            if same != {line for line, _ in content}:
                new = Path(temporary) / "new"
                new.write_text("".join(f"{line}\n" for line, _ in content), encoding="utf-8")
                self._upload(new, name)

    def _upload_model(self, train: Record) -> None:
        """Upload the checkpoint, and create the LoggedModel."""
        file, name = _checkpoint(train, self._store.root), Path(train.checkpoint_file).name
        if file and name not in self._artifacts:
            self._upload(file, name)
        if file and log_model(self._client, self._run(), train, file):
            self._written()

    def describe(self, folder: Path) -> None:
        """Set the run's description, unless a user has edited it.

        Under the lock, so that an older text never replaces a newer one.
        """
        with self._store.lock():
            tags = self._client.get_run(self.id).data.tags  # not cached: another process may have described it
            text, present = description(folder, self.id), tags.get(NOTE, "")
            if present != text and (not present or is_unedited(present)):
                self._log(tags=[RunTag(NOTE, text)])

    def finish(self, record: Record) -> None:
        """Set the record's name, status and end time, unless its status is RUNNING.

        The start time of a run cannot be changed. A run that was trained again ends as long after it as that training
        took, so that MLflow shows its duration.
        """
        info = self._run().info
        ended = info.start_time + int((record.ended - record.began) * 1000)
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
