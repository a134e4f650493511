"""`python -m stages.lineage FILE|RUN|MODEL [--verify] [--json]`: print what a file, a run or a model was made of.

The subject is an output of the pipeline, also a copy of it elsewhere; a run's key or MLflow ID; or models:/NAME@ALIAS.
Exit codes: 0, 1 if --verify found a problem, 2 user error.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from os.path import relpath
from pathlib import Path

from gpt.core.errors import UserError, printable
from gpt.fast_import import fast_import
from stages.execution.command_line import Parser, enter
from stages.release.lineage_chain import Chain, saved
from stages.release.lineage_places import LOCK, PRESENT, VERIFIED, Content, Item, Place, Project, content_of
from stages.runs.publish import SQLITE, brief, connect, tracking_uri, without_credentials
from stages.runs.run_record import experiment_name, main_workspace

HEADER = re.compile(rb"checkpoint SHA-256 ([0-9a-f]{64})\ncorpus     SHA-256 ([0-9a-f]{64})\n")  # of a generated text


def main(arguments: Sequence[str]) -> int:
    """Print the chain; returns 1 if `--verify` found a problem. UserError: nothing is known about the subject."""
    parser = Parser("python -m stages.lineage", description=__doc__, allow_abbrev=False)
    parser.add_argument("subject", metavar="FILE|RUN|MODEL")
    parser.add_argument("--verify", action="store_true", help="read and compare every copy; exit 1 if one is wrong")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    item, absent = _traced(options.subject, verify=options.verify)
    items = [item]
    for each in items:
        items += each.origins
    problems = [problem for each in items for problem in each.all_problems()]
    if options.json:
        print(json.dumps({**asdict(item), "mlflow": absent or "available", "all_problems": problems}, indent=2))
    else:
        verified = sum(place.state == VERIFIED for each in items for place in each.places)
        result = [f"{verified} copies verified, {len(problems)} problem(s)", *problems] if options.verify else []
        lines = [*_tree(item, "", ""), "", *([f"MLflow was not searched: {absent}"] if absent else []), *result]
        print(*(printable(line).replace("\n", "\\n") for line in lines), sep="\n")
    return int(options.verify and bool(problems))


def _traced(subject: str, *, verify: bool) -> tuple[Item, str]:
    address = tracking_uri(root := main_workspace())
    absent = f"there is no store {without_credentials(address)}"
    if not address.startswith(SQLITE) or Path(address.removeprefix(SQLITE)).exists():  # connecting would create it
        try:
            tracking = fast_import("stages.tracking.lookup").Lookup(connect(root, experiment_name()))
            return _trace(Project(root, tracking, verify=verify), subject), ""
        except UserError:
            raise
        except Exception as error:  # of MLflow, requests, SQLAlchemy, the disk …
            absent = f"{without_credentials(address)}: {brief(error)}"
    return _trace(Project(root, None, verify=verify), subject), absent


def _trace(project: Project, subject: str) -> Item:
    """The chain of a path, a run (its key, at least six digits of it, or MLflow's ID) or a model's address."""
    if content := content_of(Path(subject)):
        return _trace_file(project, Path(subject), content)
    if re.fullmatch("[0-9a-f]{6,64}", subject) and (found := [r for r in project.runs if r.name.startswith(subject)]):
        return Chain(project, "", "", found[0]).trace()
    if project.tracking and re.fullmatch("models:/.+|[0-9a-f]{32}", subject):
        tracked = project.tracking.run_of(subject)
        return Chain(project, tracked.record.checkpoint, "", tracked=tracked).trace()
    raise UserError(f"{subject}: expected a file, a run or, in an MLflow store, a model, found none; correct the name")


def _trace_file(project: Project, path: Path, content: Content) -> Item:
    outputs = {md5: (stage, name) for (name, md5), stage in project.lock.outputs.items()}
    stage, name = outputs.get(content.md5, ("", path.name))
    if stage == "tokenize":
        item = Chain(project, "", "").tokens((name, content.md5))
    elif stage == "download":
        item = Chain(project, "", "").corpus((name, content.md5), {"the file": content.sha256})
    else:
        chain, corpus = _chain_of(project, path, content, stage)
        item = chain.trace(corpus)
        if content.sha256 != chain.checkpoint.sha256:
            kind = {".txt": "text", ".json": "metrics"}.get(path.suffix, "file")
            item = Item(kind, name, content.sha256, content.md5, origins=[item])
            chain.locate(item, name)
    if all((project.root / place.address).resolve() != path.resolve() for place in item.places):
        item.places.insert(0, Place("file", str(path), VERIFIED))
    if dict(project.lock.outputs.keys()).get(relpath(path, project.root), content.md5) != content.md5:
        item.problems.append(f"{LOCK} records another content at this path")
    return item


def _chain_of(project: Project, path: Path, content: Content, stage: str) -> tuple[Chain, str]:
    """The chain of the checkpoint that a file belongs to, and the SHA-256 of the corpus that the file names, if any."""
    if header := HEADER.match(path.read_bytes() if path.is_file() else b""):
        return Chain(project, header[1].decode(), ""), header[2].decode()
    if stage:
        md5 = project.lock.checkpoint[1] if stage == "train" else project.lock.read_by(stage, "train")[1]
        return Chain(project, "", md5), ""
    for run, record in project.runs.items():
        if content.sha256 in (record.checkpoint, *saved(run).values()):
            return Chain(project, record.checkpoint, "", run), ""
    if project.tracking and project.tracking.find(content.sha256):
        return Chain(project, content.sha256, content.md5), ""
    expected = f"expected an output of a known run, found unknown content (SHA-256 {content.sha256})"
    raise UserError(f"{path}: {expected}; check the path, or restore an output of {LOCK}: dvc checkout --force {path}")


def _tree(item: Item, first: str, rest: str) -> Iterator[str]:
    yield f"{first}{item.kind}  {item.name}"
    below = rest + ("│  " if item.origins else "   ")
    rows = [("SHA-256", item.sha256), ("MD5", item.md5)]
    rows += [("SHA-256", f"{sha256} {name}") for name, sha256 in sorted(item.files.items())]
    for place in item.places:
        notes = ": ".join(filter(None, [place.state.replace(PRESENT, ""), place.note]))
        rows.append((place.where, f"{place.address} ({notes})" if notes else place.address))
    for label, value in [*rows, *item.details.items(), *(("problem", problem) for problem in item.problems)]:
        if value:
            yield f"{below}{label:12} {value}"
    for origin in item.origins:
        yield below.rstrip()
        last = origin is item.origins[-1]
        yield from _tree(origin, f"{rest}{'└─' if last else '├─'} ", rest + ("   " if last else "│  "))


if __name__ == "__main__":
    enter("lineage", main)
