"""What a SIGKILL of dvc leaves of its own notes: the next dvc, typed by hand, mends it and goes on."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc.utils.serialize import parse_yaml

from stages import mend
from stages.lock_list import GUARD, RWLOCK
from stages.mend import LAST_WHOLE, LOCK_FILE, REPOSITORY_LOCK, RUN_CACHE, SET_ASIDE
from tests.support.common import ROOT, environment, wait_for
from tests.support.project import command, dvc

PIPELINE = """\
stages:
  one:
    cmd: mkdir -p tokens metrics && cp source tokens/a && cp params.yaml tokens/b && cp note metrics/one.json
    deps: [source]
    params: [one]
    outs: [tokens]
    metrics:
    - metrics/one.json: {cache: false}
  two:
    cmd: cp tokens/a final
    deps: [tokens]
    outs: [final]
"""
OUTPUTS = ["tokens/a", "tokens/b", "metrics/one.json", "final", "dvc.lock"]
LONG_AGO = -1_000_000  # seconds from now
WITHOUT_HOOK = [sys.executable, "-c", "import sys; from dvc.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC repository with all that our pipeline has, in which nothing has run."""
    folder = tmp_path_factory.mktemp("beginning")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    dvc(folder, "init", "--quiet")
    shutil.copy(ROOT / ".dvc" / "config", folder / ".dvc")  # else dvc leaves processes behind that call home
    for name, text in {"source": "s", "note": "{}", "params.yaml": "one: {x: 1}\n", "dvc.yaml": PIPELINE}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def finished(beginning: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, in which everything has run."""
    folder = shutil.copytree(beginning, tmp_path_factory.mktemp("finished") / "project")
    dvc(folder, "repro")
    dvc(folder, "status")  # the first that sees the finished dvc.lock
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished one in a folder of its own, which is the working folder."""
    folder = shutil.copytree(finished, tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() if (path := folder / name).exists() else b"" for name in OUTPUTS}


def repro(program: list[str], *more: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*program, "repro", *more], env=environment(), text=True, capture_output=True, check=False)


def cut_list() -> None:
    RWLOCK.write_text("")


def leave_no_result() -> None:
    """As dvc leaves it when it is killed between a stage's end and its own note of it."""
    LOCK_FILE.unlink()
    for note in RUN_CACHE.glob("*/*/*"):
        note.unlink()


def cut_lock(end: bytes) -> Callable[[], None]:
    def cut() -> None:
        text = LOCK_FILE.read_bytes()
        LOCK_FILE.write_bytes(text[: text.index(end) + len(end)])

    return cut


WHAT = "a killed dvc left it "
HALF = f"dvc.lock: {WHAT}half written; as it was before again"
INVALID = "'./dvc.lock' validation failed"


@pytest.mark.parametrize(
    ("damage", "refusal", "said"),
    [
        pytest.param(cut_list, "Unable to read RWLock", WHAT + "half written; deleted", id="list of locks"),
        pytest.param(leave_no_result, "join() argument must", WHAT + "empty; deleted", id="no result"),
        pytest.param(cut_lock(b""), INVALID, HALF, id="empty lock file"),
        pytest.param(cut_lock(b"schema: '2"), "is invalid", HALF, id="its first line", marks=pytest.mark.proof),
        pytest.param(cut_lock(b"  two:\n"), INVALID, HALF, id="no value", marks=pytest.mark.proof),
        pytest.param(cut_lock(b"    cmd: cp tok"), "", HALF, id="within a line", marks=pytest.mark.proof),
        pytest.param(cut_lock(b"    cmd: cp tokens/a final\n"), "", "", id="sound", marks=pytest.mark.proof),
    ],
)
def test_a_dvc_typed_by_hand_mends_and_goes_on(
    project: Path, damage: Callable[[], None], refusal: str, said: str
) -> None:
    """Without the hook it refuses for good; some cuts it can read, though not what stood behind them."""
    whole = contents(project)
    damage()
    if refusal:
        refused = repro(WITHOUT_HOOK, "--force" if damage is cut_list else "two")
        assert refused.returncode
        assert refusal in refused.stderr + refused.stdout
    done = repro(command())
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
    assert contents(project) == whole
    again = repro(command())
    assert again.stderr == ""
    assert again.stdout.count("didn't change, skipping") == 2


