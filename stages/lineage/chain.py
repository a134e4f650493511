"""Chains from a text, a checkpoint, tokens or a corpus to its origins."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from gpt.core.errors import UserError
from gpt.core.files import read_json
from stages.lineage.evidence import LOCK, Evidence, Output
from stages.lineage.items import MISSING, VERIFIED, Content, Item, Place, content_of
from stages.lineage.places import Finder
from stages.lineage.run_items import Training, run_item, source_item
from stages.run_record import flatten

if TYPE_CHECKING:
    from stages.tracking.lookup import FoundRun, Lookup

KINDS = {".txt": "text", ".json": "metrics", ".csv": "plot data", ".png": "plot", ".log": "log", ".yaml": "params"}
NOWHERE = "found in none of the places that were searched"


class Chains:
    """Builds chains. Each link is found by a hash: in a dvc.lock, a run's record, the file itself or MLflow's tags."""

    def __init__(self, evidence: Evidence, tracking: "Lookup | None", *, verify: bool, absent: str = "") -> None:
        """Search DVC's storage, too.

        Args:
            tracking: the tracking store, if it can be used.
            verify: whether to read every copy.
            absent: why there is no tracking store.

        """
        self.absent = absent
        self.evidence, self.tracking, self._verify = evidence, tracking, verify
        self.finder = Finder(evidence, tracking, verify=verify)
        self._runs: Sequence[FoundRun] = ()  # of the checkpoint of the chain

    def derived(self, content: Content, name: str, checkpoint: Item) -> Item:
        """A file that was made of, or together with, a checkpoint."""
        item = Item(KINDS.get(Path(name).suffix, "file"), name, content.sha256, content.md5, origins=[checkpoint])
        output = self.evidence.producer(content.md5)
        self.finder.locate(item, [output.path] if output else [])
        self.finder.locate_in_git(item, "HEAD", output.path if output else "")
        for folder, _, stage, kept in self.evidence.artifacts(content.sha256):
            address = f".runs/{folder.name}/row/{stage}/{kept}"
            item.places.append(Place("run folder", address, VERIFIED))
        for run in self._runs:
            self.finder.locate_tracked(item, run.files, named_by_hash=False)
        if not item.places:
            item.details["recorded"] = "nowhere: only the text itself names its checkpoint"
        return item

    def checkpoint(self, sha256: str, md5: str, corpus: str = "", given: Content | None = None) -> Item:
        """A checkpoint by one or both of its hashes, and the training that made it.

        Args:
            corpus: SHA-256 of the corpus, if a text names it.
            given: a copy that the user named.

        """
        item = Item("checkpoint", "unknown", sha256, md5, content=given)
        known = self._recorded(item)
        lock = self.evidence.workspace
        expected = [known.output, lock.checkpoint if lock else None]
        paths = [out.path for out in expected if out] + ([known.record.checkpoint_file] if known.record else [])
        self.finder.locate(item, paths)
        training = self._tracked(item, self._recorded(item))  # with both hashes, if there is a copy
        item.name = paths[0] if paths else given.path.name if given else item.name
        self._locate_in_mlflow(item, training)
        if not item.places and not given:
            item.problems.append(NOWHERE)
        dataset = training.record.dataset if training.record else {}
        claims = {"the text": corpus, "the run's record": dataset.get("corpus_sha256", "")}
        if item.content and (self._verify or not training.record):
            claims["the checkpoint"] = self._read_metadata(item, training)
        trained = run_item(training, self.evidence, self.finder)
        tokens = self.tokens(training, next((out for out in training.inputs if out.stage == "tokenize"), None), claims)
        item.origins, trained.origins = [trained], [*trained.origins, tokens]
        self._runs = training.runs
        return item

    def _locate_in_mlflow(self, item: Item, training: Training) -> None:
        """Add the copies of a checkpoint in its runs and models; one that `stages.sync` can complete has one."""
        name = Path(item.name).name
        for run in training.runs:
            self.finder.locate_tracked(item, run.files, named_by_hash=run.checkpoint == item.sha256)
            if training.folder and run.checkpoint and not any(Path(address).name == name for address in run.files):
                remedy = "upload it: python -m stages.sync"
                item.places.append(Place("MLflow", f"runs:/{run.id}/{name}", MISSING, remedy))
        for model in training.models:
            self.finder.locate_tracked(item, model.files, named_by_hash=True)

    def _recorded(self, item: Item) -> Training:
        """What run folders and dvc.lock know of a checkpoint; completes its hashes."""
        folder, record = self.evidence.run_of(item.sha256, item.md5) or (None, None)
        if record:
            item.sha256, item.md5 = item.sha256 or record.checkpoint, item.md5 or record.checkpoint_md5
        return Training(folder, record, output=self.evidence.producer(item.md5))

    def _tracked(self, item: Item, training: Training) -> Training:
        """The same with what MLflow knows, which may have the dvc.lock."""
        if not self.tracking:
            return training
        runs = self.tracking.runs(item.sha256, training.folder.name if training.folder else "")
        output = training.output
        saved = (address for run in runs for address in run.files if address.endswith(f"/{LOCK}"))
        for address in saved if not output else ():
            with TemporaryDirectory() as folder:
                text = self.tracking.download(address, Path(folder)).read_text(encoding="utf-8", errors="replace")
            self.evidence.add(f"{LOCK} in MLflow, {address}", text)
            output = self.evidence.producer(item.md5)
        models = [model for run in runs for model in self.tracking.models_of(run.id)]
        return replace(training, runs=runs, models=models, output=output)

    def _read_metadata(self, item: Item, training: Training) -> str:
        """Compare a checkpoint's own metadata with the run's record; returns the SHA-256 of the corpus in it."""
        from gpt.model.checkpoint import load_checkpoint  # noqa: PLC0415 (imports torch)

        assert item.content
        try:
            checkpoint = load_checkpoint(item.content.path)
        except UserError as error:
            item.problems.append(str(error))
            return ""
        about = checkpoint.about
        if training.record:
            sections = {"model": checkpoint.model.model_dump(), "train": about.get("train") or {}}
            found, recorded = flatten(sections, ("model", "train")), training.record.params
            if wrong := [key for key in found if key in recorded and not _equal(found[key], recorded[key])]:
                item.problems.append(f"its metadata and the run's record differ in {', '.join(wrong)}")
        else:
            item.details["trained to"] = f"step {about.get('step')}, validation loss {about.get('val_loss')}"
        return str(about["corpus_sha256"])

    def tokens(self, training: Training, output: Output | None, claims: dict[str, str]) -> Item:
        """The tokens that a training read.

        Args:
            output: as the dvc.lock of the training names them.
            claims: SHA-256 of the corpus by who names it.

        """
        item = Item("tokens", output.path if output else "unknown", md5=output.md5 if output else "")
        meta = training.record.dataset if training.record else {}
        if output:
            self.finder.locate(item, [output.path])
            if item.content:
                meta = _meta(item.content)
                claims = {**claims, "meta.json of the tokens": meta.get("corpus_sha256", "")}
            if not item.places:
                item.problems.append(NOWHERE)
        else:
            self._find_tokens_by_meta(item, meta)
        if "train_tokens" in meta:
            counts = f"{meta['train_tokens']:,} training tokens, {meta.get('val_tokens', 0):,} validation tokens"
            item.details["content"] = f"{counts}, {meta.get('vocab_size')} symbols ({meta.get('kind')})"
        written = self.evidence.producer(item.md5) or output
        corpus = next((out for out in written.inputs if out.stage == "download"), None) if written else None
        item.origins = [self.corpus(training, corpus, claims)]
        return item

    def _find_tokens_by_meta(self, item: Item, meta: Mapping[str, object]) -> None:
        """Find the tokens of a training that no dvc.lock has by their metadata, which names the corpus by SHA-256."""
        lock = self.evidence.workspace
        for path in (out.path for out in lock.outputs() if out.stage == "tokenize") if lock and meta else ():
            found = content_of(self.evidence.root / path)
            if found and _meta(found) == meta:
                item.name, item.details["found by"] = path, "meta.json, equal to that in the run's record"
                item.md5 = found.md5
                self.finder.locate(item, [path])
                return
        item.problems.append("no dvc.lock names the tokens of this checkpoint")

    def corpus(self, training: Training, output: Output | None, claims: Mapping[str, str]) -> Item:
        """The text that the tokens were made of."""
        named = {origin: sha256 for origin, sha256 in claims.items() if sha256}
        sha256 = next(iter(named.values()), "")
        item = Item("corpus", output.path if output else "unknown", sha256, output.md5 if output else "")
        lock = self.evidence.workspace
        here = [out.path for out in lock.outputs() if out.stage == "download"] if lock else []
        if sha256 or item.md5:
            self.finder.locate(item, [*([output.path] if output else []), *here])
        if wrong := [f"{origin} names SHA-256 {other}" for origin, other in named.items() if other != sha256]:
            item.problems.append(f"{next(iter(named))} names SHA-256 {sha256}, but {', '.join(wrong)}")
        elif not item.places:
            item.problems.append(NOWHERE)
        source = training if training.output else replace(training, output=output)
        item.origins = [source_item(source, self.evidence, item)]
        return item


def _meta(tokens: Content) -> dict[str, Any]:
    """The metadata in a folder of tokens; empty if there is none."""
    file = tokens.files.get("meta.json")
    with suppress(UserError):
        found = read_json(file.path) if file else {}
        return found if isinstance(found, dict) else {}
    return {}


def _equal(one: str, other: str) -> bool:
    """Whether two values of params are equal; 0 and 0.0 are."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:  # plain text
        return one == other
