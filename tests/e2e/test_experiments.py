"""DVC experiments: queued, in parallel, killed, compared, interrupted, without a network."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from dvc.utils.hydra import apply_overrides
from mlflow.entities import Run
from ruamel.yaml import YAML

from tests.support.common import ROOT, contents, read_yaml, run, stage_line, wait_for
from tests.support.project import (
    OUTPUTS,
    QUEUE_S,
    TRAINED,
    artifacts,
    clone,
    command,
    dvc,
    dvc_environment,
    experiment_refs,
    kill,
    logged_steps,
    output_file,
    processes_in,
    resume_states,
    run_queue,
    runs,
    set_params,
    start,
    stop_workers,
    store,
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Path]:
    """A clone in which nothing has run, so that there is no MLflow store either."""
    folder = clone(tmp_path_factory.mktemp("experiments") / "project", corpus)
    yield folder
    stop_workers(folder)


@pytest.fixture(scope="module")
def grid(project: Path) -> dict[str, float]:
    """Three queued experiments, run two at a time; the first two create the store. Returns learning rates by name."""
    before, rates = workspace_files(project), (0.01, 0.02, 0.03)
    output = dvc(project, "exp", "run", "--queue", "-S", f"train.learning_rate=choice{rates}".replace(" ", "")).stdout
    names = re.findall("Queued experiment '(.+?)'", output)
    run_queue(project, set(names), jobs=2)
    assert workspace_files(project) == before, "the queue changed the main workspace"
    return dict(zip(names, rates, strict=True))


@pytest.mark.proof
def test_queued_experiments_have_one_complete_run_each_in_one_intact_store(
    project: Path, grid: dict[str, float]
) -> None:
    assert sorted(found.info.run_name for found in runs(project)) == sorted(grid) == sorted(experiment_refs(project))
    for found in runs(project):
        name, run_id = found.info.run_name, found.info.run_id
        assert found.info.status == "FINISHED"
        assert found.data.tags["dvc.exp_name"] == name
        assert json.loads(found.data.params["train.learning_rate"]) == grid[name]
        assert logged_steps(project, run_id) == [10, 20, 30, 40]
        assert found.info.artifact_uri.startswith((project / "mlruns").as_uri())
        assert {"chargpt_nano.pt", "evaluate.json", "generation_out.txt"} <= artifacts(project, run_id)
    assert list(project.rglob("mlflow.db")) == [project / "mlflow.db"]
    with closing(sqlite3.connect(project / "mlflow.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert {found.name for found in store(project).search_experiments()} == {"Default", "chargpt"}


@pytest.mark.proof
def test_dvc_compares_the_experiments(project: Path, grid: dict[str, float]) -> None:
    one, other, _ = grid
    header = dvc(project, "exp", "show", "--csv", "--only-changed").stdout.splitlines()[0]
    assert "train.learning_rate" in header
    assert "train.weight_decay" not in header
    revisions = json.loads(dvc(project, "exp", "show", "--json").stdout)
    assert {entry["name"] for found in revisions for entry in found["experiments"] or ()} == set(grid)
    changed = json.loads(dvc(project, "params", "diff", "--json", one, other).stdout)
    assert changed["params.yaml"] == {"train.learning_rate": {"old": 0.01, "new": 0.02, "diff": 0.01}}
    changed = json.loads(dvc(project, "metrics", "diff", "--json", one, other).stdout)
    assert {"old", "new", "diff"} <= set(changed["metrics/evaluate.json"]["val/bits_per_char"])
    dvc(project, "plots", "diff", one, other)
    page = (project / "dvc_plots" / "index.html").read_text()
    for entry in read_yaml(ROOT / "dvc.yaml")["plots"]:
        assert all(page.count(plot["title"]) == 1 for plot in entry.values())
    assert all(f'"rev": "{name}"' in page for name in (one, other))
    assert run(["git", "status", "--short"], project).stdout == ""


@pytest.mark.proof
@pytest.mark.parametrize(("where", "steps"), [("temp", 300), ("queue", 301)])
def test_a_killed_experiment_continues_to_the_same_bytes(
    project: Path, where: str, steps: int, tokens: Path, tmp_path: Path
) -> None:
    """SIGKILL to every process during training, then the same experiment again."""
    before, name = workspace_files(project), f"killed-{where}"
    experiment = ("exp", "run", f"--{where}", "--name", name, "-S", f"train.max_steps={steps}")
    if where == "queue":
        dvc(project, *experiment)
    started = start(project, *(("queue", "start") if where == "queue" else experiment))
    wait_for(lambda: resume_states(project), QUEUE_S)
    kill(processes_in(project))
    started.wait()
    assert resume_states(project)
    resumes = resumes_in_log(project)
    if where == "queue":
        dvc(project, "queue", "kill", name)  # dvc takes the experiment for running until then
    dvc(project, *experiment)
    if where == "queue":
        run_queue(project, {name}, jobs=1)
    assert resumes_in_log(project) == resumes + 1
    assert recorded_outputs(project, name) == train_undisturbed(project, tokens, tmp_path, steps)
    (found,) = [found for found in runs(project) if found.info.run_name == name]
    assert found.info.status == "FINISHED"
    assert sorted(logged_steps(project, found.info.run_id)) == sorted({*range(10, steps, 10), steps})
    assert workspace_files(project) == before
    assert not resume_states(project)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A clone in which the pipeline has run."""
    folder = clone(tmp_path_factory.mktemp("workspace") / "project", corpus)
    dvc(folder, "repro")
    return folder


