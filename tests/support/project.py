"""A clone of the working tree with tiny params, the real dvc in it, and the MLflow store that it fills."""

import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run
from ruamel.yaml import YAML

from tests.support.common import FAST, ROOT, environment, run, wait_for, write_params

QUEUE_S = 240
CHECKPOINT = "chargpt_nano.pt"
TRAINED = [CHECKPOINT, "metrics/train.json", "plots/history.csv", "plots/validation.csv"]
EVALUATED = ["metrics/evaluate.json", "plots/positions.csv", "plots/blocks.csv", "plots/calibration.csv"]
OUTPUTS = ["data/tokens/train.bin", *TRAINED, *EVALUATED, "generation_out.txt", "dvc.lock"]


def clone(folder: Path, corpus: Path, **changes: Any) -> Path:
    """Clone the working tree, uncommitted changes included; commit tiny params, with changes, and a local text."""
    run(["git", "clone", "--quiet", ROOT, folder], ROOT)
    changed = ["git", "ls-files", "--modified", "--others", "--exclude-standard", "--deduplicate"]
    for name in run(changed, ROOT).stdout.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    params = {**FAST, "download__sources": [str(corpus)], "download__sha256": None, "train__max_steps": 40}
    params |= {"generate__max_new_tokens": 30, "generate__prompts": ["the ", ""], "evaluate__sample_characters": 240}
    write_params(folder / "params.yaml", **{**params, **changes})
    (folder / "dvc.lock").unlink(missing_ok=True)
    run(["git", "add", "--all"], folder)
    run(["git", "commit", "--quiet", "--message", "tiny params"], folder)
    return folder


def command(*arguments: str) -> list[str]:
    """The command line of this environment's dvc."""
    return [str(Path(sys.executable).with_name("dvc")), *arguments]


def dvc_environment(**changes: str) -> dict[str, str]:
    """The environment of a user who has switched off DVC's usage statistics."""
    return environment(PYTHONPATH="", DVC_NO_ANALYTICS="1", **changes)


def dvc(project: Path, *arguments: str, code: int | None = 0, **changes: str) -> "subprocess.CompletedProcess[str]":
    """Run dvc and check its exit code."""
    return run(command(*arguments), project, code=code, env=dvc_environment(**changes))


def stage(project: Path, name: str, *arguments: str, code: int = 0) -> str:
    """Run one of the project's commands around the stages and check its exit code; returns what it printed."""
    return run([sys.executable, "-m", f"stages.{name}", *arguments], project, code=code, env=dvc_environment()).stdout


def repair(project: Path) -> str:
    """Run the project's repair command; returns what it printed."""
    return stage(project, "repair")


def start(project: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start dvc, its output appended to a file: a pipe would stay open as long as the processes that dvc leaves."""
    with output_file(project).open("ab") as file:
        return subprocess.Popen(
            command(*arguments), cwd=project, env=dvc_environment(), stdout=file, stderr=file, start_new_session=True
        )


def output_file(project: Path) -> Path:
    """Where the output of a dvc that was started goes: beside the clone."""
    return project.parent / "dvc-output.txt"


def processes_in(folder: Path) -> list[psutil.Process]:
    """All processes whose working directory is a folder or below it."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
    return found


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL the processes and wait until all have ended."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive


def store(project: Path) -> MlflowClient:
    """A client of the project's MLflow store."""
    return MlflowClient(f"sqlite:///{project / 'mlflow.db'}")


def runs(project: Path) -> list[Run]:
    """All active MLflow runs of the project."""
    client = store(project)
    return list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))


def logged_steps(project: Path, run_id: str) -> list[int]:
    """The steps at which a run logged its training loss."""
    return [point.step for point in store(project).get_metric_history(run_id, "train/loss")]


def artifacts(project: Path, run_id: str) -> set[str]:
    """The names of all artifacts of a run."""
    return {path.name for path in project.glob(f"mlruns/{run_id}/artifacts/**/*") if path.is_file()}


def set_params(project: Path, **sections: dict[str, object]) -> None:
    """Change values in the project's params.yaml."""
    yaml = YAML()
    params = yaml.load((project / "params.yaml").read_text())
    for section, values in sections.items():
        params[section].update(values)
    yaml.dump(params, project / "params.yaml")


def run_queue(project: Path, names: set[str], *, jobs: int) -> None:
    """Run the queue's workers until these experiments exist."""
    assert start(project, "queue", "start", "--jobs", str(jobs)).wait(QUEUE_S) == 0
    try:
        wait_for(lambda: names <= set(experiment_refs(project)), QUEUE_S, pause=0.5)
    finally:
        stop_workers(project)


def stop_workers(project: Path) -> None:
    """Stop the queue's workers, which are daemons, and kill whatever still runs in the project."""
    if processes_in(project):
        dvc(project, "queue", "stop", "--kill", code=None)
    kill(processes_in(project))


def resume_states(project: Path) -> list[Path]:
    """The resume states, from step 40 on, of trainings that are running or were killed: those with a lock."""
    found = (path for lock in project.glob(".runs/*/lock.json") for path in lock.parent.glob("resume-*.pt"))
    return [path for path in found if path.name >= "resume-000000040.pt"]


def experiment_refs(project: Path) -> dict[str, str]:
    """The git reference of each finished DVC experiment, by name."""
    refs = run(["git", "for-each-ref", "--format=%(refname)", "refs/exps"], project).stdout.split()
    return {ref.split("/")[4]: ref for ref in refs if re.match(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/", ref)}
