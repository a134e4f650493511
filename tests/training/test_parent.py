"""The end of a process when its parent is killed, by the kernel and where only a thread can notice it."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.common import environment, wait_for

CHILD = """
import signal, sys, time
from pathlib import Path
from gpt.training import parent
if sys.argv[1] == "thread":
    parent.LIBC = None
parent.end_with_parent(signal.SIGTERM)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(Path("told").touch()))
Path("ready").touch()
time.sleep(60)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, 'child.py', sys.argv[1]])"
BY = [pytest.param("kernel", marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux only")), "thread"]


@pytest.mark.parametrize("by", BY)
def test_a_process_gets_the_signal_when_its_parent_is_killed(by: str, tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, by], cwd=tmp_path, env=environment())
    wait_for((tmp_path / "ready").exists)
    (child,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    psutil.wait_procs([child], timeout=20)
    assert (tmp_path / "told").exists()