@pytest.mark.proof
def test_without_a_network_cached_outputs_are_restored_and_new_params_train(workspace: Path) -> None:
    """In a network namespace with the loopback interface only; needs root, as in CI."""
    loopback = "import os, sys; from pyroute2 import IPRoute; IPRoute().link('set', index=1, state='up')"
    offline = ["unshare", "--net", sys.executable, "-c", f"{loopback}; os.execvp(sys.argv[1], sys.argv[1:])"]

    def repro(*stages: str) -> str:
        return run([*offline, *command("repro", *stages)], workspace, env=dvc_environment()).stdout

    before = contents(workspace, OUTPUTS)
    for name in ("data/shakespeare.txt", "chargpt_nano.pt", "generation_out.txt", "plots/history.csv"):
        (workspace / name).unlink()
    shutil.rmtree(workspace / "data" / "tokens")
    assert "Running stage" not in repro()
    assert contents(workspace, OUTPUTS) == before
    set_params(workspace, train={"max_steps": 50})
    assert "Running stage 'train'" in repro("train")
    assert {found.data.params["train.max_steps"] for found in runs(workspace)} == {"40", "50"}


@pytest.mark.proof
def test_a_second_repro_names_the_process_that_holds_the_lock(workspace: Path) -> None:
    """dvc names the running dvc; if dvc was killed and training hangs, the next training waits for it."""
    set_params(workspace, train={"max_steps": 310})
    started = start(workspace, "repro", "train")
    first = psutil.Process(started.pid)
    wait_for(lambda: resume_states(workspace), QUEUE_S)
    tree = first.children(recursive=True)
    for process in tree[1:]:
        process.suspend()
    refused = dvc(workspace, "repro", "train", code=None)
    assert refused.returncode != 0
    assert f"PID {first.pid}" in refused.stderr
    kill([first])
    started.wait()
    output_file(workspace).unlink()
    second = start(workspace, "repro", "train")
    waiting = re.compile(rf"PID (\d+) on {re.escape(socket.gethostname())}")
    holder = wait_for(lambda: waiting.findall(output_file(workspace).read_text()))[0]
    assert int(holder) in {process.pid for process in tree}
    for process in tree[1:]:
        process.resume()  # the signal sent to them when dvc died is pending
    assert second.wait(QUEUE_S) == 0, output_file(workspace).read_text()
    assert "continuing after step" in output_file(workspace).read_text()
    assert not [process for process in tree if process.is_running()]