def test_wherever_a_lock_file_was_cut_it_is_whole_again_or_can_be_read(project: Path) -> None:
    """What can be read ends with a line; dvc finds what is missing in its run cache."""
    whole = LOCK_FILE.read_bytes()
    mended = 0
    for length in range(0, len(whole), 3):
        LAST_WHOLE.write_bytes(whole)
        LOCK_FILE.write_bytes(whole[:length])
        if mend.mend(project):
            assert LOCK_FILE.read_bytes() == whole
            mended += 1
        else:
            assert whole[:length].endswith(b"\n")
            assert COMPILED_LOCKFILE_SCHEMA(parse_yaml(whole[:length], ""))
    assert mended > 0.3 * len(whole)


def test_a_cut_lock_file_of_which_nothing_is_known_is_deleted(project: Path) -> None:
    """The hook came later than the kill; dvc finds the results in its cache."""
    whole = contents(project)
    cut = LOCK_FILE.read_bytes()[:-5]
    LAST_WHOLE.unlink()
    LOCK_FILE.write_bytes(cut)
    (line,) = mend.mend(project)
    assert line == f"{project / LOCK_FILE}: {WHAT}half written; deleted (what it was: {SET_ASIDE})"
    assert SET_ASIDE.read_bytes() == cut
    done = repro(command())
    assert done.stdout.count("is cached - skipping run") == 2
    assert contents(project) == whole


def test_the_first_dvc_of_a_fresh_clone_knows_the_lock_file_already(project: Path) -> None:
    """It may be killed while it writes it."""
    whole = LOCK_FILE.read_bytes()
    shutil.rmtree(".dvc/tmp")
    assert mend.mend(project) == []
    LOCK_FILE.write_text("")
    assert len(mend.mend(project)) == 1
    assert LOCK_FILE.read_bytes() == whole


def test_a_lock_file_that_dvc_can_read_is_not_deleted(project: Path) -> None:
    """Somebody's editor has taken the last line's end away."""
    text = LOCK_FILE.read_bytes().rstrip()
    LAST_WHOLE.unlink()
    LOCK_FILE.write_bytes(text)
    assert mend.mend(project) == []
    assert LOCK_FILE.read_bytes() == text


def test_a_merge_with_conflicts_is_a_persons_to_solve(project: Path) -> None:
    text = LOCK_FILE.read_text()
    first, *_, last = (line for line in text.splitlines(keepends=True) if "size:" in line)
    for size in (first, last):
        before, _, after = text.rpartition(size)
        conflict = f"{before}<<<<<<< HEAD\n{size}=======\n    {size.strip()}1\n>>>>>>> other\n{after}"
        LOCK_FILE.write_text(conflict)
        assert mend.mend(project) == []
        assert LOCK_FILE.read_text() == conflict
    assert repro(command()).returncode


@pytest.mark.parametrize(("lock", "path"), [(GUARD, RWLOCK), (REPOSITORY_LOCK, LOCK_FILE)])
def test_what_a_living_dvc_is_writing_stays(project: Path, lock: Path, path: Path) -> None:
    path.write_text("")
    with lock.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert mend.mend(project) == []
        assert path.exists()
    assert len(mend.mend(project)) == 1


def name_in_list(project: Path, pid: int, written: float) -> None:
    """Let dvc's list name a process, as if it had been written some seconds from now."""
    entry = {"pid": pid, "cmd": "dvc repro --single-item two"}
    held = {"write": {str(project / "final"): entry}, "read": {str(project / "tokens"): [entry]}}
    RWLOCK.write_text(json.dumps(held))
    os.utime(RWLOCK, (time.time() + written,) * 2)


def test_a_pid_that_another_process_has_been_given_holds_nothing(project: Path) -> None:
    """After a restart, of a container above all, a killed dvc's PID is soon somebody else's."""
    with subprocess.Popen(["sleep", "60"]) as other:
        for written in (60, LONG_AGO):  # the process is older than the list, so it may have written it; it is younger
            name_in_list(project, other.pid, written)
            done = repro(command(), "--force")
            goes = written < 0
            assert done.returncode == 0 if goes else f"(PID {other.pid}): dvc repro" in done.stderr
            assert (f"PID {other.pid} was killed; taken out" in done.stderr) == goes
        other.kill()


def test_a_dead_process_that_nobody_has_waited_for_holds_nothing(project: Path) -> None:
    """In a container often nobody does."""
    with subprocess.Popen(["true"]) as zombie:
        wait_for(lambda: psutil.Process(zombie.pid).status() == psutil.STATUS_ZOMBIE)
        name_in_list(project, zombie.pid, 60)
        assert repro(command(), "--force").returncode == 0


