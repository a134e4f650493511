"""One content, one bit pattern: whatever is killed, and on however many processes, the same bytes come out."""

import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from gpt.core.errors import StoppedError, UserError
from gpt.core.params import check_section
from gpt.data.token_files import TokenData
from gpt.model.baselines import make_model
from gpt.model.checkpoint import read_tensors
from gpt.model.config import ModelConfig
from gpt.training.distributed import Group, process_group
from gpt.training.ema import WeightAverage
from gpt.training.history import Record, read_records
from gpt.training.run_folder import RunFolder
from gpt.training.trainer import Trainer, TrainParams
from tests.support import processes
from tests.support.common import environment, only_line, small_params, write_params
from tests.support.processes import Running

CPU = torch.device("cpu")
NAMES = ("model.pt", "metrics/train.json", "plots/history.csv", "plots/validation.csv")
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


# In one process: what a run leaves, from its first step or from a saved state.


def trainer(data: TokenData, group: Group, **changes: object) -> Trainer:
    params = small_params(train__max_steps=12, train__eval_interval=4, train__save_interval=3, **changes)
    torch.manual_seed(0)
    model = make_model(check_section(Path("test"), "model", ModelConfig, params), data.meta.vocab_size)
    return Trainer(check_section(Path("test"), "train", TrainParams, params), model, data, group)


def run(data: TokenData, folder: RunFolder, *, stop_after: int | None = None) -> dict[str, bytes]:
    """Train in `folder`, from its newest state if it has one; stop after some steps if asked to."""
    with process_group(CPU, timeout_s=30) as group:
        one = trainer(data, group)
        folder.path.mkdir(exist_ok=True)
        if found := folder.newest({}, print):
            one.restore(*found)
        folder.history.resume(one.progress.step)
        steps = iter(range(1000))
        try:
            one.run(folder, {}, lambda record: None, lambda: next(steps) + 1 == stop_after)
        except StoppedError:
            assert stop_after
        folder.history.write_csv(folder.path / "history.csv", folder.path / "validation.csv")
        weights = {name: weight.numpy().tobytes() for name, weight in one.best.items()}
        return {**weights, "history": (folder.path / "history.csv").read_bytes()}


@pytest.mark.parametrize("steps", [1, 4, 5, 11])
def test_a_run_that_was_stopped_ends_as_if_it_had_not(data: TokenData, tmp_path: Path, steps: int) -> None:
    whole = run(data, RunFolder(tmp_path / "whole"))
    halves = RunFolder(tmp_path / "halves")
    run(data, halves, stop_after=steps)
    assert [path.name for path in sorted(halves.path.glob("resume-*.pt"))][-1] == f"resume-{steps:09d}.pt"
    assert run(data, halves) == whole


def forget_seed(_seed: int) -> None:
    """In place of torch.manual_seed: the random numbers of a step come from wherever the process stands."""


