"""Equal params and data give equal bytes: after kills and resumes, and on any number of processes."""

import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from gpt.core.errors import StoppedError, UserError
from gpt.data.token_files import TokenData
from gpt.training.distributed import process_group
from gpt.training.ema import WeightAverage
from gpt.training.history import Record, read_records
from gpt.training.run_folder import RunFolder
from gpt.training.trainer import Trainer
from tests.conftest import RunMain
from tests.support import processes
from tests.support.common import (
    TRAINED,
    contents,
    environment,
    make_trainer,
    only_line,
    train_line,
    wait_for,
    write_params,
)
from tests.support.processes import Running

CPU = torch.device("cpu")
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


# In one process: a run with and without an interruption.


TINY = {"model__n_layer": 1, "model__n_head": 1, "model__n_embd": 8, "model__block_size": 16, "model__ngram": 2}
SHORT = {**TINY, "train__max_steps": 12, "train__eval_interval": 4, "train__save_interval": 3}


def run(data: TokenData, folder: RunFolder, *, stop_after: int | None = None) -> dict[str, bytes]:
    """Train in a folder, from its newest resume state if there is one; returns weights and history."""
    with process_group(CPU, timeout_s=30) as group:
        trainer = make_trainer(data, group, **SHORT)
        folder.path.mkdir(exist_ok=True)
        if state := folder.newest({}):
            trainer.restore(*state)
        folder.history.resume(trainer.progress.step)
        steps = iter(range(1, 1000))
        try:
            trainer.run(folder, {}, lambda record: None, lambda: next(steps) == stop_after)
        except StoppedError:
            assert stop_after
        folder.history.write_csv(folder.path / "history.csv", folder.path / "validation.csv")
        weights = {name: weight.numpy().tobytes() for name, weight in trainer.best.items()}
        return {**weights, "history": (folder.path / "history.csv").read_bytes()}


