"""`python -m stages.sweep` with the real dvc: trials, pruning, an interruption, and the runs in MLflow."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages.runs.run_record import EXPERIMENT
from tests.support.common import run, wait_for
from tests.support.project import clone, dvc, dvc_environment, store

pytestmark = pytest.mark.proof

SPACES = ["-S", "train.learning_rate=tag(log,interval(0.0001,0.03))", "-S", "model.n_layer=range(1,3)"]


def test_a_sweep_is_interrupted_continued_and_applied(tmp_path: Path, corpus: Path) -> None:
    project = clone(tmp_path / "a project", corpus, launch__processes=1, train__max_steps=400, train__eval_interval=20)
    line = [sys.executable, "-m", "stages.sweep", "search", "--trials", "8", *SPACES]
    with (project / "output.txt").open("w") as output:
        first = subprocess.Popen(line, cwd=project, env=dvc_environment(), stdout=output)
    wait_for(lambda: "search-2: " in (project / "output.txt").read_text(), 120)
    wait_for(lambda: len(list((project / ".runs").glob("*/history.jsonl"))) == 2, 60)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 130
    text = (project / "output.txt").read_text()
    values = re.findall(r"search-2: (.*)", text)[0]
    second = run(line, project, env=dvc_environment()).stdout
    assert re.findall(r"search-3: (.*)", second)[0] == values  # the interrupted trial again
    losses = {name: float(loss) for name, loss in re.findall(r"(search-\d+): val/best_loss ([\d.]+)", text + second)}
    stopped = re.findall(r"(search-\d+): stopped", text + second)
    assert len(losses) + len(stopped) == 8
    assert stopped
    best = min(losses, key=lambda name: losses[name])
    assert second.splitlines()[-1] == f"dvc exp apply {best}"
    assert set(dvc(project, "exp", "list", "--name-only").stdout.split()) == set(losses)
    client = store(project)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment
    found = client.search_runs([experiment.experiment_id])
    (parent,) = [each for each in found if each.info.run_name == "search"]
    children = {each.info.run_name for each in found if each.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert set(losses) <= children
    assert run(line, project, env=dvc_environment()).stdout.splitlines()[-1] == f"dvc exp apply {best}"  # nothing to do
