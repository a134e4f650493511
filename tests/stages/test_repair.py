"""`python -m stages.repair`: what a kill left broken makes the real dvc fail; after the repair it continues."""

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.repair import BROKEN, LOCK_FILE, REPOSITORY_LOCK, RWLOCK, RWLOCK_GUARD
from tests.support.common import ROOT, contents, environment

PIPELINE = """\
stages:
  one: {cmd: mkdir -p tokens && cp source tokens/a, deps: [source], outs: [tokens]}
  two: {cmd: cp tokens/a final, deps: [tokens], outs: [final]}
"""
OUTPUTS = ["tokens/a", "final", "dvc.lock"]


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, env=environment(), text=True, capture_output=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC repository with a pipeline that has run, and its dvc.lock committed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "source").write_text("s")
    (folder / "dvc.yaml").write_text(PIPELINE)
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "*.local"))
    script = "git init -q && dvc repro -q && git add . && git -c user.name=a -c user.email=a@b commit -qm a"
    subprocess.run(["sh", "-c", script], cwd=folder, env=environment(), check=True)
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working folder."""
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "project"))
    return Path.cwd()


def empty_entries() -> None:
    """As after a kill between the end of a stage and dvc's record of it."""
    LOCK_FILE.unlink()
    for result in Path(".dvc/cache/runs").glob("*/*/*"):
        result.unlink()


def uncommitted_and_empty() -> None:
    subprocess.run(["git", "update-ref", "-d", "HEAD"], check=True)
    LOCK_FILE.write_text("")


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda: RWLOCK.write_text('{"wri'), "deleted .dvc/tmp/rwlock"),
        (lambda: LOCK_FILE.write_text(LOCK_FILE.read_text()[:9]), "restored dvc.lock from git HEAD"),
        (uncommitted_and_empty, "deleted dvc.lock (git has none)"),
        (empty_entries, "an empty entry of the run cache"),
    ],
    ids=["rwlock", "dvc.lock", "no commit", "run cache"],
)
def test_after_a_repair_dvc_continues_with_the_same_results(
    project: Path, damage: Callable[[], object], line: str
) -> None:
    whole = contents(project, OUTPUTS)
    assert run("stages.repair").stdout == ""
    damage()
    force = ["--force"] if RWLOCK.exists() and RWLOCK.read_text().startswith('{"wri') else []
    assert run("dvc", "repro", *force).returncode
    assert line in run("stages.repair").stdout
    repro = run("dvc", "repro")
    assert repro.returncode == 0, repro.stderr
    assert contents(project, OUTPUTS) == whole
    assert run("stages.repair").stdout == ""


def test_merge_conflicts_are_left_to_the_user(project: Path) -> None:
    conflict = f"<<<<<<< HEAD\n{LOCK_FILE.read_text()}=======\n>>>>>>> other\n"
    LOCK_FILE.write_text(conflict)
    assert run("stages.repair").stdout == ""
    assert LOCK_FILE.read_text() == conflict
    assert not BROKEN.exists()


@pytest.mark.parametrize("lock", [REPOSITORY_LOCK, RWLOCK_GUARD])
def test_files_of_an_active_dvc_are_left_alone(project: Path, lock: Path) -> None:
    RWLOCK.write_text("")
    with lock.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert f"a dvc is active (it holds {lock})" in run("stages.repair").stdout
    assert RWLOCK.exists()