def forget(memory: str, self: Trainer, digests: dict[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """In place of Trainer.state: an optimizer's memory of the gradient is lost."""
    metadata, tensors = STATE(self, digests)
    found = [moments for state in tensors["optimizers"] for moments in state["state"].values() if memory in moments]
    assert found
    for moments in found:
        moments[memory] = torch.zeros_like(moments[memory])
    return metadata, tensors


def forgetful(memory: str) -> Callable[[Trainer, dict[str, object]], tuple[dict[str, object], dict[str, object]]]:
    """A Trainer.state that loses one memory."""
    return lambda self, digests: forget(memory, self, digests)


STATE = Trainer.state
SABOTAGE: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a shard's seed": lambda patch: patch.setattr(torch, "manual_seed", forget_seed),
    "a moment of AdamW": lambda patch: patch.setattr(Trainer, "state", forgetful("exp_avg")),
    "the momentum of Muon": lambda patch: patch.setattr(Trainer, "state", forgetful("momentum")),
    "the average of the weights": lambda patch: patch.setattr(WeightAverage, "restore", lambda self, weights: None),
    "the clearing of a gradient": lambda patch: patch.setattr(
        "torch.nn.parallel.DistributedDataParallel.zero_grad", lambda self, set_to_none: None
    ),
}


@pytest.mark.parametrize("ingredient", SABOTAGE)
def test_the_check_turns_red_when_an_ingredient_is_missing(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ingredient: str
) -> None:
    SABOTAGE[ingredient](monkeypatch)
    whole = run(data, RunFolder(tmp_path / "whole"))
    halves = RunFolder(tmp_path / "halves")
    run(data, halves, stop_after=5)
    assert run(data, halves) != whole


def test_a_damaged_state_is_named_and_the_one_before_is_used(
    data: TokenData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(data, RunFolder(tmp_path / "whole"))
    halves = RunFolder(tmp_path / "halves")
    run(data, halves, stop_after=8)
    states = sorted(halves.path.glob("resume-*.pt"))
    assert [path.name for path in states] == ["resume-000000006.pt", "resume-000000008.pt"]
    content = bytearray(states[-1].read_bytes())
    content[len(content) // 2] ^= 1
    states[-1].write_bytes(content)
    assert run(data, halves) == whole
    said = capsys.readouterr().out
    assert "damaged" in said
    assert "resume-000000008.pt" in said


def test_other_params_or_code_never_pick_up_a_state(data: TokenData, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    run(data, folder, stop_after=5)
    assert folder.newest({}, print)
    assert folder.newest({"code": "other"}, print) is None


# As processes: killed again and again, and on several of them.


def line(tokens: Path, *more: str) -> list[str]:
    outputs = ["--checkpoint", "model.pt", "--metrics", "metrics/train.json", "--history", "plots/history.csv"]
    outputs += ["--validation", "plots/validation.csv"]
    return ["train", "--params", "params.yaml", "--tokens", str(tokens), *outputs, "--run-dir", "run", *more]


def start(folder: Path, tokens: Path, *more: str, ranks: int = 1, killed_at: int | None = None) -> list[Running]:
    return processes.start(folder, line(tokens, *more), ranks=ranks, killed_at=killed_at)


def through_torchrun(folder: Path, tokens: Path, ranks: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [TORCHRUN, "--standalone", f"--nproc-per-node={ranks}", "-m", "gpt", *line(tokens)],
        cwd=folder,
        env=environment(OMP_NUM_THREADS="1"),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(folder: Path, tokens: Path, ranks: int = 1) -> dict[str, bytes]:
    for running in start(folder, tokens, ranks=ranks):
        assert running.end() == (0, "")
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES}


def prepare(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    small = {"train__max_steps": 60, "train__save_interval": 4, "train__eval_interval": 15, "model__dropout": 0.2}
    write_params(folder / "params.yaml", **{**small, **changes})
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> dict[str, bytes]:
    """What the run leaves when nobody disturbs it; four processes, which two cores share."""
    return finish(prepare(tmp_path_factory.mktemp("uninterrupted")), tokens, ranks=4)


@pytest.mark.proof
def test_on_two_machines_the_same_bytes(tmp_path: Path, tokens: Path, uninterrupted: dict[str, bytes]) -> None:
    """Four ranks: neighbours share a memory, the pairs of neighbours only a network."""
    folder = prepare(tmp_path / "far")
    ranks = processes.start(folder, line(tokens), ranks=4, ranks_here=2)
    assert [rank.end() for rank in ranks] == [(0, "")] * len(ranks)
    assert contents(folder) == uninterrupted


def history_reaches(folder: Path, step: int, poll: Callable[[], int | None]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and poll() is None:
        if any(record.step >= step for record in read_records(folder / "run" / "history.jsonl")):
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was never reached")


def last_saved(folder: Path) -> int:
    """The step of the newest resume state, 0 where there is none."""
    return max((int(path.stem.split("-")[1]) for path in (folder / "run").glob("resume-*.pt")), default=0)


def seen_until(folder: Path, step: int) -> list[Record]:
    """What was seen up to a step, and when: steps that are repeated are seen at another time."""
    return [record for record in read_records(folder / "run" / "history.jsonl") if record.step <= step]


FILE_OPERATIONS = 49  # of the short run below


@pytest.mark.parametrize(
    "moments",
    [range(3, FILE_OPERATIONS, 15), pytest.param(range(FILE_OPERATIONS), marks=pytest.mark.proof)],
    ids=["some", "all"],
)
def test_killed_before_any_file_operation_it_ends_with_the_same_bytes(
    tmp_path: Path, tokens: Path, moments: range
) -> None:
    """Before, within and after every save, every line of the history and every final write; nothing saved is repeated.

    Nobody sees the end of it, so that whoever started it deletes the outputs and starts it again, as dvc does.
    """
    short = {"train__max_steps": 16, "train__eval_interval": 8, "train__log_interval": 4}
    whole = finish(prepare(tmp_path / "whole", **short), tokens)
    assert len((tmp_path / "whole" / "operations.txt").read_text().splitlines()) == FILE_OPERATIONS
    for moment in moments:
        folder = prepare(tmp_path / str(moment), **short)
        (running,) = start(folder, tokens, killed_at=moment)
        assert running.end()[0] == -signal.SIGKILL
        saved = last_saved(folder)
        before = seen_until(folder, saved)
        for name in NAMES:
            (folder / name).unlink(missing_ok=True)
        assert finish(folder, tokens) == whole, moment
        assert seen_until(folder, saved) == before, moment


@pytest.mark.parametrize(("ranks", "kills_after"), [(1, [10, 25, 40]), (2, [10, 30])])
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    tmp_path: Path, tokens: Path, uninterrupted: dict[str, bytes], ranks: int, kills_after: list[int]
) -> None:
    """Each kill at a random moment after some more steps."""
    folder = prepare(tmp_path / "killed")
    chance = random.Random(ranks)
    for step in kills_after:
        running = start(folder, tokens, ranks=ranks)
        history_reaches(folder, step, running[0].poll)
        time.sleep(chance.random() * 0.2)
        for rank in running:
            rank.signal(signal.SIGKILL)
        for rank in running:
            rank.end()
        assert not (folder / "model.pt").exists() or contents(folder) == uninterrupted
    assert finish(folder, tokens, ranks) == uninterrupted
    steps = [record.step for record in read_records(folder / "run" / "history.jsonl")]
    assert steps == sorted(set(steps))


def test_started_with_2_killed_and_finished_with_1(
    tmp_path: Path, tokens: Path, uninterrupted: dict[str, bytes]
) -> None:
    """SIGKILL of one rank ends the job, which names it; SIGKILL of torchrun takes its ranks along."""
    folder = prepare(tmp_path / "killed")
    ranks = start(folder, tokens, ranks=2)
    history_reaches(folder, 10, ranks[0].poll)
    ranks[1].signal(signal.SIGKILL)
    code, errors = ranks[0].end(30)
    assert code == 1
    assert f"rank 1 (PID {ranks[1].pid} on {socket.gethostname()}) died" in only_line(errors)
    torchrun = through_torchrun(folder, tokens, 2)
    history_reaches(folder, 30, torchrun.poll)
    workers = psutil.Process(torchrun.pid).children()
    torchrun.kill()
    torchrun.communicate(timeout=30)
    _, alive = psutil.wait_procs(workers, timeout=3)
    assert alive == []
    assert finish(folder, tokens) == uninterrupted


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_asked_to_stop_it_finishes_the_step_saves_and_says_so(
    tmp_path: Path, tokens: Path, uninterrupted: dict[str, bytes], ranks: int, number: signal.Signals
) -> None:
    """It is enough that one rank hears it."""
    folder = prepare(tmp_path / "stopped")
    running = start(folder, tokens, ranks=ranks)
    history_reaches(folder, 20, running[0].poll)
    running[-1].signal(number)
    ends = [rank.end(30) for rank in running]
    assert [code for code, _ in ends] == [75] * ranks
    said = set(ends[0][1].splitlines())
    assert len(said) == 1
    assert "stopped after step" in said.pop()
    assert list((folder / "run").glob("resume-*.pt"))
    assert finish(folder, tokens) == uninterrupted


def start_wrapped(folder: Path, tokens: Path) -> "subprocess.Popen[str]":
    """Two ranks under torchrun under the wrapper; returns when they are at step 20."""
    inner = [word for word in line(tokens) if word not in ("--run-dir", "run")]
    running = subprocess.Popen(
        [sys.executable, "-m", "stages.train", TORCHRUN, "-m", "gpt", *inner],
        cwd=folder,
        env=environment(PET_NPROC_PER_NODE="2", MLFLOW_TRACKING_URI=""),
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    end = time.monotonic() + 60
    while not list(folder.glob(".runs/*/history.jsonl")) and time.monotonic() < end:
        time.sleep(0.01)
    (history,) = folder.glob(".runs/*/history.jsonl")
    (folder / "run").symlink_to(history.parent)
    history_reaches(folder, 20, running.poll)
    return running


@pytest.mark.proof
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_wrapper_passes_the_stop_on_and_ends_with_its_code(
    tmp_path: Path, tokens: Path, uninterrupted: dict[str, bytes], number: signal.Signals
) -> None:
    """With two ranks under torchrun, which hides their code; Ctrl-C reaches the whole group, SIGTERM the wrapper."""
    folder = prepare(tmp_path / "wrapped")
    running = start_wrapped(folder, tokens)
    os.killpg(running.pid, number) if number == signal.SIGINT else running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 75, errors
    assert "gpt train: stopped after step" in errors
    assert "Traceback" not in errors
    assert finish(folder, tokens) == uninterrupted


@pytest.mark.proof
def test_a_rank_that_is_killed_is_named_in_one_line_of_ours(tmp_path: Path, tokens: Path) -> None:
    """The other rank may have said before whom it misses; torchrun's box of text stays in the log."""
    folder = prepare(tmp_path / "killed")
    running = start_wrapped(folder, tokens)
    everyone = psutil.Process(running.pid).children(recursive=True)
    (rank,) = (process for process in everyone if process.environ().get("RANK") == "1")
    rank.kill()
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGKILL
    *others, last = errors.splitlines()
    assert last.startswith(f"stages.train: rank 1 (PID {rank.pid}) was killed by SIGKILL after ")
    assert last.endswith(" s; run again to continue; details in gpt_nano.log")
    assert all(line.startswith(f"gpt train: rank 1 (PID {rank.pid} on ") for line in others)
    assert len(others) <= 1
    assert f"exitcode  : -9 (pid: {rank.pid})" in (folder / "gpt_nano.log").read_text()


def test_a_rank_that_hangs_ends_the_job_and_is_named(tmp_path: Path, tokens: Path) -> None:
    folder = prepare(tmp_path / "hangs")
    ranks = start(folder, tokens, "--timeout", "2", ranks=2)
    history_reaches(folder, 10, ranks[0].poll)
    ranks[1].signal(signal.SIGSTOP)
    began = time.monotonic()
    code, errors = ranks[0].end()
    assert time.monotonic() - began < 2 + 8
    assert code == 1
    assert f"rank 1 (PID {ranks[1].pid} on {socket.gethostname()}) died, or did not answer within 2 s" in errors
    assert ranks[1].end(5)[0] == -signal.SIGKILL


JOINS = """
import threading, torch
from gpt.distributed import process_group
with process_group(torch.device("cpu"), timeout_s=20) as group:
    assert threading.active_count() == 2, "the pulse"
    group.all_gather([1.0])
assert threading.active_count() == 1
"""


@pytest.mark.proof
def test_a_rank_that_is_done_has_no_thread_left_that_could_abort_it() -> None:
    """Python kills such threads when it shuts down; one that was inside torch took the process along, now and then."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", JOINS], env=environment(**where, RANK=rank), stderr=subprocess.PIPE)
        for rank in ("0", "1")
    ]
    said = [rank.communicate(timeout=60)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said


def test_a_second_run_of_the_same_key_waits_and_says_for_whom(
    tmp_path: Path, tokens: Path, uninterrupted: dict[str, bytes]
) -> None:
    folder = prepare(tmp_path / "twice")
    (first,) = start(folder, tokens)
    history_reaches(folder, 10, first.poll)
    first.signal(signal.SIGSTOP)
    (second,) = start(folder, tokens)
    expected = f"waiting: this very run is already under way, PID {first.pid} on {socket.gethostname()} since"
    end = time.monotonic() + 30
    while expected not in second.said() and time.monotonic() < end:
        time.sleep(0.05)
    assert expected in second.said()
    first.signal(signal.SIGCONT)
    assert [first.end()[0], second.end()[0]] == [0, 0]
    assert contents(folder) == uninterrupted


# The disk.


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes in this process: the kernel then refuses to write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_write_that_fails_leaves_the_old_file_whole(data: TokenData, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    run(data, folder, stop_after=5)
    (old,) = folder.path.glob("resume-*5.pt")
    content = old.read_bytes()
    with process_group(CPU, timeout_s=30) as group:
        state = trainer(data, group).state({})
    with small_disk(10_000), pytest.raises(UserError, match=r"resume-000000005\.pt: .*(space|large)"):
        folder.save(5, *state)
    assert old.read_bytes() == content
    assert read_tensors(old)
    assert [path.name for path in folder.path.iterdir() if path.name.endswith(".tmp")] == []


def test_a_full_disk_is_named_with_what_is_free(tmp_path: Path, tokens: Path) -> None:
    """A real small file system, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"this user may not mount a file system: {mount.stderr.strip()}")
    try:
        folder = prepare(tmp_path / "work")
        (running,) = start(folder, tokens, "--run-dir", str(disk / "run"))
        code, errors = running.end()
        assert code == 2
        assert "no space left on the device" in only_line(errors)
        assert str(disk) in only_line(errors)
        assert not (folder / "model.pt").exists()
        for state in (disk / "run").glob("*.pt"):
            assert read_tensors(state)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_read_only_folder_is_refused_before_training(tmp_path: Path, tokens: Path) -> None:
    folder = prepare(tmp_path / "work")
    (folder / "metrics").write_text("a file where a folder belongs")
    (running,) = start(folder, tokens)
    code, errors = running.end()
    assert code == 2
    assert "metrics/train.json" in only_line(errors)
    assert "step" not in running.said()
    assert not (folder / "run" / "history.jsonl").exists()
