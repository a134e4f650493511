"""dvc's list of who uses what, signed by the stages with where and since when."""

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from stages import lock_list
from stages.lock_list import GUARD, RWLOCK, at_work, sign, withdraw
from tests.support.common import environment, wait_for
from tests.support.project import dvc


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC repository in which a stage has run."""
    folder = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    dvc(folder, "init", "--quiet")
    (folder / "source").touch()
    (folder / "dvc.yaml").write_text("stages: {one: {cmd: cp source out, deps: [source], outs: [out]}}\n")
    dvc(folder, "repro")
    return folder


@pytest.fixture
def workspace(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, in a folder of its own."""
    shutil.copytree(repository, tmp_path / "workspace")
    monkeypatch.chdir(tmp_path / "workspace")
    return tmp_path / "workspace"


def repro(*more: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["dvc", "repro", *more], env=environment(), text=True, capture_output=True, check=False)


@contextmanager
def at_work_here(workspace: Path, command: str) -> Iterator["subprocess.Popen[str]"]:
    """A dvc whose second stage has begun; afterwards nothing of it is left."""
    (workspace / "dvc.yaml").write_text(
        "stages: {before: {cmd: cp source between, deps: [source], outs: [between]}, "
        f"one: {{cmd: '{command}', deps: [between], outs: [out]}}}}\n"
    )
    first = subprocess.Popen(
        ["dvc", "repro"], env=environment(), start_new_session=True, text=True, stderr=subprocess.PIPE
    )
    try:
        wait_for((workspace / "begun").exists)
        yield first
    finally:
        with suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
        first.communicate()


def test_whoever_is_at_work_is_named_with_host_and_time(workspace: Path) -> None:
    """By `make repro`, whatever the stage is."""
    with at_work_here(workspace, "touch begun && sleep 60") as first:
        (line,) = at_work()
        found = re.fullmatch(r"at work here: dvc repro, PID (\d+) on (\S+) since (\S+ \S+); wait for its end", line)
        assert found
        assert (int(found[1]), found[2]) == (first.pid, socket.gethostname())
        assert abs(datetime.fromisoformat(found[3]).timestamp() - time.time()) < 60
    assert at_work() == []


WAITS = """
import signal, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a step that takes long
Path("begun").touch()
while not Path("go").exists():
    time.sleep(0.05)
Path("out").touch()
"""


@contextmanager
def our_stage(workspace: Path) -> Iterator[tuple["subprocess.Popen[str]", psutil.Process]]:
    """A dvc with a stage of ours at work, and that stage's process."""
    (workspace / "waits.py").write_text(WAITS)
    with at_work_here(workspace, f"exec {sys.executable} -m stages.run {sys.executable} waits.py") as first:
        (stage,) = psutil.Process(first.pid).children()
        yield first, stage


@pytest.mark.parametrize(
    "options",
    [[], pytest.param(["--single-item", "one"], marks=pytest.mark.proof)],
    ids=["what it reads", "what it writes"],
)
def test_beside_a_stage_of_ours_dvc_itself_names_host_and_time(workspace: Path, options: list[str]) -> None:
    """Whichever the second meets; afterwards nothing of that is left in dvc's list."""
    with our_stage(workspace) as (first, stage):
        refused = repro(*options)
        assert refused.returncode != 0
        assert f"  (PID {first.pid}): " in refused.stderr
        where = rf"  \(PID {stage.pid}\): stage one of PID {first.pid}, on (\S+) since (\S+ \S+)"
        found = re.search(where, refused.stderr)
        assert found, refused.stderr
        assert found[1] == socket.gethostname()
        assert abs(datetime.fromisoformat(found[2]).timestamp() - time.time()) < 60
        (workspace / "go").touch()
        assert first.wait(30) == 0
        assert "one" not in RWLOCK.read_text()
    assert "didn't change" in repro().stdout


def test_what_the_dead_left_in_the_list_is_thrown_away(workspace: Path) -> None:
    """As many kills leave it; a long list takes dvc long to write."""
    with our_stage(workspace) as (first, _):
        first.kill()
        first.wait()
        (workspace / "go").touch()
        wait_for((workspace / "out").exists)
    assert f'"pid": {first.pid},' in RWLOCK.read_text()
    for name in ("begun", "go", "out"):
        (workspace / name).unlink()
    with our_stage(workspace) as (second, _):
        held = RWLOCK.read_text()
        assert f'"pid": {second.pid},' in held
        assert f'"pid": {first.pid},' not in held


@pytest.mark.proof
def test_a_stage_that_hangs_after_its_dvc_died_is_named_too(workspace: Path) -> None:
    with our_stage(workspace) as (first, stage):
        stage.suspend()
        first.kill()
        first.wait()
        who = f"(PID {stage.pid}): stage one of PID {first.pid}, on {socket.gethostname()} since "
        assert who in repro().stderr
        stage.kill()
        stage.wait()
        (workspace / "go").touch()
        again = repro()
        assert again.returncode == 0, again.stderr
        assert f"PID {stage.pid} was killed; taken out" in again.stderr


def test_a_stage_whose_dvc_died_steps_back_at_once(workspace: Path) -> None:
    """Whoever comes next then waits for it, in words of ours, instead of being refused."""
    with our_stage(workspace) as (first, stage):
        first.kill()
        wait_for(lambda: str(stage.pid) not in RWLOCK.read_text(), seconds=5)
        assert stage.is_running()


@pytest.mark.usefixtures("workspace")
def test_a_list_that_nobody_can_change_stops_no_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_list, "GUARD_S", 0.1)
    RWLOCK.write_text("[]")
    sign("one")
    withdraw()
    assert RWLOCK.read_text() == "[]"
    with GUARD.open("rb") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        sign("one")
    GUARD.unlink()
    sign("one")
