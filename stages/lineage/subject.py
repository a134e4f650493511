"""What the user names on the command line: a file, a run or a model, and its chain."""

import re
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from gpt.core.errors import UserError
from stages.lineage.chain import Chains
from stages.lineage.items import Content, Item, Place, content_of
from stages.lineage.run_items import Training, run_item

if TYPE_CHECKING:
    from stages.tracking.lookup import FoundModel, FoundRun, Lookup

HEADER = re.compile(rb"checkpoint SHA-256 ([0-9a-f]{64})\ncorpus     SHA-256 ([0-9a-f]{64})\n")  # of a generated text
SHORTEST_KEY = 6  # digits of a run key
RUN_ID = re.compile(r"(runs:/)?[0-9a-f]{32}")


def trace(chains: Chains, subject: str) -> Item:
    """The chain of a path, a run (its key, at least six digits of it, or MLflow's id) or a model's address.

    Raises:
        UserError: there is no such thing, or nothing is known about its content.

    """
    if subject.startswith("models:/"):
        return _of_model(chains, _mlflow(chains, subject).model(subject))
    if content := content_of(Path(subject)):
        return _of_given(chains, content)
    runs = [each for each in chains.evidence.runs if each[0].name.startswith(subject)]
    if len(subject) >= SHORTEST_KEY and len(runs) == 1:
        folder, record = runs[0]
        if record.checkpoint:
            return chains.checkpoint(record.checkpoint, record.checkpoint_md5)
        return run_item(Training(folder, record), chains.evidence, chains.finder)
    if RUN_ID.fullmatch(subject):
        return _of_run(chains, _mlflow(chains, subject).run(subject.removeprefix("runs:/")))
    expected = "expected a file, a run's key or MLflow id, or models:/NAME@ALIAS"
    raise UserError(f"{subject}: {expected}, found {len(runs) or 'none'} of that name; correct it")


def _mlflow(chains: Chains, subject: str) -> "Lookup":
    if not chains.tracking:
        raise UserError(f"{subject}: expected an MLflow store, found none: {chains.absent}; set MLFLOW_TRACKING_URI")
    return chains.tracking


def _of_run(chains: Chains, run: "FoundRun") -> Item:
    if run.checkpoint:
        return chains.checkpoint(run.checkpoint, "")
    return run_item(Training(runs=[run]), chains.evidence, chains.finder)


def _of_model(chains: Chains, model: "FoundModel") -> Item:
    """The chain of a registered or logged model, by the SHA-256 of its run's checkpoint or else of its own."""
    item, tracking = Item("model", model.label, places=[Place("MLflow", model.address)]), _mlflow(chains, model.address)
    if model.run_id:
        item.origins = [_of_run(chains, tracking.run(model.run_id))]
        return item
    for address in (address for address in model.files if address.endswith(".pt")):
        with TemporaryDirectory() as folder:
            if found := content_of(tracking.download(address, Path(folder))):
                item.origins.append(chains.checkpoint(found.sha256, found.md5))
    return item


def _of_given(chains: Chains, content: Content) -> Item:
    """The chain of a file or folder, with the given copy as one of its places."""
    item, recorded = _of_content(chains, content), _recorded(chains, content)
    root, here = chains.evidence.root, content.path.resolve()
    if all((root / place.address).resolve() != here for place in item.places):
        item.places.insert(0, Place("file", str(content.path)))
    if recorded and recorded[1] != content.md5:
        item.problems.append(f"dvc.lock records other content for {recorded[0]}: MD5 {recorded[1]}")
    item.learn(content)
    return item


def _of_content(chains: Chains, content: Content) -> Item:
    output = chains.evidence.producer(content.md5)
    trained = output.lock.checkpoint if output else None
    if chains.evidence.run_of(content.sha256, content.md5) or (output and output == trained):
        return chains.checkpoint(content.sha256, content.md5)
    if output and output.stage == "tokenize":
        return chains.tokens(Training(output=output), output, {})
    if output and output.stage == "download":
        return chains.corpus(Training(output=output), output, {"its content": content.sha256})
    sha256, corpus = _header(content.path)
    kept = (each for each in chains.evidence.artifacts(content.sha256) if sha256 in ("", each[1].checkpoint))
    if output:
        name, md5 = output.path, trained.md5 if trained else ""
    elif found := next(kept, None):
        name, sha256, md5 = found[3], found[1].checkpoint, found[1].checkpoint_md5
    elif sha256:
        name, md5 = content.path.name, ""
    else:
        return _of_unrecorded(chains, content)
    return chains.derived(content, name, chains.checkpoint(sha256, md5, corpus))


def _of_unrecorded(chains: Chains, content: Content) -> Item:
    """The chain of a checkpoint without run folder and dvc.lock.

    Raises:
        UserError: it is no checkpoint, or a damaged one.

    """
    from gpt.model.checkpoint import TRAILER, load_checkpoint  # noqa: PLC0415 (imports torch)

    if content.path.is_file() and TRAILER in content.path.read_bytes()[-len(TRAILER) - 65 :]:
        load_checkpoint(content.path)  # raises if it is damaged
        return chains.checkpoint(content.sha256, content.md5, given=content)
    remedy = "check the path"
    if recorded := _recorded(chains, content):
        remedy = f"dvc.lock records MD5 {recorded[1]}; to restore that: dvc checkout --force {shlex.quote(recorded[0])}"
    found = f"SHA-256 {content.sha256}" if content.sha256 else f"MD5 {content.md5}"
    raise UserError(f"{content.path}: expected an output of a known run, found unknown content ({found}); {remedy}")


def _recorded(chains: Chains, content: Content) -> tuple[str, str] | None:
    """The path and MD5 that the workspace's dvc.lock has for the path of a content."""
    lock, root, path = chains.evidence.workspace, chains.evidence.root.resolve(), content.path.resolve()
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else ""
    return (name, md5) if lock and (md5 := lock.md5_at(name)) else None


def _header(path: Path) -> tuple[str, str]:
    """SHA-256 of checkpoint and corpus that a generated text names; empty for other files."""
    if not path.is_file():
        return "", ""
    with path.open("rb") as file:
        match = HEADER.match(file.read(200))
    return (match[1].decode(), match[2].decode()) if match else ("", "")
