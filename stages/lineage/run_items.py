"""The training of a checkpoint, from all that knows it: its run, params, code and the source of its corpus."""

import json
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from gpt.core.errors import without_secrets
from gpt.core.files import canonical_json
from gpt.core.params import read_params
from gpt.download.sources import LOCAL
from stages.lineage.evidence import Evidence, Output
from stages.lineage.items import DIFFERENT, MISSING, NOT_FETCHED, VERIFIED, Item, Place, content_of
from stages.lineage.places import Finder, shown
from stages.run_record import Record, artifacts, flatten

if TYPE_CHECKING:
    from stages.tracking.lookup import FoundModel, FoundRun

PARAMS = "params.yaml"
SECTIONS = ("download", "tokenize", "model", "train")
# Tags of records and MLflow runs, the first that is there counts.
COMMIT_TAGS, CHANGED_TAGS = ("git.commit", "mlflow.source.git.commit"), ("git.changed",)
EXPERIMENT_TAGS = ("dvc.exp_name",)
COMMIT = re.compile("[0-9a-f]{7,64}")


@dataclass(frozen=True)
class Training:
    """What is known of a training; everything may be missing."""

    folder: Path | None = None
    record: Record | None = None
    runs: Sequence["FoundRun"] = ()
    models: Sequence["FoundModel"] = ()
    output: Output | None = None  # the stage in a dvc.lock

    def tag(self, names: Sequence[str]) -> str:
        """The value of the first tag that the record or an MLflow run has."""
        sources = [*([self.record.tags] if self.record else []), *(run.tags for run in self.runs)]
        return next((tags[name] for tags in sources for name in names if tags.get(name)), "")

    @property
    def commit(self) -> str:
        """The commit that was checked out; empty if it is unknown."""
        commit = self.tag(COMMIT_TAGS)
        return commit if COMMIT.fullmatch(commit) else ""  # it becomes an argument of git

    @property
    def inputs(self) -> list[Output]:
        """The outputs of other stages that the training read."""
        return self.output.inputs if self.output else []

    @property
    def download(self) -> tuple[list[str], str]:
        """The sources of the corpus without passwords, and its pinned SHA-256 or an empty text."""
        flat = self.record.params if self.record else next((run.params for run in self.runs), {})
        if "download.sources" in flat:
            sources, pinned = json.loads(flat["download.sources"]), flat.get("download.sha256", "null")
        else:
            section = self.output.lock.params("download").get("download", {}) if self.output else {}
            sources, pinned = section.get("sources", []), section.get("sha256") or "null"
        return [without_secrets(str(source)) for source in sources], "" if pinned == "null" else pinned


def run_item(training: Training, evidence: Evidence, finder: Finder) -> Item:
    """The run, with its params and code as origins."""
    record, runs, output = training.record, training.runs, training.output
    name = record.name if record else next((run.name for run in runs), "unknown")
    item = Item("run", name)
    if training.folder and record:
        began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(record.began))
        item.details |= {"key": training.folder.name, "trained": f"{began}, {record.status.lower()}"}
        item.places.append(Place("run folder", shown(training.folder, evidence.root)))
    if experiment := training.tag(EXPERIMENT_TAGS):
        item.details["experiment"] = experiment
    if training.models:
        item.details["registered"] = ", ".join(model.label for model in training.models)
    if output:
        item.details["recorded in"] = output.lock.origin
    item.places += [Place("MLflow", f"runs:/{run.id}", note=f"{run.experiment}, {run.status.lower()}") for run in runs]
    if not (record or runs or output):
        item.problems.append("no run folder, MLflow run or dvc.lock here names this checkpoint")
        return item
    item.origins = [params_item(training, evidence, finder), code_item(training, evidence)]
    return item