@pytest.fixture(scope="module")
def whole(data: TokenData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of a run without interruption, in one process."""
    return run(data, RunFolder(tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("steps", [1, 4, 5, 11])
def test_stop_and_resume_change_no_byte(data: TokenData, tmp_path: Path, whole: dict[str, bytes], steps: int) -> None:
    folder = RunFolder(tmp_path / "stopped")
    run(data, folder, stop_after=steps)
    assert max(folder.path.glob("resume-*.pt")).name == f"resume-{steps:09d}.pt"
    assert run(data, folder) == whole


def lose(patch: pytest.MonkeyPatch, name: str) -> None:
    """Save zeros for one tensor of the optimizers in every resume state."""
    original = Trainer.state

    def state(trainer: Trainer, digests: dict[str, object]) -> tuple[dict[str, object], dict[str, object]]:
        metadata, tensors = original(trainer, digests)
        moments = [each for state in tensors["optimizers"] for each in state["state"].values() if name in each]
        assert moments
        for each in moments:
            each[name] = torch.zeros_like(each[name])
        return metadata, tensors

    patch.setattr(Trainer, "state", state)


SABOTAGE: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "seed of a shard": lambda patch: patch.setattr(torch, "manual_seed", lambda seed: None),
    "moment of AdamW": lambda patch: lose(patch, "exp_avg"),
    "momentum of Muon": lambda patch: lose(patch, "momentum"),
    "weight average": lambda patch: patch.setattr(WeightAverage, "restore", lambda self, weights: None),
    "clearing of gradients": lambda patch: patch.setattr(
        "torch.nn.parallel.DistributedDataParallel.zero_grad", lambda self, set_to_none: None
    ),
}


@pytest.mark.parametrize("ingredient", SABOTAGE)
def test_negative_control_without_one_ingredient_the_bytes_differ(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ingredient: str
) -> None:
    SABOTAGE[ingredient](monkeypatch)
    expected = run(data, RunFolder(tmp_path / "uninterrupted"))
    folder = RunFolder(tmp_path / "stopped")
    run(data, folder, stop_after=5)
    assert run(data, folder) != expected


def test_a_damaged_state_is_reported_and_skipped_as_is_one_of_other_digests(
    data: TokenData, tmp_path: Path, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "stopped")
    run(data, folder, stop_after=8)
    states = sorted(folder.path.glob("resume-*.pt"))
    assert [path.name for path in states] == ["resume-000000006.pt", "resume-000000008.pt"]
    content = bytearray(states[-1].read_bytes())
    content[len(content) // 2] ^= 1
    states[-1].write_bytes(content)
    assert run(data, folder) == whole
    assert "resume-000000008.pt" in capsys.readouterr().out
    assert folder.newest({})
    assert folder.newest({"code": "other"}) is None


# As processes: kills, stops, several ranks.


def arguments(tokens: Path, *more: str) -> list[str]:
    return train_line(tokens, "--run-dir", "run", *more)


def start(folder: Path, tokens: Path, *more: str, ranks: int = 1, kill_at: int | None = None) -> list[Running]:
    return processes.start(folder, arguments(tokens, *more), ranks=ranks, kill_at=kill_at)


def start_torchrun(
    folder: Path, tokens: Path, *more: str, step: int
) -> "tuple[subprocess.Popen[str], list[psutil.Process]]":
    """Start two ranks under torchrun; returns it and its workers when they are at a step."""
    torchrun = subprocess.Popen(
        [TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "gpt", *arguments(tokens, *more)],
        cwd=folder,
        env=environment(OMP_NUM_THREADS="1"),
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    wait_for_step(folder, step, torchrun.poll)
    return torchrun, psutil.Process(torchrun.pid).children()


def finish(folder: Path, tokens: Path, ranks: int = 1) -> dict[str, bytes]:
    """Run to the end; returns the outputs."""
    for running in start(folder, tokens, ranks=ranks):
        assert running.wait() == (0, "")
    return contents(folder, TRAINED)


def prepare(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    small = {"train__max_steps": 40, "train__save_interval": 4, "train__eval_interval": 10, "model__dropout": 0.2}
    write_params(folder / "params.yaml", **{"train__precision": "float32", **TINY, **small, **changes})
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> dict[str, bytes]:
    """The outputs of a run without interruption, on four processes."""
    return finish(prepare(tmp_path_factory.mktemp("uninterrupted")), tokens, ranks=4)


@pytest.mark.proof
def test_two_machines_give_the_same_bytes(tmp_path: Path, tokens: Path, uninterrupted: dict[str, bytes]) -> None:
    """Four ranks, two with shared memory each; the exchange between the two pairs goes over the network."""
    folder = prepare(tmp_path / "machines")
    ranks = processes.start(folder, arguments(tokens), ranks=4, local_ranks=2)
    assert [rank.wait() for rank in ranks] == [(0, "")] * 4
    assert contents(folder, TRAINED) == uninterrupted


def records(folder: Path, last: int) -> list[Record]:
    """The history up to a step, with its times: a repeated step has another time."""
    return [record for record in read_records(folder / "run" / "history.jsonl") if record.step <= last]


def wait_for_step(folder: Path, step: int, poll: Callable[[], int | None]) -> None:
    def reached() -> bool:
        assert poll() is None, f"ended before step {step}"
        return any(record.step >= step for record in read_records(folder / "run" / "history.jsonl"))

    wait_for(reached, pause=0.002)


def last_saved(folder: Path) -> int:
    """The step of the newest resume state; 0 if there is none."""
    return max((int(path.stem.split("-")[1]) for path in (folder / "run").glob("resume-*.pt")), default=0)


@pytest.mark.parametrize(("first", "interval"), [(3, 16), pytest.param(0, 1, marks=pytest.mark.proof)])
def test_a_kill_before_any_file_operation_changes_no_byte(
    tmp_path: Path, tokens: Path, first: int, interval: int
) -> None:
    """Before, within and after every save, history record and output; saved steps are not repeated.

    The outputs are deleted before the second start, as dvc does.
    """
    short = {"train__max_steps": 8, "train__eval_interval": 4, "train__log_interval": 2, "train__save_interval": 2}
    expected = finish(prepare(tmp_path / "uninterrupted", **short), tokens)
    operations = processes.operations(tmp_path / "uninterrupted")
    assert any("validation.csv" in operation for operation in operations)
    for operation in range(first, len(operations), interval):
        folder = prepare(tmp_path / str(operation), **short)
        (running,) = start(folder, tokens, kill_at=operation)
        assert running.wait()[0] == -signal.SIGKILL
        saved = last_saved(folder)
        before = records(folder, saved)
        for name in TRAINED:
            (folder / name).unlink(missing_ok=True)
        assert finish(folder, tokens) == expected, operations[operation]
        assert records(folder, saved) == before, operations[operation]


@pytest.mark.parametrize(("ranks", "steps"), [(1, [10, 20, 30]), (2, [10, 20])])
def test_repeated_kills_at_random_moments_change_no_byte(
    tmp_path: Path, tokens: Path, uninterrupted: dict[str, bytes], ranks: int, steps: list[int]
) -> None:
    folder = prepare(tmp_path / "killed")
    random_number = random.Random(ranks)
    for step in steps:
        running = start(folder, tokens, ranks=ranks)
        wait_for_step(folder, step, running[0].poll)
        time.sleep(random_number.random() * 0.1)
        for rank in running:
            rank.signal(signal.SIGKILL)
        for rank in running:
            rank.wait()
        assert not (folder / "model.pt").exists() or contents(folder, TRAINED) == uninterrupted
    assert finish(folder, tokens, ranks) == uninterrupted
    history = [record.step for record in records(folder, 40)]
    assert history == sorted(set(history))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_hangs_is_named_and_one_process_finishes(
    tmp_path: Path, tokens: Path, uninterrupted: dict[str, bytes], number: signal.Signals
) -> None:
    folder = prepare(tmp_path / "lost")
    rank, lost = start(folder, tokens, "--timeout", "2", ranks=2)
    wait_for_step(folder, 10, rank.poll)
    lost.signal(number)
    try:
        code, errors = rank.wait()
    finally:
        lost.signal(signal.SIGKILL)
    assert code == 1
    name = f"rank 1 (PID {lost.pid} on {socket.gethostname()})"
    assert f"{name} died, or did not answer within 2 s" in only_line(errors)
    assert finish(folder, tokens) == uninterrupted


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_stop_signal_to_one_rank_saves_the_step_and_ends_all_with_code_75(
    tmp_path: Path, tokens: Path, uninterrupted: dict[str, bytes], ranks: int, number: signal.Signals
) -> None:
    folder = prepare(tmp_path / "stopped")
    running = start(folder, tokens, ranks=ranks)
    wait_for_step(folder, 20, running[0].poll)
    running[-1].signal(number)
    codes, errors = zip(*[rank.wait() for rank in running], strict=True)
    assert codes == (75,) * ranks
    (message,) = set(errors[0].splitlines())
    assert f"stopped after step {last_saved(folder)} " in message
    assert finish(folder, tokens) == uninterrupted


@pytest.mark.proof
def test_workers_end_when_torchrun_is_killed_or_one_of_them_hangs(
    tmp_path: Path, tokens: Path, uninterrupted: dict[str, bytes]
) -> None:
    """A rank that hangs is killed by torchrun, after a grace period of 30 s, once the other one has ended."""
    folder = prepare(tmp_path / "torchrun")
    torchrun, workers = start_torchrun(folder, tokens, step=10)
    torchrun.kill()
    torchrun.communicate(timeout=30)
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    torchrun, workers = start_torchrun(folder, tokens, "--timeout", "2", step=20)
    (hung,) = (worker for worker in workers if worker.environ().get("RANK") == "1")
    hung.suspend()
    _, errors = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 1
    assert f"gpt train: rank 1 (PID {hung.pid} on {socket.gethostname()})" in errors
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    assert finish(folder, tokens) == uninterrupted


def test_a_second_process_of_the_same_run_waits_and_names_the_first(
    tmp_path: Path, tokens: Path, uninterrupted: dict[str, bytes]
) -> None:
    folder = prepare(tmp_path / "twice")
    (first,) = start(folder, tokens)
    wait_for_step(folder, 10, first.poll)
    first.signal(signal.SIGSTOP)
    try:
        (second,) = start(folder, tokens)
        wait_for(lambda: f"PID {first.pid} on {socket.gethostname()} since" in second.output())
    finally:
        first.signal(signal.SIGCONT)
    assert [first.wait()[0], second.wait()[0]] == [0, 0]
    assert contents(folder, TRAINED) == uninterrupted


# Disk errors.


def test_a_failed_write_leaves_the_old_state(data: TokenData, tmp_path: Path) -> None:
    """The kernel refuses to write a large file, as on a full disk."""
    folder = RunFolder(tmp_path / "run")
    run(data, folder, stop_after=5)
    (path,) = folder.path.glob("resume-*5.pt")
    content = path.read_bytes()
    tensors = {"large": torch.zeros(10_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"resume-000000005\.pt"):
            folder.save(5, {}, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == content
    assert not list(folder.path.glob(".*.tmp"))


def test_an_output_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, tokens: Path, run_main: RunMain
) -> None:
    (prepare(tmp_path) / "metrics").write_text("a file instead of a folder")
    assert "metrics/train.json" in run_main(*arguments(tokens), code=2)
    assert not (tmp_path / "run" / "history.jsonl").exists()
