"""`python -m stages.train COMMAND…`: run the training command, with torchrun's environment, and publish it live."""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.core.files import sha256_file
from gpt.core.params import check_section, read_params
from gpt.launch import LaunchParams, choose_processes, usable_cores, visible_gpus
from gpt.training.fingerprint import run_key
from stages import launch, log, record, torchrun
from stages.edits import refusing
from stages.history import Follower
from stages.publish import Publisher, drawn, prepare_drawing, provenance, publish_run, settings
from stages.record import Record
from stages.system import Sampler

if TYPE_CHECKING:
    from stages.tracking import Row, Store

PARAMS = ("download", "tokenize", "model", "train")  # the sections that make a trained model, on the row as params
CLAIM_S = 5  # a run of the same key that has just ended needs about as long to publish
FIGURES = {"val_loss": "best_val_loss", "best_step": "best_step"}  # those of metrics/train.json without a line by step


def main(command: list[str]) -> int:
    """Train and publish; returns the command's exit code.

    Raises:
        UserError: an option or a key that decides how to start is missing or wrong.

    """
    root, began = record.main_workspace(), time.time()
    record.drop_states(root)
    params_file, changes = launch.option(command, "--params"), launch.options(command, "--set", "-S")
    params = read_params(params_file, changes)
    wished = check_section(params_file, "launch", LaunchParams, params)
    environment = torchrun.training_environment(_processes(wished, params.get("train") or {}))
    key = run_key(params_file, launch.option(command, "--tokens"), changes)
    command = launch.with_option(command, "--timeout", wished.timeout)
    if others := torchrun.lines_for_other_nodes(command, environment):
        print(others, flush=True)
    command = launch.with_option(command, "--run-dir", root / ".runs" / key)
    command = launch.with_option(command, "--log-file", root / "gpt_nano.log")
    training = _Training(command, root, began)
    code = launch.run(
        command,
        stage="train",
        about=training.run.name,
        log_file=training.log_file,
        environment=environment,
        meanwhile=training.follow,
    )
    training.end(code)
    return code


class _Training:
    """One training run as its wrapper sees it: the run folder, and the row as soon as the run really begins."""

    def __init__(self, command: list[str], root: Path, began: float) -> None:
        self._command, self._root, self._began = command, root, began
        self.run = launch.option(command, "--run-dir")
        self.log_file = launch.option(command, "--log-file")
        # As they are when it starts: somebody may edit the file while it trains.
        self._params_text = launch.option(command, "--params").read_text(encoding="utf-8")
        self._settings = settings(command, *PARAMS)
        self._publisher = Publisher("train", root)
        self._history = self.run / "history.jsonl"
        self._before = _stamp(self._history)
        self._claim: AbstractContextManager[object] | None = None  # held from the opening on, until this process ends
        self._live: tuple[Row, list[Follower]] | None = None
        self._sampler = Sampler(self.run / "system.jsonl")

    def follow(self) -> None:
        """Bring what is new in the history to the row; opens the row when the history moves for the first time.

        A command that refuses its input writes no history: it leaves the row of an earlier run as it is.
        """
        if not self._claim and _stamp(self._history) != self._before:
            with self._publisher.surviving(self.run):
                self._claim = record.claim(self.run)
                if self._claim:
                    record.expect_publication(self.run)
                    record.save(self.run, self._record("RUNNING"), {})
            self._before = _stamp(self._history)  # if not ours, it was moved by a run of the same key that we wait for
        if self._claim:
            self._sampler.look()
        self._publisher.attempt(self._replay if self._claim else lambda _store: None)
        prepare_drawing()

    def end(self, code: int) -> None:
        """Write down how it ended and publish all of it; then the oldest run folders go."""
        moved = self._claim or _stamp(self._history) != self._before
        refused = code == 2 or record.read(self.run, "train")  # or failed before it touched an earlier run's history
        with self._publisher.surviving(self.run):
            if self._claim:
                self._sampler.look()
            elif moved or not refused:
                self._claim = record.claim(self.run, wait_s=CLAIM_S)
            if self._claim:
                record.expect_publication(self.run)
                record.save(self.run, self._record(launch.status_of(code)), self._artifacts(code))
                self._publisher.attempt(self._publish, last=True)
            record.prune(self._root, current=self.run)

    def _publish(self, store: "Store") -> None:
        publish_run(store, self.run)
        record.confirm_publication(self.run)

    def _replay(self, store: "Store") -> None:
        live, self._live = self._live, None  # after a failure all is read again; the row knows which steps it has
        if not live:
            opening = self._record("RUNNING")
            followers = [Follower(self.run / name) for name in record.HISTORIES]
            live = store.row("run.key", self.run.name, opening), followers
            live[0].open_again(opening)
        for follower in live[1]:
            live[0].replay(follower.news())
        self._live = live

    def _record(self, status: str) -> Record:
        """What is known of the run: its result only when it is finished, for before, an older one's may lie there."""
        done = status == "FINISHED"
        checkpoint = launch.option(self._command, "--checkpoint")
        sha256 = sha256_file(checkpoint) if done and checkpoint.is_file() else ""
        figures = _read(launch.option(self._command, "--metrics")) if done else {}
        name, tags = provenance()
        tags = tags | {"run.key": self.run.name} | ({"checkpoint.sha256": sha256} if sha256 else {})
        if "parameters" in figures:
            tags["parameters"] = str(figures["parameters"])
        return Record(
            stage="train",
            name=name or self.run.name[:7],
            status=status,
            began=self._began,
            ended=time.time(),
            checkpoint=sha256,
            checkpoint_file=str(checkpoint) if sha256 else "",
            checkpoint_md5=_md5(checkpoint) if sha256 else "",
            changes=launch.options(self._command, "--set", "-S"),
            tags=tags,
            params=self._settings,
            metrics={ours: figures[theirs] for theirs, ours in FIGURES.items() if theirs in figures},
            dataset=_read(launch.option(self._command, "--tokens") / "meta.json"),
        )

    def _artifacts(self, code: int) -> dict[str, Path | str | bytes]:
        found: dict[str, Path | str | bytes] = {
            "params.yaml": self._params_text,
            "logs/train.log": log.part_of_log(self.log_file, log.frame("train", self.run.name)),
        }
        if not code:
            for name in ("--metrics", "--history", "--validation"):
                path = launch.option(self._command, name)
                found[path.name] = path
        found.update(drawn("train", self._pictures))
        return found

    def _pictures(self) -> Iterable[tuple[str, bytes]]:
        from stages.pictures import of_training  # noqa: PLC0415 (half a second, spent while the command ran)

        return of_training(Follower(self._history).news())


def _processes(wished: LaunchParams, train: dict[str, Any]) -> int:
    """How many processes to start here; says which devices stay idle. What is wrong in `train`, the command says."""
    gpus = 0 if train.get("device") == "cpu" else visible_gpus()
    shards = train.get("shards")
    if not isinstance(shards, int) or shards < 1:
        return 1
    share = max(1, shards // torchrun.nodes())
    processes, idle = choose_processes(wished.processes, shards=share, gpus=gpus, cores=usable_cores())
    if idle and "PET_NPROC_PER_NODE" not in os.environ:
        print(f"stages.train: {idle}", flush=True)
    return processes


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Differs when a file was appended to, cut back or replaced."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _md5(path: Path) -> str:
    """The name that DVC gives to a content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of the command's, or nothing where it is missing: what is wrong with its input, the command says."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


if __name__ == "__main__":
    launch.enter("train", refusing("train", main))