def test_a_living_dvc_stays_in_the_list_when_the_clock_is_set(project: Path) -> None:
    """Though it seems to be younger than what it has written; but nobody waits for himself."""
    (project / "dvc").write_text("input()")
    with subprocess.Popen([sys.executable, "dvc"], stdin=subprocess.PIPE) as living:
        wait_for(lambda: "dvc" in psutil.Process(living.pid).cmdline())
        name_in_list(project, living.pid, LONG_AGO)
        assert mend.mend(project) == []
        living.kill()
    name_in_list(project, os.getpid(), LONG_AGO)
    assert mend.mend(project) == [f"{project / RWLOCK}: PID {os.getpid()} was killed; taken out"]


def test_a_folder_that_a_living_dvc_fills_stays(project: Path) -> None:
    folder = project / RUN_CACHE / "ab" / "abc"
    folder.mkdir(parents=True)
    living = threading.Timer(mend.SETTLE_S / 2, (folder / "result").touch)
    living.start()
    assert mend.mend(project) == []
    assert (folder / "result").exists()


def test_what_the_mending_runs_into_does_not_keep_dvc_from_its_work(project: Path) -> None:
    LAST_WHOLE.unlink()
    LAST_WHOLE.mkdir()
    done = repro(command())
    assert done.returncode == 0
    assert done.stderr.startswith("stages.mend: dvc's notes were not looked at: ")
    assert done.stderr.count("\n") == 1


def test_a_commit_that_has_nothing_to_mend_with_costs_no_word(tmp_path: Path) -> None:
    """An older one, checked out into an environment that has the hook; or the project's folder was moved."""
    hook = mend.MEND_FIRST.format(project=str(tmp_path))
    script = f"import sys; sys.path = [path for path in sys.path if path]\nsys.modules['stages.mend'] = None\n{hook}"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, text=True, capture_output=True, check=True)
    assert done.stdout + done.stderr == ""


def test_the_hook_is_for_dvc_alone() -> None:
    """And costs other programs of the environment nothing."""
    shows = "import sys; print('stages.mend' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", shows], text=True, capture_output=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.proof
def test_wherever_a_lock_file_was_cut_between_lines_dvc_ends_with_the_whole(project: Path) -> None:
    """Also where it makes sense to dvc, which then finds what is missing in its run cache."""
    whole = contents(project)
    lines = LOCK_FILE.read_bytes().splitlines(keepends=True)
    for number in range(len(lines)):
        LOCK_FILE.write_bytes(b"".join(lines[:number]))
        dvc(project, "repro")
        assert contents(project) == whole, number


@pytest.mark.proof
@pytest.mark.parametrize("start", ["from nothing", "anew"])
def test_dvc_killed_at_any_of_its_file_operations(beginning: Path, finished: Path, tmp_path: Path, start: str) -> None:
    """Before each, and with the file emptied that it was about to write; two dvcs at a time."""
    words, origin = (["repro"], beginning) if start == "from nothing" else (["repro", "--force"], finished)

    def killed(moment: str) -> tuple[Path, int, list[str]]:
        folder = shutil.copytree(origin, tmp_path / moment / "project")
        log = folder.parent / "log"
        code = subprocess.run(
            [sys.executable, "-m", "tests.support.killed_dvc", moment, str(log), *words],
            cwd=folder,
            env=environment(PYTHONPATH=str(ROOT)),
            capture_output=True,
            check=False,
        ).returncode
        return folder, code, log.read_text().splitlines()

    def mends(moment: str) -> str:
        """What the next dvc does not do as an undisturbed one."""
        folder, code, operations = killed(moment)
        assert code == -signal.SIGKILL, operations[-1]
        done = subprocess.run(
            command(*words), cwd=folder, env=environment(), text=True, capture_output=True, check=False
        )
        same = contents(folder) == whole
        shutil.rmtree(folder.parent)
        return "" if done.returncode == 0 and same else f"{operations[-1]}: {done.stdout}{done.stderr}"

    folder, code, operations = killed("999999")
    assert code == 0
    whole = contents(folder)
    emptied = [f"+{number}" for number, line in enumerate(operations) if line.split()[1] == "open"]
    moments = [*map(str, range(len(operations))), *emptied]
    assert len(moments) > 100
    with ThreadPoolExecutor(2) as both:
        wrong = [found for found in both.map(mends, moments) if found]
    assert wrong == []
