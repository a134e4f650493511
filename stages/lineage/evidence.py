"""What the project knows about its files: this and earlier versions of dvc.lock, and the records of the run folders."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from gpt.core.errors import UserError
from gpt.core.files import sha256_file
from stages import run_record
from stages.run_record import Record

LOCK = "dvc.lock"
MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")  # of a file, or of a folder's listing


class Lock:
    """The content of a dvc.lock: the outputs of each stage, and what they were made of, by MD5."""

    def __init__(self, origin: str, text: str, commit: str = "") -> None:
        """Read the text of a dvc.lock, of a commit if it is not that of the workspace.

        Raises:
            UserError: it is not valid.

        """
        self.origin, self.commit = origin, commit
        try:
            self._stages: dict[str, Any] = (YAML(typ="safe", pure=True).load(text) or {}).get("stages") or {}
        except (YAMLError, AttributeError):
            raise UserError(f"{origin}: expected a valid dvc.lock, found none; run python -m stages.repair") from None

    def outputs(self) -> Iterator["Output"]:
        """All outputs that are recorded with an MD5."""
        for stage, entry in self._stages.items():
            for out in entry.get("outs", []):
                if MD5.fullmatch(out.get("md5", "")):
                    yield Output(self, stage, out["path"], out["md5"])

    def md5_at(self, path: str) -> str:
        """The MD5 recorded for an output path; empty if there is none."""
        return next((out.md5 for out in self.outputs() if out.path == path), "")

    @property
    def checkpoint(self) -> "Output | None":
        """The trained model: the output of the stage train that other stages read."""
        read = {each.path for stage in self._stages for each in self.inputs(stage)}
        trained = [out for out in self.outputs() if out.stage == "train"]
        named = (out for out in trained if Path(out.path).suffix == ".pt")  # if only the stage train has run
        return next((out for out in trained if out.path in read), next(named, None))

    def inputs(self, stage: str) -> list["Output"]:
        """The outputs of other stages that a stage read, with the content that it read."""
        writers = {out.path: out.stage for out in self.outputs()}
        deps = self._stages[stage].get("deps", [])
        return [
            Output(self, writers[dep["path"]], dep["path"], dep.get("md5", ""))
            for dep in deps
            if dep["path"] in writers
        ]

    def params(self, *stages: str) -> dict[str, Any]:
        """The sections of the params file that stages depend on, with their values."""
        files = [file for stage in stages for file in self._stages.get(stage, {}).get("params", {}).values()]
        return {section: values for file in files for section, values in file.items()}


@dataclass(frozen=True)
class Output:
    """A file or folder that a stage wrote, as a dvc.lock records it."""

    lock: Lock
    stage: str
    path: str
    md5: str

    @property
    def inputs(self) -> list["Output"]:
        """The outputs of other stages that its stage read."""
        return self.lock.inputs(self.stage)


class Evidence:
    """The dvc.lock of the workspace, of the run folders and of git's history, and the records of the run folders."""

    def __init__(self, root: Path) -> None:
        """Read dvc.lock and the run folders of a workspace.

        Raises:
            UserError: its dvc.lock is not valid.

        """
        self.root = root
        file = root / LOCK
        self.workspace = Lock(LOCK, file.read_text(encoding="utf-8")) if file.is_file() else None
        self.runs = [(run, train) for run in run_record.runs(root) if (train := run_record.read(run, "train"))]
        self._locks = [self.workspace] if self.workspace else []
        for run, _ in self.runs:
            if saved := dict(run_record.artifacts(run, "lock")).get(LOCK):
                self.add(f"{LOCK} of run {run.name[:8]}", saved.read_text(encoding="utf-8"))

    def add(self, origin: str, text: str, commit: str = "") -> None:
        """Take one more dvc.lock into account, unless it is damaged."""
        try:
            self._locks.append(Lock(origin, text, commit))
        except UserError:
            return

    def producer(self, md5: str) -> Output | None:
        """The stage that wrote a content; from git's history if no dvc.lock of this workspace has it."""
        if not md5:
            return None
        if not (found := self._find(md5)):
            history = self.git("log", "--all", "--format=%H", f"-S{md5}", "--", LOCK).decode().split()
            if history:  # the last one is the first that recorded it
                text = self.git("show", f"{history[-1]}:./{LOCK}").decode(errors="replace")
                self.add(f"{LOCK} of commit {history[-1][:12]}", text, history[-1])
                found = self._find(md5)
        return found

    def run_of(self, sha256: str, md5: str) -> tuple[Path, Record] | None:
        """The newest run folder whose training wrote the checkpoint with this SHA-256 or else this MD5."""
        for run, train in self.runs:
            known = (train.checkpoint, sha256) if sha256 else (train.checkpoint_md5, md5)
            if all(known) and known[0] == known[1]:
                return run, train
        return None

    def artifacts(self, sha256: str) -> Iterator[tuple[Path, Record, str, str]]:
        """The run folders that keep a file with this content: folder, record of its training, stage, name."""
        for run, train in self.runs:
            for stage in run_record.STAGES:
                for name, path in run_record.artifacts(run, stage):
                    if sha256_file(path) == sha256:
                        yield run, train, stage, name

    def git(self, *arguments: str) -> bytes:
        """The output of git in the workspace; empty if it fails."""
        try:
            return subprocess.run(["git", *arguments], cwd=self.root, capture_output=True, check=False).stdout
        except OSError:  # no git
            return b""

    def _find(self, md5: str) -> Output | None:
        return next((out for lock in self._locks for out in lock.outputs() if out.md5 == md5), None)
