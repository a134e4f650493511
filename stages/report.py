"""`python -m stages.report BASE [HEAD] --out FOLDER`: run a preset on two commits and compare the results.

Writes `report.md` (metrics, parameters, loss curves as Mermaid charts, which GitHub renders) and DVC's plots as HTML.
Runs in a clone of this repository with its own MLflow store: the workspace stays as it is.
"""

import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from gpt.core.errors import UserError
from stages.execution.command_line import Parser, enter
from stages.runs.run_record import main_workspace

CHECKPOINT = "chargpt_nano.pt"
CURVES = (("plots/history.csv", "train/loss"), ("plots/validation.csv", "val/loss"))
COLORS = ("#8c8c8c", "#d62728")  # of base and head
Curve = dict[int, float]  # value by step


@dataclass(frozen=True)
class Result:
    """A commit, the commit with the results of the preset on top of it, and what these results are."""

    commit: str
    with_results: str
    model: str  # DVC's hash of the checkpoint
    curves: list[Curve]


def main(arguments: Sequence[str]) -> int:
    """Compare two commits; returns 0.

    Raises:
        UserError: a revision is unknown, or the pipeline failed.
    """
    parser = Parser("python -m stages.report", description=__doc__)
    parser.add_argument("base", help="revision to compare with, such as main")
    parser.add_argument("head", nargs="?", default="HEAD", help="revision to compare; uncommitted changes are ignored")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--preset", default="presets/smoke.yaml", help="params file in the repository")
    options = parser.parse_args(arguments)
    root, out = main_workspace(), options.out.resolve()
    commits = [_commit(root, revision) for revision in (options.base, options.head)]
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        _git(root, "clone", "--quiet", "--shared", "--no-checkout", str(root), str(clone))
        base, head = (_run_preset(clone, commit, options.preset) for commit in commits)
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.md").write_text(_report(clone, base, head, options.preset), encoding="utf-8")
        _dvc(clone, "plots", "diff", base.with_results, head.with_results, "--out", str(out / "plots"))
    print(f"stages.report: wrote {out}/report.md and {out}/plots/index.html")
    return 0


def _commit(root: Path, revision: str) -> str:
    """The SHA of a revision."""
    try:
        return _git(root, "rev-parse", "--quiet", "--verify", f"{revision}^{{commit}}").strip()
    except UserError:
        remedy = "in a shallow clone, run git fetch --unshallow"
        raise UserError(f"{revision}: expected a revision of this repository, found none; {remedy}") from None


def _run_preset(clone: Path, commit: str, preset: str) -> Result:
    """Check out a commit, run the pipeline with the preset, commit the results."""
    _git(clone, "checkout", "--quiet", "--detach", commit)
    (clone / "params.yaml").write_text(_git(clone, "show", f"{commit}:{preset}"), encoding="utf-8")
    print(f"stages.report: {preset} on {commit[:7]}", file=sys.stderr, flush=True)
    _dvc(clone, "repro", capture=False)
    author = ("-c", "user.name=stages.report", "-c", "user.email=stages@report.invalid", "-c", "commit.gpgSign=false")
    _git(clone, "add", "--all")  # dvc.lock may be new
    _git(clone, *author, "commit", "--quiet", "--allow-empty", "--message", f"{preset} on {commit}")
    train = YAML(typ="safe").load(clone / "dvc.lock")["stages"]["train"]
    (model,) = (out["md5"] for out in train["outs"] if out["path"] == CHECKPOINT)
    curves = [_read_curve(clone / file, column) for file, column in CURVES]
    return Result(commit, _git(clone, "rev-parse", "HEAD").strip(), model, curves)


def _read_curve(path: Path, column: str) -> Curve:
    with path.open(encoding="utf-8", newline="") as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row[column]}


def _report(clone: Path, base: Result, head: Result, preset: str) -> str:
    """The comparison in Markdown."""
    same = "the same, bit for bit" if base.model == head.model else "another one"
    parts = [
        f"## Pipeline: `{base.commit[:7]}` → `{head.commit[:7]}`",
        f"Trained with `{preset}` on both commits. The trained model is {same}.",
    ]
    results, sources = (base.with_results, head.with_results), (base.commit, head.commit)
    for what, revisions, title in (
        ("metrics", results, "Metrics"),
        ("params", sources, "Parameters in `params.yaml`"),
        ("params", results, f"Parameters in `{preset}`"),
    ):
        parts.append(f"### {title}\n\n{_diff(clone, what, *revisions) or 'No difference.'}")
    parts.append("### Loss\n\nGray: base, red: head; in nats per token.")
    for (_, column), *curves in zip(CURVES, base.curves, head.curves, strict=True):
        parts.append(_chart(column, curves))
    return "\n\n".join(parts) + "\n"


def _diff(clone: Path, what: str, base: str, head: str) -> str:
    """DVC's table of differences in `metrics` or `params`; empty if there are none."""
    table = _dvc(clone, what, "diff", "--md", base, head).strip().replace(base, "base").replace(head, "head")
    return table if table.count("\n") > 1 else ""


def _chart(title: str, curves: Sequence[Curve]) -> str:
    """A Mermaid chart of curves, at the steps that all of them have."""
    steps = sorted(set[int].intersection(*map(set, curves)))
    palette = f'{{"xyChart": {{"plotColorPalette": "{", ".join(COLORS)}"}}}}'
    lines = [f"line [{', '.join(f'{curve[step]:.4f}' for step in steps)}]" for curve in curves]
    head = [f'%%{{init: {{"themeVariables": {palette}}}}}%%', "xychart-beta", f'title "{title}"']
    return "\n".join(["```mermaid", *head, f'x-axis "step" {steps}', *lines, "```"])


def _git(folder: Path, *arguments: str) -> str:
    return _output(["git", *arguments], folder)


def _dvc(folder: Path, *arguments: str, capture: bool = True) -> str:
    return _output([sys.executable, "-m", "dvc", *arguments], folder, capture=capture)


def _output(command: Sequence[str], folder: Path, *, capture: bool = True) -> str:
    """Run a command in a folder; returns its stdout, which goes to our stderr unless it is captured.

    Raises:
        UserError: it failed.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"MLFLOW_TRACKING_URI": "", "DVC_NO_ANALYTICS": "1", "PYTHONPATH": "", "PATH": path}
    stdout, stderr = (subprocess.PIPE, subprocess.PIPE) if capture else (sys.stderr, None)
    done = subprocess.run(
        command, cwd=folder, env=os.environ | own, text=True, check=False, stdout=stdout, stderr=stderr
    )
    if done.returncode:
        reason = (done.stderr or "").strip().replace("\n", " ") or "see the output above"
        raise UserError(f"{' '.join(command)}: expected success, found exit code {done.returncode}; {reason}")
    return str(done.stdout or "")


if __name__ == "__main__":
    enter("report", main)
