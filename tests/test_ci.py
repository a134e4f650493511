"""The files for GitHub and for commits: workflows are valid, safe and pinned; hooks refuse what the checks refuse."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from stages.report import _chart
from tests.support.common import ROOT, environment, only_line, read_yaml, run
from tests.support.project import clone

TOOLS = Path(sys.executable).parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
CHECKOUT = r"actions/checkout@[0-9a-f]{40}  # v[\d.]+"
BROKEN = {  # an edit of pipeline.yml, and the tool that refuses it
    "an action without a commit": (CHECKOUT, "actions/checkout@v7", "zizmor"),
    "a text of the user in a script": (r"\"\$BASE\"", "${{ github.event.pull_request.title }}", "zizmor"),
    "a trigger with secrets": ("pull_request:", "pull_request_target:", "zizmor"),
    "credentials left in .git": ("persist-credentials: false", "clean: true", "zizmor"),
    "an unknown value": ("github.event.pull_request.base.sha", "github.evnt.pull_request.base.sha", "actionlint"),
    "an unknown key": ("timeout-minutes", "timeout-minute", "actionlint"),
}


def check(tool: str, *files: Path) -> "subprocess.CompletedProcess[str]":
    options = {"zizmor": ["--offline", "--quiet"], "actionlint": ["-shellcheck=", "-pyflakes="]}[tool]
    return run([TOOLS / tool, *options, *files], ROOT, code=None)


@pytest.mark.parametrize("tool", ["zizmor", "actionlint"])
def test_the_workflows_are_accepted(tool: str) -> None:
    more = [ROOT / ".github/dependabot.yml"] if tool == "zizmor" else []
    done = check(tool, *WORKFLOWS, *more)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("fault", BROKEN)
def test_a_faulty_workflow_is_refused(fault: str, tmp_path: Path) -> None:
    pattern, replacement, tool = BROKEN[fault]
    text, count = re.subn(pattern, replacement, (ROOT / ".github/workflows/pipeline.yml").read_text())
    assert count
    broken = tmp_path / "broken.yml"
    broken.write_text(text)
    assert check(tool, broken).returncode != 0


def test_every_action_is_pinned_to_one_commit_with_its_version() -> None:
    pins: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for line in re.findall(r"uses: (.+)", path.read_text()):
            found = re.fullmatch(r"([\w.-]+/[\w./-]+)@([0-9a-f]{40})  # v\d+\.\d+\.\d+", line)
            assert found, f"{path.name}: {line}"
            pins.setdefault(found[1], set()).add(line)
    assert pins
    assert {name: lines for name, lines in pins.items() if len(lines) > 1} == {}


def test_workflows_may_write_only_what_they_have_to() -> None:
    """By default nothing; only the jobs that run no code of a pull request may write."""
    writing = {}
    for path in WORKFLOWS:
        workflow = read_yaml(path)
        assert workflow["permissions"] == {}
        for name, job in workflow["jobs"].items():
            assert job["timeout-minutes"] <= 60
            granted = {scope for scope, access in job["permissions"].items() if access == "write"}
            if granted:
                assert not any("checkout" in step.get("uses", "") for step in job["steps"])
                writing[f"{path.stem}/{name}"] = granted
    assert writing == {"comment/comment": {"pull-requests"}, "release/publish": {"contents"}}


def test_the_tests_run_from_the_oldest_python_on() -> None:
    matrix = read_yaml(ROOT / ".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert oldest == f">={matrix['python'][0]}"
    assert matrix["python"] == ["3.11", "3.12", "3.13", "3.14"]


def test_the_hooks_refuse_a_commit_with_faults(tmp_path: Path, corpus: Path) -> None:
    project = clone(tmp_path / "project", corpus)
    (project / "gpt/fault.py").write_text("import os\n")
    (project / "params.yaml").write_text("model: {}\n")
    shutil.copy(project / "presets/smoke.yaml", project / "presets/other.yaml")
    run(["git", "add", "--all"], project)
    variables = environment(PRE_COMMIT_HOME=str(tmp_path / "home"), PYTHONPATH="", SKIP="lint-imports")
    done = run([TOOLS / "pre-commit", "run", "--color=never"], project, code=1, env=variables)
    results = dict(re.findall(r"^([\w -]+?)\.{3,}.*?(Passed|Failed|Skipped)$", done.stdout, re.MULTILINE))
    failed = {name for name, result in results.items() if result == "Failed"}
    assert failed == {"ruff check", "check-params"}, done.stdout
    assert results["ruff format"] == "Passed"


def test_the_loss_chart_shows_the_common_steps() -> None:
    chart = _chart("val/loss", [{20: 3.0, 40: 2.5, 60: 2.0}, {20: 3.0, 60: 1.23456}])
    assert 'x-axis "step" [20, 60]\nline [3.0000, 2.0000]\nline [3.0000, 1.2346]\n' in chart


@pytest.mark.proof
def test_the_report_of_a_pull_request(tmp_path: Path, corpus: Path) -> None:
    """A parameter that the commit changes, the metrics that follow, and a workspace that stays as it was."""
    project = clone(tmp_path / "project", corpus)
    shutil.copy(project / "params.yaml", project / "presets/tiny.yaml")
    for seed in (1, 2):
        params = (project / "presets/tiny.yaml").read_text()
        (project / "presets/tiny.yaml").write_text(re.sub(r"(?<=seed: )\d+", str(seed), params))
        run(["git", "add", "--all"], project)
        run(["git", "commit", "--quiet", "--message", f"seed {seed}"], project)
    report = [sys.executable, "-m", "stages.report", "--preset", "presets/tiny.yaml", "--out"]
    run([*report, "out", "HEAD~1"], project, env=environment(PYTHONPATH=""))
    text = (project / "out/report.md").read_text()
    assert "The trained model is another one." in text
    assert re.search(r"\| params.yaml +\| train.seed +\| 1 +\| 2 +\|", text)
    assert re.search(r"\| val/best_loss +\|", text)
    assert "### Parameters in `params.yaml`\n\nNo difference." in text
    assert text.count("```mermaid") == 2
    assert "train/loss" in (project / "out/plots/index.html").read_text()
    assert run(["git", "status", "--short"], project).stdout == "?? out/\n"
    run([*report, "same", "HEAD"], project, env=environment(PYTHONPATH=""))
    assert "The trained model is the same, bit for bit." in (project / "same/report.md").read_text()
    assert "nowhere" in only_line(run([*report, "x", "nowhere"], project, code=2).stderr)
