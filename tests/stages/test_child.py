"""Child processes: exit codes, messages, torchrun, and the death of dvc."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from stages.execution.child import status_of
from tests.support.common import ROOT, environment, wait_for
from tests.support.workspace import Workspace, ended

WORKER = """
import ctypes, os, signal, sys, time
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # dies with torchrun, as a rank does
if sys.argv[1] == "refuse":
    sys.stderr.write("gpt train: model.n_head: wrong\\n")  # as gpt/__main__.py does
    sys.exit(2)
if sys.argv[1].startswith("stop"):
    def stop(*_):
        time.sleep(1)  # saves its state
        sys.stderr.write("gpt train: stopped after step 3\\n")
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, stop)
    open(sys.argv[1] + os.environ["RANK"], "w").close()
    until = time.monotonic() + 90
    while not os.path.exists("finish") and time.monotonic() < until:
        time.sleep(0.1)
    sys.exit(0)
if os.environ["RANK"] == "0":
    time.sleep(60)
print("a traceback", file=sys.stderr, flush=True)
if sys.argv[1] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(9)
"""
RANK_1 = r"stages.train: rank 1 \(PID \d+\)"
END = r"after \d+ s; run again to continue; details in gpt_nano.log\n"


def test_failures_of_torchrun_workers(place: Workspace) -> None:
    """A worker's message and exit code are passed on; for a worker without a message the wrapper writes one line.

    Torchrun itself ends with 1 in all these cases.
    """
    (place.folder / "worker.py").write_text(WORKER)
    place.environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{place.folder}", "PET_NPROC_PER_NODE": "2"}
    names = ("--checkpoint", "w.pt", "--params", "params.yaml", "--tokens", "tokens")
    refused, failed, killed, stopped = (
        place.start("train", "torchrun", "-m", "worker", kind, *names, "-S", f"train.seed={seed}")
        for seed, kind in enumerate(("refuse", "fail", "die", "stop"))
    )
    assert ended(refused, 2) == "gpt train: model.n_head: wrong\n"
    assert re.fullmatch(f"a traceback\n{RANK_1} ended with exit code 9 {END}", ended(failed, 9))
    assert re.fullmatch(f"{RANK_1} was killed by SIGKILL {END}", ended(killed, 137))
    wait_for(lambda: len([*place.folder.glob("stop?")]) == 2)
    for pid in (stopped.pid, psutil.Process(stopped.pid).children()[0].pid) * 2:  # as Slurm and systemd do
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)  # equal signals that are pending count as one
    assert ended(stopped, 75) == "gpt train: stopped after step 3\nstages.train: stopped by SIGTERM\n"
    log = (place.folder / "gpt_nano.log").read_text()
    assert "exitcode  : 9 " in log
    assert "exitcode  : -9 " in log
    status = {run["params"]["train.seed"]: run["status"] for run in place.runs()}
    assert status == {"1": "FAILED", "2": "KILLED", "3": "KILLED"}


def test_a_closed_terminal_stops_the_training_except_under_nohup(place: Workspace) -> None:
    (place.folder / "worker.py").write_text(WORKER)
    place.environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{place.folder}", "PET_NPROC_PER_NODE": "2"}
    inputs = ("--checkpoint", "w.pt", "--params", "params.yaml", "--tokens", "tokens")
    names = (*inputs, "--metrics", "m", "--history", "h", "--validation", "v")
    stopped = place.start("train", "torchrun", "-m", "worker", "stop-", *names)
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited, as from nohup
    try:
        nohup = place.start("train", "torchrun", "-m", "worker", "stop+", *names, "-S", "train.seed=2")
    finally:
        signal.signal(signal.SIGHUP, previous)
    wait_for(lambda: len([*place.folder.glob("stop*")]) == 4)
    for wrapper in (stopped, nohup):
        for process in (psutil.Process(wrapper.pid), *psutil.Process(wrapper.pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # imports start short-lived processes
                process.send_signal(signal.SIGHUP)
    assert ended(stopped, 75) == "gpt train: stopped after step 3\nstages.train: stopped by SIGHUP\n"
    (place.folder / "finish").touch()
    assert ended(nohup) == ""
    assert {run["status"] for run in place.runs()} == {"KILLED", "FINISHED"}


@pytest.mark.parametrize(("rest", "starts"), [("; true", True), ("&", False)], ids=["dvc lives", "dvc is dead"])
def test_a_stage_does_not_start_after_the_death_of_dvc(tmp_path: Path, rest: str, starts: bool) -> None:
    stage = f"{sys.executable} -m stages.generate sh -c 'touch started' --checkpoint w.pt --out text.txt"
    (tmp_path / "dvc.yaml").write_text("stages: {generate: {cmd: x}}\n")
    variables = environment(DVC_STAGE="generate", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    shell = subprocess.Popen(
        ["sh", "-c", f"{stage} {rest}"], cwd=tmp_path, env=variables, start_new_session=True, stderr=subprocess.PIPE
    )
    shell.communicate(timeout=60)  # until the stage, too, has closed its end
    assert (tmp_path / "started").exists() == starts


WITHOUT_PRCTL = """
import sys
from pathlib import Path
from gpt.training import parent
from stages.execution import child
parent.LIBC = None
code = child.run(sys.argv[1:], [Path("log")], stage="train", mark="train")
sys.exit(code)
"""


def test_without_a_kernel_that_does_it_a_guard_ends_the_child_of_a_killed_wrapper(tmp_path: Path) -> None:
    line = [sys.executable, "-c", WITHOUT_PRCTL]
    done = subprocess.run([*line, "sh", "-c", "exit 3"], cwd=tmp_path, env=environment(), check=False)
    assert done.returncode == 3  # the guard, too, has ended
    wrapper = subprocess.Popen([*line, "sleep", "60"], cwd=tmp_path, env=environment())
    wait_for(lambda: len(psutil.Process(wrapper.pid).children()) == 2)
    children = psutil.Process(wrapper.pid).children()
    wrapper.kill()
    wrapper.wait()
    assert psutil.wait_procs(children, timeout=20)[1] == []


@pytest.mark.parametrize(("code", "status"), [(0, "FINISHED"), (1, "FAILED"), (2, "FAILED"), (75, "KILLED")])
def test_status_for_an_exit_code(code: int, status: str) -> None:
    assert status_of(code) == status


def test_status_for_a_signal() -> None:
    assert status_of(137) == status_of(143) == "KILLED"
