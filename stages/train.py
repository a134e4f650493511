"""`python -m stages.train COMMAND…`: run the training with torchrun's environment and publish it live."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.core.errors import UserError
from gpt.core.files import sha256_file
from gpt.core.params import check_section, read_params
from gpt.launch import LaunchParams, choose_processes, usable_cores, visible_gpus
from gpt.training.fingerprint import run_key
from stages.execution import child, torchrun
from stages.execution.command_line import CommandLine, enter
from stages.execution.stage import Stage
from stages.runs import run_record
from stages.runs.provenance import provenance
from stages.runs.publish import publish_run
from stages.runs.run_record import HistoryReader, Record

if TYPE_CHECKING:
    from stages.tracking.store import Store
    from stages.tracking.tracked_run import TrackedRun


def main(words: Sequence[str]) -> int:
    """Train and publish; returns the command's exit code. On another machine than node 0 only train.

    Raises:
        UserError: an option or a key that is needed to start is missing or wrong.

    """
    command, root = CommandLine(words), run_record.main_workspace()
    params_file = command.path("--params")
    params = read_params(params_file, command.changes)
    launch = check_section(params_file, "launch", LaunchParams, params)
    environment = torchrun.training_environment(_processes(launch, params.get("train") or {}))
    key = run_key(params, command.path("--tokens"))
    if message := torchrun.command_for_other_nodes(command.words):
        print(message, flush=True)
    command = command.with_default("--timeout", launch.timeout)
    if torchrun.nodes().rank:
        return _join(command, environment)
    train = Train(command.with_default("--run-dir", root / ".runs" / key))
    with run_record.lock(train.folder):
        return train.run(environment)


class Train(Stage):
    """The stage train: publishes live, in a run that is created once the training has started.

    A training has started when it writes its history. A command that refuses its input does not: it leaves the MLflow
    run of an earlier training unchanged.
    """

    name = "train"
    outputs = ("--metrics", "--history", "--validation")

    def __init__(self, command: CommandLine) -> None:
        """Remember the state before the training."""
        folder = command.path("--run-dir")
        super().__init__(command, folder, folder.name)
        self._params_text = command.path("--params").read_text(encoding="utf-8")
        self._history = folder / "history.jsonl"
        self._stamp = _stamp(self._history)
        self._running = False  # whether the record says so
        self._live: tuple[TrackedRun, HistoryReader] | None = None
        self._stop_monitor: Callable[[], None] | None = None

    def on_poll(self) -> None:
        """Log what is new in the history, and first record that the training has started."""
        if not self._running and self._has_started():
            with self.publisher.tolerating_errors(str(self.folder)):
                run_record.save(self.folder, self._record("RUNNING"), {})
            self._running = True
        super().on_poll()

    def publish_live(self, store: "Store") -> None:
        """Log the new points of the history, once the training has started."""
        if not self._running:
            return
        live, self._live = self._live, None  # after a failure the history is read again; known steps are skipped
        if not live:
            record = self._record("RUNNING")
            live = store.find_or_create("run.key", self.folder.name, record), HistoryReader(self._history)
            live[0].start(record)
            self._stop_monitor = self._stop_monitor or live[0].monitor_system()
        live[0].log_history(live[1].new_points())
        self._live = live

    def end(self, code: int) -> None:
        """Write the final record, publish everything, delete the oldest run folders."""
        recorded = run_record.read(self.folder, "train")
        if self._has_started() or (code != 2 and not recorded):
            record = self._record(child.status_of(code))
            self.save(record, {"params.yaml": self._params_text}, with_outputs=not code)
            self.publisher.finish(self._publish)
        elif not recorded and not self._history.exists():  # a refused command leaves no run folder
            shutil.rmtree(self.folder)
        run_record.prune(self.root, current=self.folder)

    def _publish(self, store: "Store") -> None:
        """Publish everything, without system metrics from now on."""
        if self._stop_monitor:
            self._stop_monitor()
        publish_run(store, self.folder)

    def _has_started(self) -> bool:
        return _stamp(self._history) != self._stamp

    def _record(self, status: str) -> Record:
        """What is known of the training; its results only if it is finished, since older ones may be present before."""
        checkpoint = self.command.path("--checkpoint")
        tags, results = provenance()[1] | {"run.key": self.folder.name}, dict[str, Any]()
        if status == "FINISHED" and checkpoint.is_file():
            metrics, sha256 = _read(self.command.path("--metrics")), sha256_file(checkpoint)
            tags["checkpoint.sha256"] = sha256
            results = {
                "checkpoint": sha256,
                "checkpoint_file": str(checkpoint),
                "checkpoint_md5": run_record.md5_file(checkpoint),
            }
            results["metrics"] = {name: float(value) for name, value in metrics.items()}
        dataset = _read(self.command.path("--tokens") / "meta.json")
        changes = self.command.changes
        return self.record(status=status, tags=tags, params=self.params, changes=changes, dataset=dataset, **results)


def _join(command: CommandLine, environment: dict[str, str]) -> int:
    """Train with node 0; write and publish nothing."""
    if "DVC_STAGE" in os.environ:
        raise UserError("PET_NODE_RANK: expected 0 under DVC, found another node; run python -m stages.join there")
    tokens = command.path("--tokens")
    if not (tokens / "meta.json").exists():  # before node 0 starts to wait for this rank
        raise UserError(f"{tokens}: expected the token files of node 0, found none; dvc pull {tokens}")
    torchrun.wait_for_node_0(torchrun.nodes().endpoint)
    return child.run(command.words, [], stage="join", mark="", environment=environment)


def _processes(launch: LaunchParams, train: dict[str, Any]) -> int:
    """The number of processes to start here; reports idle devices. Errors in `train` are left to the command."""
    gpus = 0 if train.get("device") == "cpu" else visible_gpus()
    shards = train.get("shards")
    if not isinstance(shards, int) or shards < 1:
        return 1
    local_shards = max(1, shards // torchrun.nodes().count)
    processes, idle = choose_processes(launch.processes, shards=local_shards, gpus=gpus, cores=usable_cores())
    if idle and "PET_NPROC_PER_NODE" not in os.environ:
        print(f"stages.train: {idle}", flush=True)
    return processes


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """A value that changes if a file is appended to, truncated or replaced."""
    with suppress(FileNotFoundError):
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of the command; empty if it is missing or invalid, which is left to the command to report."""
    with suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    return {}


if __name__ == "__main__":
    enter("train", main)