@pytest.mark.proof
def test_an_interrupted_repro_continues_in_the_same_run(workspace: Path) -> None:
    """Ctrl-C reaches dvc and all its children at once."""
    set_params(workspace, train={"max_steps": 320})
    output_file(workspace).unlink(missing_ok=True)
    running = start(workspace, "repro", "train")
    wait_for(lambda: resume_states(workspace), QUEUE_S)
    os.killpg(running.pid, signal.SIGINT)
    assert running.wait(QUEUE_S) != 0
    output = output_file(workspace).read_text()
    assert re.search(r"^gpt train: .*after step \d+ of 320", output, re.MULTILINE)
    assert "exited with 75" in output
    assert "Traceback" not in output
    assert [found.info.status for found in runs_of(workspace, max_steps=320)] == ["KILLED"]
    assert "continuing after step" in dvc(workspace, "repro", "train").stdout
    assert [found.info.status for found in runs_of(workspace, max_steps=320)] == ["FINISHED"]


@pytest.mark.proof
def test_params_edited_during_training_are_not_recorded_with_its_model(workspace: Path) -> None:
    set_params(workspace, train={"max_steps": 330})
    running = start(workspace, "repro", "train")
    wait_for(lambda: resume_states(workspace), QUEUE_S)
    set_params(workspace, train={"max_steps": 30})
    assert running.wait(QUEUE_S) != 0
    assert re.search(r"^stages\.train: .*train\.max_steps", output_file(workspace).read_text(), re.MULTILINE)
    (trained,) = runs_of(workspace, max_steps=330)
    assert trained.info.status == "FINISHED"  # the results of the training are kept
    assert "Running stage 'train'" in dvc(workspace, "repro", "train").stdout
    assert json.loads((workspace / "metrics" / "train.json").read_text())["val/best_step"] <= 30


@pytest.mark.parametrize("path", [ROOT / "params.yaml", *(ROOT / "presets").glob("*.yaml")], ids=lambda path: path.name)
def test_exp_run_rewrites_only_the_line_of_the_changed_parameter(tmp_path: Path, path: Path) -> None:
    """`dvc exp run -S` writes params.yaml anew, so the files have the layout that it writes."""
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    apply_overrides(copy, ["train.seed=7"])
    old, new = path.read_text().splitlines(), copy.read_text().splitlines()
    (changed,) = [line for line, before in zip(new, old, strict=True) if line != before]
    assert changed.startswith("  seed: 7")


def runs_of(project: Path, max_steps: int) -> list[Run]:
    """The MLflow runs that were trained for so many steps."""
    return [found for found in runs(project) if found.data.params["train.max_steps"] == str(max_steps)]


def workspace_files(project: Path) -> dict[str, str]:
    """The MD5 of every file of the main workspace, except for those of git, DVC, MLflow and the log."""
    excluded = {".git", ".dvc", ".runs", "mlruns", "dvc_plots", "gpt_nano.log"}
    paths = [path.relative_to(project) for path in project.rglob("*") if path.is_file()]
    return {
        str(path): hashlib.md5((project / path).read_bytes()).hexdigest()
        for path in paths
        if path.parts[0] not in excluded and not path.name.startswith("mlflow.db")
    }


def resumes_in_log(project: Path) -> int:
    """How often training has continued from a resume state."""
    path = project / "gpt_nano.log"
    return path.read_text().count("continuing after step") if path.exists() else 0


def recorded_outputs(project: Path, name: str) -> dict[str, str]:
    """The MD5 that dvc.lock of an experiment records for each output of training."""
    lock = YAML(typ="safe").load(run(["git", "show", f"{experiment_refs(project)[name]}:dvc.lock"], project).stdout)
    return {output["path"]: output["md5"] for output in lock["stages"]["train"]["outs"]}


def train_undisturbed(project: Path, tokens: Path, folder: Path, steps: int) -> dict[str, str]:
    """The MD5 of the same files after an uninterrupted training with one process and without dvc."""
    shutil.copy(project / "params.yaml", folder)
    shutil.copytree(tokens, folder / "data" / "tokens")
    run([sys.executable, "-m", "gpt", *stage_line("train", "-S", f"train.max_steps={steps}")], folder)
    return {name: hashlib.md5(content).hexdigest() for name, content in contents(folder, TRAINED).items()}
