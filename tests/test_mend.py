"""dvc's list of locks after a SIGKILL of dvc."""

import fcntl
import subprocess
from pathlib import Path

import pytest

from stages.mend import GUARD, RWLOCK, mend
from tests.pipeline import dvc


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
