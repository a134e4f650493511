"""`python -m stages.train COMMAND…`: run the training with torchrun's environment and publish it live."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.core.files import sha256_file
from gpt.core.params import check_section, read_params
from gpt.launch import LaunchParams, choose_processes, usable_cores, visible_gpus
from gpt.training.fingerprint import run_key
from stages import child, run_record, torchrun
from stages.command_line import CommandLine
from stages.publish import Publisher, logged_params, prepare_plots, provenance, publish_run, rendered
from stages.run_record import HistoryReader, Record
from stages.stage_inputs import refuse_edited_inputs

if TYPE_CHECKING:
    from stages.mlflow_store import Store, TrackedRun

PARAMS = ("download", "tokenize", "model", "train")  # the sections that determine a trained model: the run's params
LOCK_S = 5  # a run of the same key that has just ended needs about as long to publish
METRICS = {"val_loss": "best_val_loss", "best_step": "best_step"}  # of metrics/train.json, without a series by step


def main(words: Sequence[str]) -> int:
    """Train and publish; returns the command's exit code.

    Raises:
        UserError: an option or a key that is needed to start is missing or wrong.

    """
    root, began = run_record.main_workspace(), time.time()
    run_record.drop_states(root)
    command = CommandLine(words)
    params_file = command.path("--params")
    params = read_params(params_file, command.changes)
    launch = check_section(params_file, "launch", LaunchParams, params)
    environment = torchrun.training_environment(_processes(launch, params.get("train") or {}))
    key = run_key(params_file, command.path("--tokens"), command.changes)
    command = command.with_default("--timeout", launch.timeout)
    if message := torchrun.command_for_other_nodes(command.words, environment):
        print(message, flush=True)
    command = command.with_default("--run-dir", root / ".runs" / key)
    command = command.with_logs(root, command.path("--run-dir") / "logs" / "train.log")
    training = _Training(command, root, began)
    about = training.folder.name
    code = child.run(command, stage="train", about=about, environment=environment, on_poll=training.on_poll)
    training.end(code)
    return code


class _Training:
    """One training as its wrapper sees it: the run folder, and the MLflow run once the training has started."""

    def __init__(self, command: CommandLine, root: Path, began: float) -> None:
        self._command, self._root, self._began = command, root, began
        self.folder = command.path("--run-dir")
        # As they are at the start: the user may edit the file during the training.
        self._params_text = command.path("--params").read_text(encoding="utf-8")
        self._params = logged_params(command, *PARAMS)
        self._publisher = Publisher("train", root)
        self._history = self.folder / "history.jsonl"
        self._stamp = _stamp(self._history)
        self._lock: AbstractContextManager[object] | None = None  # held from the start of the training to our exit
        self._live: tuple[TrackedRun, HistoryReader] | None = None
        self._stop_monitor: Callable[[], None] | None = None

    def on_poll(self) -> None:
        """Log what is new in the history; the MLflow run is created when the history changes for the first time.

        A command that refuses its input writes no history: it leaves the MLflow run of an earlier training unchanged.
        """
        if not self._lock and _stamp(self._history) != self._stamp:
            with self._publisher.tolerating_errors(str(self.folder)):
                self._lock = run_record.try_lock(self.folder)
                if self._lock:
                    run_record.mark_unpublished(self.folder)
                    run_record.save(self.folder, self._record("RUNNING"), {})
            self._stamp = _stamp(self._history)  # without the lock, it is a run of the same key that we wait for
        self._publisher.attempt(self._log_live if self._lock else lambda _store: None)
        prepare_plots()

    def end(self, code: int) -> None:
        """Write the final record, publish everything, delete the oldest run folders."""
        changed = self._lock or _stamp(self._history) != self._stamp
        refused = code == 2 or run_record.read(self.folder, "train")  # or failed before it touched the history
        with self._publisher.tolerating_errors(str(self.folder)):
            if self._stop_monitor:
                self._stop_monitor()
            if not self._lock and (changed or not refused):
                self._lock = run_record.try_lock(self.folder, wait_s=LOCK_S)
            if self._lock:
                run_record.mark_unpublished(self.folder)
                run_record.save(self.folder, self._record(child.status_of(code)), self._artifacts(code))
                self._publisher.attempt(self._publish, last=True)
            elif code == 2 and not self._history.exists():  # a refused command leaves no run folder
                shutil.rmtree(self.folder / "logs", ignore_errors=True)
                with suppress(OSError):
                    self.folder.rmdir()
            run_record.prune(self._root, current=self.folder)

    def _publish(self, store: "Store") -> None:
        publish_run(store, self.folder)
        run_record.mark_published(self.folder)

    def _log_live(self, store: "Store") -> None:
        live, self._live = self._live, None  # after a failure the history is read again; known steps are skipped
        if not live:
            record = self._record("RUNNING")
            live = store.find_or_create("run.key", self.folder.name, record), HistoryReader(self._history)
            live[0].start(record)
            self._stop_monitor = self._stop_monitor or live[0].monitor_system()
        live[0].log_history(live[1].new_points())
        self._live = live

    def _record(self, status: str) -> Record:
        """What is known of the training; its results only if it is finished, since older ones may be present before."""
        finished = status == "FINISHED"
        checkpoint = self._command.path("--checkpoint")
        sha256 = sha256_file(checkpoint) if finished and checkpoint.is_file() else ""
        metrics = _read(self._command.path("--metrics")) if finished else {}
        name, tags = provenance()
        tags = tags | {"run.key": self.folder.name} | ({"checkpoint.sha256": sha256} if sha256 else {})
        if "parameters" in metrics:
            tags["parameters"] = str(metrics["parameters"])
        return Record(
            stage="train",
            name=name or self.folder.name[:7],
            status=status,
            began=self._began,
            ended=time.time(),
            checkpoint=sha256,
            checkpoint_file=str(checkpoint) if sha256 else "",
            checkpoint_md5=_md5(checkpoint) if sha256 else "",
            changes=self._command.changes,
            tags=tags,
            params=self._params,
            metrics={name: metrics[key] for key, name in METRICS.items() if key in metrics},
            dataset=_read(self._command.path("--tokens") / "meta.json"),
        )

    def _artifacts(self, code: int) -> dict[str, Path | str | bytes]:
        logs = self.folder / "logs" / "train.log"
        found: dict[str, Path | str | bytes] = {"params.yaml": self._params_text, "logs/train.log": logs}
        if not code:
            for name in ("--metrics", "--history", "--validation"):
                path = self._command.path(name)
                found[path.name] = path
        return found | rendered("train", self._plots)

    def _plots(self) -> Iterable[tuple[str, bytes]]:
        from stages.run_plots import of_training  # noqa: PLC0415 (imports matplotlib)

        return of_training(HistoryReader(self._history).new_points())


def _processes(launch: LaunchParams, train: dict[str, Any]) -> int:
    """The number of processes to start here; reports idle devices. Errors in `train` are left to the command."""
    gpus = 0 if train.get("device") == "cpu" else visible_gpus()
    shards = train.get("shards")
    if not isinstance(shards, int) or shards < 1:
        return 1
    local_shards = max(1, shards // torchrun.nodes())
    processes, idle = choose_processes(launch.processes, shards=local_shards, gpus=gpus, cores=usable_cores())
    if idle and "PET_NPROC_PER_NODE" not in os.environ:
        print(f"stages.train: {idle}", flush=True)
    return processes


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """A value that changes if a file is appended to, truncated or replaced."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _md5(path: Path) -> str:
    """The hash that DVC uses."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of the command; empty if it is missing or invalid, which is left to the command to report."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


if __name__ == "__main__":
    child.enter("train", refuse_edited_inputs("train", main))
