"""deploy/slurm/train.sbatch under the real Slurm, with two nodes on this machine; see `tests/support/slurm.py`."""

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.common import contents, run, stage_line, wait_for
from tests.support.project import TRAINED, clone, dvc, processes_in, runs
from tests.support.slurm import Slurm, cluster

pytestmark = pytest.mark.proof

SCRIPT = "deploy/slurm/train.sbatch"
LONG = {"model__dropout": 0.1, "train__max_steps": 1000, "train__save_interval": 1000, "launch__timeout": 20}
RESUMED = "continuing after step "


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with cluster() as started:
        yield started


def log(project: Path, job: str) -> str:
    file = project / f"slurm-{job}.out"
    return file.read_text() if file.exists() else ""


def wait_in_job(project: Path, job: str, condition: Callable[[], object]) -> None:
    """Wait; a failure shows the job's output."""
    try:
        wait_for(condition, 180, pause=0.5)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log(project, job)}") from None


def is_training(project: Path, job: str, *, resumed: int) -> bool:
    """Whether the job has resumed so many times, and then made a step."""
    parts = log(project, job).split(RESUMED)
    return len(parts) == resumed + 1 and bool(re.search(r"step [\d,]+/", parts[-1]))


def test_an_interrupted_job_continues_to_the_bytes_of_one_process(slurm: Slurm, tmp_path: Path, corpus: Path) -> None:
    """It is pre-empted by a job of higher priority, stopped as before its time limit, and requeued at once."""
    project = clone(tmp_path / "project", corpus, **LONG)
    job = slurm("sbatch", "--parsable", "--partition=low", SCRIPT, folder=project)
    interrupts = (
        ["srun", "--partition=high", "--nodes=2", "true"],
        ["scancel", "--signal=TERM", job],
        ["scontrol", "requeue", job],
    )
    for resumed, interrupt in enumerate(interrupts):
        wait_in_job(project, job, partial(is_training, project, job, resumed=resumed))
        slurm(*interrupt)
    wait_in_job(project, job, lambda: slurm.state(job) == "COMPLETED")
    steps = [int(step.replace(",", "")) for step in re.findall(f"{RESUMED}([\\d,]+)", log(project, job))]
    assert steps == sorted(set(steps))  # no state is saved in between, so each interrupt saved one
    assert steps[len(interrupts) :] == [LONG["train__max_steps"]]  # dvc repro records the finished training
    assert processes_in(project) == []
    assert "up to date" in dvc(project, "status").stdout
    (trained,) = runs(project)
    assert trained.info.status == "FINISHED"

    single = clone(tmp_path / "single", corpus, **LONG)
    dvc(single, "repro", "tokenize")
    run([sys.executable, "-m", "gpt", *stage_line("train")], single)
    assert contents(project, TRAINED) == contents(single, TRAINED)


def test_a_failing_training_fails_the_job(slurm: Slurm, tmp_path: Path, corpus: Path) -> None:
    project = clone(tmp_path / "project", corpus, train__shards=1)
    job = slurm("sbatch", "--parsable", SCRIPT, folder=project)
    wait_in_job(project, job, lambda: slurm.state(job) == "FAILED")
    assert "expected 1, 2, 4, … processes, at most train.shards (1), found 2" in log(project, job)