def params_item(training: Training, evidence: Evidence, finder: Finder) -> Item:
    """The params file of a training and its overrides; values that it was not trained with are a problem."""
    item = Item("params", PARAMS)
    saved = dict(artifacts(training.folder, "train")).get(PARAMS) if training.folder else None
    if saved and (content := content_of(saved)):
        item.learn(content)
        item.places.append(Place("run folder", shown(saved, evidence.root), VERIFIED))
        if wrong := _changed_values(saved, training.record):
            item.problems.append(f"{', '.join(wrong)}: other values than in the run's record")
    elif not (found := _params_of_lock(training, evidence)):
        item.details["values"] = f"in {training.output.lock.origin}" if training.output else "in MLflow"
    else:
        with TemporaryDirectory() as folder:
            file = Path(folder, PARAMS)
            file.write_bytes(found)
            if content := content_of(file):
                item.sha256, item.md5 = content.sha256, content.md5
    if training.record and training.record.changes:
        item.details["overrides"] = " ".join(f"-S {shlex.quote(change)}" for change in training.record.changes)
    finder.locate_in_workspace(item, [PARAMS])
    finder.locate_in_git(item, training.commit, PARAMS)
    for run in training.runs:
        finder.locate_tracked(item, run.files, named_by_hash=False)
    item.md5 = ""  # DVC does not store this file
    return item


def code_item(training: Training, evidence: Evidence) -> Item:
    """The commit of a training and the files that differed from it."""
    commit, changed = training.commit, training.tag(CHANGED_TAGS)
    if not commit:
        return Item("code", "unknown", details={"commit": "neither a run folder nor MLflow names it"})
    item = Item("code", f"commit {commit}", details={"uncommitted": changed or "nothing"})
    found = evidence.git("cat-file", "-t", commit).strip() == b"commit"
    missing = "" if found else "fetch it: git fetch --all"
    item.places.append(Place("git", commit[:12], VERIFIED if found else MISSING, missing))
    return item


def source_item(training: Training, evidence: Evidence, corpus: Item) -> Item:
    """The addresses of the corpus; only local files are read."""
    sources, pinned = training.download
    item = Item("source", f"{len(sources)} address(es), tried in this order" if len(sources) > 1 else "address", pinned)
    if not pinned:
        item.details["SHA-256"] = "not pinned (download.sha256 is null)"
    elif corpus.sha256 and corpus.sha256 != pinned:
        item.problems.append(f"expected SHA-256 {pinned} (download.sha256), found {corpus.sha256}")
    for source in sources:
        place = Place("address", source, NOT_FETCHED)
        if LOCAL.fullmatch(source):
            content = content_of(evidence.root / source)
            place.state = MISSING if not content else VERIFIED if corpus.agrees(content) else DIFFERENT
            place.where = "local file"
        item.places.append(place)
    return item


def _changed_values(file: Path, record: Record | None) -> list[str]:
    """The keys of a saved params file whose values are not those in the record."""
    if not record or not record.params:
        return []
    values = flatten(read_params(file, record.changes), SECTIONS)
    values.pop("download.sources", None)  # in the record without passwords
    return [key for key, value in values.items() if record.params.get(key) != value]


def _params_of_lock(training: Training, evidence: Evidence) -> bytes:
    """A params file with the values in the dvc.lock: of the workspace or of the commit that recorded it."""
    if not training.output:
        return b""
    lock = training.output.lock
    expected, file = lock.params(*SECTIONS), evidence.root / PARAMS
    candidates = [file.read_bytes() if file.is_file() else b""]
    candidates.append(evidence.git("show", f"{lock.commit or 'HEAD'}:./{PARAMS}"))
    return next((text for text in candidates if _has(text, expected)), b"")


def _has(text: bytes, expected: Mapping[str, Any]) -> bool:
    """Whether a params file has these sections."""
    try:
        found = YAML(typ="safe", pure=True).load(text.decode())
    except (YAMLError, UnicodeDecodeError):
        return False
    return isinstance(found, dict) and all(
        canonical_json(found.get(name)) == canonical_json(values) for name, values in expected.items()
    )
