"""deploy/slurm/train.sbatch under the real Slurm, with two nodes on this machine; see `tests/support/slurm.py`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.common import contents, run, stage_line, wait_for
from tests.support.project import TRAINED, clone, dvc, processes_in, runs
from tests.support.slurm import Slurm, cluster

pytestmark = pytest.mark.proof

SCRIPT = "deploy/slurm/train.sbatch"
LONG = {"model__dropout": 0.1, "train__max_steps": 1500, "train__save_interval": 1500, "launch__timeout": 20}


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with cluster() as started:
        yield started


def log(project: Path, job: str) -> str:
    return (project / f"slurm-{job}.out").read_text()


def wait_for_step(project: Path, job: str, text: str) -> None:
    """Wait until the job's output contains this."""
    wait_for(lambda: (project / f"slurm-{job}.out").exists() and text in log(project, job), 120)


def wait_for_state(slurm: Slurm, project: Path, job: str, state: str) -> None:
    try:
        wait_for(lambda: slurm.state(job) == state, 180, pause=0.5)
    except AssertionError:
        raise AssertionError(f"{job} is {slurm.state(job)}, not {state}\n{log(project, job)}") from None


def test_a_preempted_and_a_stopped_job_continue_to_the_bytes_of_one_process(
    slurm: Slurm, tmp_path: Path, corpus: Path
) -> None:
    """A job of higher priority pre-empts the training; then SIGTERM stops it, as before its time limit."""
    project = clone(tmp_path / "project", corpus, **LONG)
    job = slurm("sbatch", "--parsable", "--partition=low", SCRIPT, folder=project)
    wait_for_step(project, job, "step 100/")
    slurm("srun", "--partition=high", "--nodes=2", "true")
    assert log(project, job).count("stopped after step") == 2  # each node says it
    wait_for_state(slurm, project, job, "RUNNING")
    wait_for(lambda: "continuing after step" in log(project, job), 120)
    slurm("scancel", "--signal=TERM", job)
    wait_for(lambda: log(project, job).count("stopped after step") == 4, 60)
    wait_for_state(slurm, project, job, "COMPLETED")
    assert log(project, job).count("continuing after step") == 3  # of both requeued jobs, and of dvc repro
    assert processes_in(project) == []
    assert "up to date" in dvc(project, "status").stdout

    single = clone(tmp_path / "single", corpus, **LONG)
    dvc(single, "repro", "tokenize")
    run([sys.executable, "-m", "gpt", *stage_line("train")], single)
    assert contents(project, TRAINED) == contents(single, TRAINED)
    (trained,) = runs(project)
    assert trained.info.status == "FINISHED"


def test_a_failing_training_fails_the_job(slurm: Slurm, tmp_path: Path, corpus: Path) -> None:
    project = clone(tmp_path / "project", corpus, train__shards=1)
    job = slurm("sbatch", "--parsable", SCRIPT, folder=project)
    wait_for_state(slurm, project, job, "FAILED")
    assert "expected 1, 2, 4, … processes, at most train.shards (1), found 2" in log(project, job)
