"""The chain from a checkpoint to its origins: one function for each link, which is found by a hash."""

import json
import re
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.core.errors import without_secrets
from gpt.core.files import read_json, sha256_file
from gpt.download.sources import LOCAL
from stages.release.lineage_places import (
    LOCK,
    MISSING,
    NOT_FETCHED,
    VERIFIED,
    Item,
    Lock,
    Output,
    Place,
    Project,
    content_of,
)
from stages.runs.run_record import COMMIT, DIRTY, STAGES, artifacts

if TYPE_CHECKING:
    from stages.tracking.lookup import FoundRun


class Chain:
    """The chain of a checkpoint, or of a run without one."""

    def __init__(
        self, project: Project, sha256: str, md5: str, run: Path | None = None, tracked: "FoundRun | None" = None
    ) -> None:
        """Find what is known of a training by one of its checkpoint's hashes, its run folder or its MLflow run."""
        self._project = project
        self.checkpoint = item = Item("checkpoint", "unknown", sha256, md5)
        item.learn(content_of(project.root / (project.lock.checkpoint[0] or LOCK)))
        hashes = {item.sha256, item.md5} - {""}
        known = [each for each, record in project.runs.items() if hashes & {record.checkpoint, record.checkpoint_md5}]
        self._folder = run or next(iter(known), None)
        self._record = project.runs[self._folder] if self._folder else None
        if self._record:
            item.sha256, item.md5 = self._record.checkpoint, self._record.checkpoint_md5
        if project.tracking and item.sha256:
            tracked = tracked or project.tracking.find(item.sha256)
        self._tracked, self._record = tracked, self._record or (tracked.record if tracked else None)
        self._tags = self._record.tags if self._record else {}
        self._copies = {**saved(self._folder), **(tracked.copies if tracked else {})}
        self.locate = partial(project.locate, copies=self._copies)
        self._commit = commit if re.fullmatch("[0-9a-f]{7,64}", commit := self._tags.get(COMMIT, "")) else "unknown"
        kept = dict(artifacts(self._folder, "lock")).get(LOCK) if self._folder else None
        stored = Lock(tracked.lock if tracked else "")
        locks = [project.lock, Lock(kept.read_text(encoding="utf-8") if kept else ""), stored]
        item.md5 = item.md5 or stored.checkpoint[1]
        self._lock = next((lock for lock in locks if item.md5 and lock.checkpoint[1] == item.md5), Lock(""))
        item.name = self._lock.checkpoint[0] or (self._record.checkpoint_file if self._record else "") or "unknown"

    def trace(self, corpus: str = "") -> Item:
        """The checkpoint with its origins, or the run without one; `corpus` is the SHA-256 that a text names."""
        item, run = self.checkpoint, self._run()
        if item.sha256 or item.md5:
            self.locate(item, item.name)
            run.origins.append(self.tokens(self._lock.read_by("train", "tokenize"), corpus))
            item.origins = [run]
        return item if item.origins else run

    def _run(self) -> Item:
        record, folder, tracked = self._record, self._folder, self._tracked
        if not record:
            return Item("run", "unknown", problems=["no run folder, and none in MLflow; run python -m stages.sync"])
        trained = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(record.began))
        details = {"key": self._tags.get("run.key", ""), "trained": f"{trained}, {record.status.lower()}"}
        registered = tracked.registered if tracked else ""
        details |= {"experiment": self._tags.get("dvc.exp_name", ""), "registered": registered}
        places = [Place("run folder", f".runs/{folder.name}")] if folder else []
        places += [Place("MLflow", f"runs:/{tracked.id}")] if tracked else []
        return Item("run", record.name, details=details, places=places, origins=[self._params(), self._code()])

    def _params(self) -> Item:
        names = {address.rpartition("/")[2]: sha256 for address, sha256 in self._copies.items()}
        item = Item("params", "params.yaml", names.get("params.yaml", ""))
        item.details["overrides"] = " ".join(self._record.changes if self._record else [])
        self.locate(item, item.name)
        return item

    def _code(self) -> Item:
        is_here = self._project.output("git", "cat-file", "-t", self._commit).strip() == "commit"
        place = Place("git", self._commit[:12], *((VERIFIED,) if is_here else (MISSING, "git fetch --all")))
        return Item("code", self._commit, details={"uncommitted": self._tags.get(DIRTY, "nothing")}, places=[place])

    def tokens(self, output: Output, corpus: str = "") -> Item:
        """The tokens that the training read."""
        item, meta = Item("tokens", output[0] or "unknown", md5=output[1]), self._record.dataset if self._record else {}
        self.locate(item, output[0])
        claims, file = (
            {"the text": corpus, "the run": meta.get("corpus_sha256")},
            self._project.root / item.name / "meta.json",
        )
        if sha256 := item.files.get(file.name):
            meta = read_json(file) if file.is_file() and sha256_file(file) == sha256 else meta
            claims[file.name] = meta.get("corpus_sha256")
        item.details["content"] = ", ".join(f"{name} {value}" for name, value in meta.items() if isinstance(value, int))
        lock = self._lock if self._lock.checkpoint[1] else self._project.lock
        item.origins = [self.corpus(lock.read_by("tokenize", "download"), claims)]
        return item

    def corpus(self, output: Output, claims: Mapping[str, str | None]) -> Item:
        """The text that the tokens were made of; `claims` are its SHA-256 by who names it."""
        named = {who: sha256 for who, sha256 in claims.items() if sha256}
        item = Item("corpus", output[0] or "unknown", next(iter(named.values()), ""), output[1])
        if len(set(named.values())) > 1:
            item.problems.append("; ".join(f"{who} names SHA-256 {sha256}" for who, sha256 in named.items()))
        self.locate(item, output[0])
        item.origins = [self._source(item)]
        return item

    def _source(self, corpus: Item) -> Item:
        params = self._record.params if self._record else self._project.lock.download
        pinned = params.get("download.sha256", "null").replace("null", "")
        item = Item("source", "addresses, tried in this order", pinned)
        if corpus.sha256 and pinned not in ("", corpus.sha256):
            item.problems.append("download.sha256 is not that of the corpus")
        for source in json.loads(params.get("download.sources", "[]")):
            item.places.append(place := Place("address", without_secrets(source), NOT_FETCHED))
            if LOCAL.fullmatch(source):
                corpus.compare(place, content_of(self._project.root / source))
        return item


def saved(run: Path | None) -> dict[str, str]:
    """SHA-256 of the small artifacts in a run folder by path in the workspace."""
    files = [path for stage in STAGES for _, path in (artifacts(run, stage) if run else ())]
    return {path.relative_to(run.parents[1]).as_posix(): sha256_file(path) for path in files if run}
