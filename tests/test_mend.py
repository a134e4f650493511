"""dvc's list of locks after a SIGKILL of dvc."""

import fcntl
import os
import re
import signal
import socket
import subprocess
import time
from datetime import datetime
from pathlib import Path

import pytest

from stages.mend import GUARD, RWLOCK, at_work, mend
from tests.pipeline import dvc, wait_for


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC repository whose list of locks was cut off."""
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "--quiet"], check=True)
    dvc(tmp_path, "init", "--quiet")
    (tmp_path / "dvc.yaml").write_text("stages: {one: {cmd: touch out, outs: [out]}}\n")
    dvc(tmp_path, "repro")
    assert not mend()
    RWLOCK.write_text('{"read": {')
    return tmp_path


def test_dvc_works_again(workspace: Path) -> None:
    refused = subprocess.run(["dvc", "repro", "-f"], text=True, capture_output=True, check=False)
    assert "Unable to read RWLock-file" in refused.stderr
    assert mend()
    assert not mend()
    dvc(workspace, "repro", "-f")


def test_a_list_that_is_being_written_stays(workspace: Path) -> None:
    with GUARD.open("rb") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        assert not mend()
    assert RWLOCK.exists()


def test_whoever_is_at_work_is_named_with_host_and_time(workspace: Path) -> None:
    """dvc itself says nothing but the PID."""
    RWLOCK.write_text("{}")
    (workspace / "dvc.yaml").write_text("stages: {one: {cmd: 'touch begun && sleep 60', outs: [out]}}\n")
    assert at_work() == []
    first = subprocess.Popen(["dvc", "repro"], start_new_session=True)
    try:
        wait_for((workspace / "begun").exists)
        (line,) = at_work()
        found = re.fullmatch(r"at work here: dvc repro, PID (\d+) on (\S+) since (\S+ \S+); wait for it to end", line)
        assert found
        assert (int(found[1]), found[2]) == (first.pid, socket.gethostname())
        assert abs(datetime.fromisoformat(found[3]).timestamp() - time.time()) < 60
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert at_work() == []
