"""The benchmark of a GPU: all of it on a CPU with tiny sizes, its deadline, and its checks on a GPU if there is one."""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.support.processes  # noqa: F401 (its forkserver has imported torch)
from benchmarks import cuda_checks
from benchmarks.cuda_checks import CheckFailedError, checks, compare_logits, kill_and_resume, train_briefly
from benchmarks.cuda_decoding import decodings
from benchmarks.cuda_training import compilation_pays, compiled_speeds
from benchmarks.gpu import PARTS
from benchmarks.parts import ENDED, FAILED, NOT_RUN, OK, Part, Setup, Task, run_part, run_parts
from gpt.model.gpt import GPT
from tests.support.common import environment, model_params, run

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MISSING = ("requests", "tiktoken", "tokenizers", "matplotlib", "mlflow", "dvc", "psutil", "pytest")


def test_the_whole_script_on_a_cpu_with_the_packages_of_a_bare_machine(tmp_path: Path, tokens: Path) -> None:
    """Compilation is replaced by plain execution, since it takes a minute."""
    for name in MISSING:
        (tmp_path / f"{name}.py").write_text("raise ImportError('not installed on the bare machine')\n")
    variables = environment(TORCHDYNAMO_DISABLE="1")
    variables["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{variables['PYTHONPATH']}"
    line: list[str | Path] = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--tokens", tokens]
    printed = run([*line, "--out", "gpu.json"], tmp_path, env=variables).stdout
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found == json.loads(printed)
    assert {name: part["status"] for name, part in found["parts"].items()} == {name: OK for name, _, _ in PARTS}
    assert found["parts"]["resume"]["results"]["kill and resume"]["equal_bits"]
    for recipe in ("baby", "best-gpu"):
        training = found["parts"][recipe]["results"]["training"]
        assert training["steps"] == training["max_steps"] == training["points"][-1][1]


def fail() -> dict[str, Any]:
    raise ValueError("a fault")


def crash() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def hang() -> dict[str, Any]:
    time.sleep(60)
    return {}


TASKS: dict[str, Task] = {
    "good": lambda: {"value": 1},
    "fails": fail,
    "ends": lambda: {"ended": "stopped"},
    "crashes": crash,
    "hangs": hang,
    "after": lambda: {"value": 2},
}


def tasks_of_all_kinds(setup: Setup) -> Mapping[str, Task]:
    """The names of those that run are passed as the device."""
    return {name: TASKS[name] for name in setup.device.split()}


@pytest.mark.parametrize(
    ("names", "status", "last"),
    [
        ("good after", OK, {"value": 2}),
        ("fails after", FAILED, {"value": 2}),
        ("good ends", ENDED, {"ended": "stopped"}),
        ("good crashes", FAILED, NOT_RUN),
        ("good hangs after", ENDED, NOT_RUN),
    ],
)
def test_results_are_kept_when_a_task_fails_or_its_part_is_ended(
    tmp_path: Path, names: str, status: str, last: Any
) -> None:
    report = run_part(
        Part("part", 1, 0, tasks_of_all_kinds), Setup(tmp_path, names, True, limit_s=6), tmp_path / "part.json"
    )
    assert report["status"] == status
    assert list(report["results"]) == names.split()
    assert report["results"].get("good", {"value": 1}) == {"value": 1}
    assert list(report["results"].values())[-1] == last


def test_a_part_without_enough_time_is_not_run_and_unused_time_goes_to_later_ones(tmp_path: Path) -> None:
    parts = [Part("first", 1, 0, tasks_of_all_kinds), Part("long", 1, 50, tasks_of_all_kinds)]
    found = dict(run_parts(parts, Setup(tmp_path, "good", True), 60, tmp_path))
    assert [report["status"] for report in found.values()] == [OK, OK]
    found = dict(run_parts(parts, Setup(tmp_path, "good", True), 40, tmp_path))
    assert [report["status"] for report in found.values()] == [OK, NOT_RUN]


def test_a_device_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the device is imitated by noise in the logits of all calls but the first, which is the CPU's."""
    forward, calls = GPT.forward, []

    def noisy(self: GPT, *arguments: Any) -> Tensor:
        calls.append(arguments)
        logits = forward(self, *arguments)
        return logits + 0.001 * logits.abs().max() * torch.rand_like(logits) if len(calls) > 1 else logits

    monkeypatch.setattr(GPT, "forward", noisy)
    with pytest.raises(CheckFailedError):
        compare_logits(model_params(dropout=0.0), "cpu")


def test_a_loss_that_does_not_fall_is_found(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_checks, "MIN_DECREASE", 10)
    with pytest.raises(CheckFailedError):
        train_briefly("float32", "adamw", Setup(tokens, "cpu", True))


def test_compilation_is_used_where_it_was_measured_to_pay(tmp_path: Path) -> None:
    eager, compiled = (
        {"tokens_per_second": 100.0},
        {"tokens_per_second": 200.0, "first_step_s": 6.0, "first_evaluation_s": 4.0},
    )
    pays = partial(compilation_pays, "recipe")
    both = Setup(tmp_path, "cpu", True, earlier={"speed": {"recipe": eager}, "compile": {"recipe": compiled}})
    assert pays(3000, both)
    assert not pays(1000, both)
    failed: dict[str, Any] = {"speed": {"recipe": eager}, "compile": {"recipe": {"error": "no compiler"}}}
    assert not pays(3000, Setup(tmp_path, "cpu", True, earlier=failed))
    assert not pays(3000, Setup(tmp_path, "cpu", True))


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_computes_what_the_cpu_computes(tokens: Path) -> None:
    for task in checks(Setup(tokens, "cuda", True)).values():
        task()


@pytest.mark.gpu
@needs_gpu
def test_a_training_that_is_killed_on_a_gpu_resumes(tokens: Path) -> None:
    kill_and_resume(tokens, "cuda")


@pytest.mark.gpu
@needs_gpu
def test_decoding_with_cuda_graphs_and_compiled_training(tokens: Path) -> None:
    for tasks in (decodings, compiled_speeds):
        for task in tasks(Setup(tokens, "cuda", True)).values():
            task()
