"""What all stages share: run the command, keep record and artifacts in a run folder, publish them to MLflow."""

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.core.files import sha256_file
from stages.execution import child
from stages.execution.command_line import CommandLine
from stages.runs import run_record
from stages.runs.provenance import PARENT_VARIABLE, logged_params, provenance
from stages.runs.publish import Publisher, publish_run
from stages.runs.run_record import Record

if TYPE_CHECKING:
    from stages.tracking.store import Store


class Stage:
    """One execution of a stage. A subclass names the stage, what it publishes, and how."""

    name: str
    outputs: tuple[str, ...]  # options of the command whose files become artifacts

    def __init__(self, command: CommandLine, folder: Path, about: str) -> None:
        """Read what the user may edit while the command runs.

        Args:
            folder: the run folder, or a temporary one.
            about: the run's key or the checkpoint's SHA-256.

        """
        self.root, self.began = run_record.main_workspace(), time.time()
        self.folder, self.about = folder, about
        self.log = folder / "logs" / f"{self.name}.log"
        logs = command.with_default("--log-file", self.root / "gpt_nano.log")
        self.command = logs.with_option("--log-file", self.log)
        self.params = logged_params(command, self.name)
        train = run_record.read(folder, "train")
        self.experiment = train.experiment if train and self.name != "train" else run_record.experiment_name()
        self.publisher = Publisher(self.name, self.root, self.experiment)

    def run(self, environment: Mapping[str, str] = {}) -> int:
        """Run the command and publish its results; returns its exit code."""
        words, logs = self.command.words, self.command.all_paths("--log-file")
        mark = f"{self.name}[{self.about[:8]}]"
        code = child.run(words, logs, stage=self.name, mark=mark, environment=environment, on_poll=self.on_poll)
        with self.publisher.tolerating_errors("its results"):
            self.end(code)
        return code

    def on_poll(self) -> None:
        """Called repeatedly while the command runs: connect to the store, publish what has been written so far."""
        self.publisher.attempt(self.publish_live)

    def publish_live(self, store: "Store") -> None:
        """Publish what the command has written so far."""

    def end(self, code: int) -> None:
        """Save and publish the results after the command has ended."""
        raise NotImplementedError

    def record(self, **results: Any) -> Record:
        """The record of this stage with these results."""
        name, parent = provenance()[0] or self.about[:7], os.environ.get(PARENT_VARIABLE, "")
        about: dict[str, Any] = {"stage": self.name, "name": name, "experiment": self.experiment, "parent": parent}
        return Record(**about, began=self.began, ended=time.time(), **results)

    def save(self, record: Record, artifacts: Mapping[str, Path | str], *, with_outputs: bool) -> None:
        """Save a record in the run folder with these artifacts, the log and the command's output files."""
        paths = [self.command.path(option) for option in self.outputs] if with_outputs else []
        outputs = {path.name: path for path in paths}
        run_record.save(self.folder, record, {**artifacts, **outputs, f"logs/{self.log.name}": self.log})


class CheckpointStage(Stage):
    """A stage that reads a checkpoint and publishes its results on the run of that checkpoint."""

    def __init__(self, command: CommandLine, temporary: Path) -> None:
        """Find the run folder of the checkpoint; the temporary one serves for a checkpoint from elsewhere."""
        checkpoint = command.path("--checkpoint")
        sha256 = sha256_file(checkpoint) if checkpoint.is_file() else ""
        run = run_record.run_of_checkpoint(run_record.main_workspace(), sha256)
        self._known = run is not None
        super().__init__(command, run or temporary, sha256)
        for option in self.outputs:
            command.path(option)  # raises if it is missing

    @classmethod
    def main(cls, words: Sequence[str]) -> int:
        """Run the command and publish its results; returns its exit code."""
        with tempfile.TemporaryDirectory() as temporary:
            return cls(CommandLine(words), Path(temporary)).run()

    def metrics(self) -> dict[str, float]:
        """The metrics that the command wrote."""
        return {}

    def artifacts(self) -> dict[str, Path | str]:
        """Artifacts beside the output files: the section of the params, which MLflow would not let change."""
        return {f"params/{self.name}.json": json.dumps(self.params, indent=2)}

    def end(self, code: int) -> None:
        """Publish the results of a command that succeeded."""
        if not code:
            record = self.record(tags={"checkpoint.sha256": self.about}, metrics=self.metrics())
            self.save(record, self.artifacts(), with_outputs=True)
            self.publisher.finish(partial(self._publish, record))

    def _publish(self, record: Record, store: "Store") -> None:
        """Publish on the run of this run folder or, for a checkpoint without one, on the run with its SHA-256."""
        if self._known:
            published = store.find("run.key", self.folder.name)
            publish_run(store, self.folder, [self.name] if published else run_record.STAGES)
            return
        run = store.find("checkpoint.sha256", self.about)
        if not run:
            run = store.find_or_create("checkpoint.sha256", self.about, record)
            run.finish(record)
        run.log(record)
        run.upload(self.folder, [record])
