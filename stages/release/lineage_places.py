"""The items of a lineage, and where each one is now: every copy is found and compared by its hashes."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from os.path import relpath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from gpt.core.errors import UserError
from gpt.core.files import sha256_file
from stages.runs.run_record import dvc_cache, flatten, md5_file, read, runs

if TYPE_CHECKING:
    from stages.tracking.lookup import Lookup

PRESENT = "present"  # recorded there under its hash, and not read
VERIFIED = "verified"  # read, and its hashes are the expected ones
MISSING, DIFFERENT, NOT_FETCHED = "missing", "different", "not fetched"
LOCK = "dvc.lock"
Fetch = Callable[[str], Path]
Output = tuple[str, str]  # path and MD5, both empty if there is none
DVC = (sys.executable, "-m", "dvc")


class Lock:
    """The outputs of each stage in a dvc.lock, and the outputs of other stages that they were made of."""

    def __init__(self, text: str) -> None:
        """Read the text, which may be empty; UserError if it is not valid."""
        try:
            stages: dict[str, Any] = (YAML(typ="safe", pure=True).load(text) or {}).get("stages", {})
        except (YAMLError, AttributeError):
            raise UserError(f"{LOCK}: expected valid YAML, found other text; run python -m stages.repair") from None
        files = [(stage, kind, e) for stage in stages for kind in ("outs", "deps") for e in stages[stage].get(kind, [])]
        found = [(stage, kind, (entry["path"], entry["md5"])) for stage, kind, entry in files if "md5" in entry]
        self.outputs = {out: stage for stage, kind, out in found if kind == "outs"}
        self._inputs = [(stage, dep) for stage, kind, dep in found if kind == "deps"]
        trained = (out for out, stage in self.outputs.items() if stage == "train" and out[0].endswith(".pt"))
        self.checkpoint: Output = next(trained, ("", ""))
        self.download = flatten(stages.get("download", {}).get("params", {}).get("params.yaml", {}), ["download"])

    def read_by(self, stage: str, writer: str) -> Output:
        """The output of the stage `writer` that a stage read."""
        written = {path for (path, _), by in self.outputs.items() if by == writer}
        return next((dep for by, dep in self._inputs if by == stage and dep[0] in written), ("", ""))


@dataclass(frozen=True)
class Content:
    """The hashes of a file or a folder."""

    sha256: str  # empty for a folder
    md5: str  # as in dvc.lock: that of a folder is of its listing, followed by `.dir`
    files: Mapping[str, "Content"] = field(default_factory=dict)  # of a folder, by relative path


@dataclass
class Place:
    """Where an item is, or should be."""

    where: str
    address: str
    state: str = PRESENT
    note: str = ""  # what differs


@dataclass
class Item:
    """One link of a chain, and the items that it was made of."""

    kind: str
    name: str
    sha256: str = ""  # empty if it is unknown, or of a folder
    md5: str = ""
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of the files of a folder
    details: dict[str, str] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # other than those of places
    origins: list["Item"] = field(default_factory=list)

    def learn(self, found: Content | None) -> bool:
        """Complete the hashes from a content that agrees with the known ones; returns whether it does."""
        if not found or {e == v for e, v in ((self.sha256, found.sha256), (self.md5, found.md5)) if e} != {True}:
            return False
        self.sha256, self.md5 = self.sha256 or found.sha256, self.md5 or found.md5
        self.files = self.files or {name: file.sha256 for name, file in found.files.items()}
        return True

    def compare(self, place: Place, found: Content | None, listed: Mapping[str, str] = {}) -> None:
        """Set the state of a place from what was read there; `listed` is the MD5 of each file of a folder."""
        place.state = VERIFIED if self.learn(found) else DIFFERENT if found else MISSING
        if place.state != VERIFIED:
            got = {name: file.md5 for name, file in found.files.items()} if found else {}
            place.note = ", ".join(name for name in sorted({*got, *listed}) if got.get(name) != listed.get(name))

    def all_problems(self) -> list[str]:
        """What does not match or is missing here, one line each."""
        wrong = [f"{p.where} {p.address}: {p.state} {p.note}" for p in self.places if p.state in (MISSING, DIFFERENT)]
        return [f"{self.kind} {self.name}: {problem}".strip() for problem in [*self.problems, *wrong]]


class Project:
    """What a workspace, DVC and a tracking store have."""

    def __init__(self, root: Path, tracking: "Lookup | None", *, verify: bool) -> None:
        """Read dvc.lock and the records of trainings; `verify`: read what is stored under its hash."""
        self.root, self.tracking, self._verify = root, tracking, verify
        self.lock = Lock((root / LOCK).read_text(encoding="utf-8") if (root / LOCK).is_file() else "")
        self.runs = {run: record for run in runs(root) if (record := read(run, "train"))}
        self._cache = dvc_cache(root) or root / ".dvc" / "cache"
        self._remotes = [line.split()[0] for line in self.output(*DVC, "remote", "list").splitlines()]

    def locate(self, item: Item, path: str, copies: Mapping[str, str]) -> None:
        """Add all places of an item with a path in the workspace; `copies` are the files of run folder and MLflow."""
        found = content_of(self.root / path) if path else None
        is_recorded, listed = (path, item.md5) in self.lock.outputs, _listing(_object(self._cache, item.md5))
        if is_recorded or item.learn(found):
            item.places.append(place := Place("workspace", path))
            item.compare(place, found, listed)
        is_lost = is_recorded and self.output("git", "check-ignore", path)  # not those with `cache: false`
        with TemporaryDirectory() as folder:
            for place, is_there, fetch in self._stores(item, copies, Path(folder)):
                if is_there or (is_lost and place.where == "DVC cache"):
                    item.places.append(place)
                    if self._verify or not is_there:
                        item.compare(place, _stored(fetch(item.md5), fetch), listed)
        if not item.places:
            item.problems.append("found in none of the places that were searched")

    def output(self, *command: str) -> str:
        """The output of git or dvc in the workspace; empty if it fails."""
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False)
        return "" if done.returncode else done.stdout

    def _stores(self, item: Item, copies: Mapping[str, str], folder: Path) -> Iterator[tuple[Place, bool, Fetch]]:
        """Where an item may be stored, whether it is there, and a function that fetches any content from there."""
        cached = _object(self._cache, item.md5)
        if item.md5:
            yield Place("DVC cache", relpath(cached, self.root)), cached.exists(), partial(_object, self._cache)
        for remote in self._remotes if item.md5 else ():
            place = Place("DVC remote", f"remote://{remote}/{_object(Path(), item.md5)}")
            yield place, bool(self.output(*DVC, "list-url", place.address)), partial(self._fetch, remote, folder)
        for address in (address for address, sha256 in copies.items() if sha256 == item.sha256 != ""):
            if address.startswith(".runs/"):
                yield Place("run folder", address), True, partial(lambda path, _: path, self.root / address)
            elif self.tracking:
                yield Place("MLflow", address), True, partial(self.tracking.download, address, folder)

    def _fetch(self, remote: str, folder: Path, md5: str) -> Path:
        self.output(*DVC, "get-url", f"remote://{remote}/{_object(Path(), md5)}", f"{folder}/{remote}-{md5}")
        return folder / f"{remote}-{md5}"


def content_of(path: Path) -> Content | None:
    """The hashes of a file or folder; None if there is none."""
    if path.is_dir():
        return _folder({file.relative_to(path).as_posix(): file for file in path.rglob("*")})
    return Content(sha256_file(path), md5_file(path)) if path.is_file() else None


def _stored(file: Path, fetch: Fetch) -> Content | None:
    listed = _listing(file)
    return _folder({name: fetch(part) for name, part in listed.items()}) if listed else content_of(file)


def _listing(file: Path) -> dict[str, str]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".dir" else []
        return {entry["relpath"]: entry["md5"] for entry in entries if entry["md5"].isalnum()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _folder(paths: Mapping[str, Path]) -> Content:
    files = {name: found for name, path in sorted(paths.items()) if path.is_file() and (found := content_of(path))}
    listed = json.dumps([{"md5": found.md5, "relpath": name} for name, found in files.items()])  # as DVC writes it
    return Content("", hashlib.md5(listed.encode(), usedforsecurity=False).hexdigest() + ".dir", files)


def _object(base: Path, md5: str) -> Path:
    return base / "files" / "md5" / md5[:2] / md5[2:]
