"""A model from its training to others: promoted, served by MLflow, pulled by a colleague, downloaded from git."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import requests

from gpt.core.files import sha256_file
from stages.runs.run_record import EXPERIMENT
from tests.support.clones import git, plain, share
from tests.support.common import free_port, run, wait_for
from tests.support.project import CHECKPOINT, artifacts, clone, dvc, dvc_environment, logged_steps, runs, stage, store

pytestmark = pytest.mark.proof

VERSION = "chargpt@v1.0.0"  # a git tag in the format of GTO


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A clone in which the pipeline has run; its results are in a bare git repository and in a DVC remote."""
    folder = tmp_path_factory.mktemp("release")
    project = clone(folder / "project", corpus, launch__processes=1, train__max_steps=200)
    dvc(project, "repro")
    stage(project, "sync")
    share(project, str(folder / "storage"))
    git(project, "tag", "--annotate", "--message", "first release", VERSION)
    git(project, "push", "--quiet", "origin", VERSION)
    return project


def origin(project: Path) -> Path:
    return project.with_name("origin.git")


def generated(project: Path) -> str:
    options = ["--prompt", "the ", "--max-new-tokens", "20", "--seed", "1"]
    command = [sys.executable, "-m", "gpt", "generate", "--checkpoint", CHECKPOINT, *options]
    return run(command, project).stdout.removesuffix("\n")


def test_mlflow_serves_the_promoted_model(project: Path, tmp_path: Path) -> None:
    assert "promoted" in stage(project, "promote")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    options = ["--env-manager", "local", "--port", str(port), "--workers", "1"]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/chargpt@champion", *options],
        cwd=tmp_path,
        env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}"},
        start_new_session=True,
    )
    try:
        wait_for(lambda: answers(f"{address}/health"), 90)
        body = {"inputs": ["the "], "params": {"max_new_tokens": 20, "seed": 1}}
        answer = requests.post(f"{address}/invocations", json=body, timeout=60).json()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    assert answer == {"predictions": [generated(project)]}


def test_the_server_of_the_project_serves_the_champion(project: Path) -> None:
    line = [sys.executable, "-m", "stages.serve", "--port", "0", "--watch", "1"]
    with subprocess.Popen(line, cwd=project, env=dvc_environment(), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        name, _, address = server.stdout.readline().strip().partition(": ")
        try:
            wait_for(lambda: answers(f"{address}/health"))
            body = {"prompt": "the ", "max_tokens": 20, "seed": 1}
            (choice,) = requests.post(f"{address}/v1/completions", json=body, timeout=60).json()["choices"]
        finally:
            server.send_signal(signal.SIGTERM)
    assert (name, "the " + choice["text"], server.returncode) == ("chargpt@champion", generated(project), 0)


def answers(address: str) -> bool:
    with suppress(requests.ConnectionError):
        return requests.get(address, timeout=5).ok
    return False


def test_a_colleague_pulls_the_model_and_gets_its_run(project: Path) -> None:
    colleague = plain(origin(project), project.parent)
    dvc(colleague, "pull")
    dvc(colleague, "exp", "run", "-S", "evaluate.seed=5")  # `sync` adds params and curves to its run
    stage(colleague, "sync")
    (theirs,), (ours,) = runs(project), runs(colleague)
    assert ours.data.params == theirs.data.params
    same = ("val/best_loss", "val/bits_per_char", "val/loss")
    assert [ours.data.metrics[name] for name in same] == pytest.approx([theirs.data.metrics[name] for name in same])
    assert logged_steps(colleague, ours.info.run_id) == logged_steps(project, theirs.info.run_id)
    assert {CHECKPOINT, "params.yaml", "generation_out.txt", "dvc.lock"} <= artifacts(colleague, ours.info.run_id)
    (model,) = store(colleague).search_logged_models([ours.info.experiment_id])
    assert (model.name, model.status) == (EXPERIMENT, "READY")
    dvc(colleague, "exp", "run", "-S", "evaluate.seed=6")
    (only,) = runs(colleague)
    assert (only.info.run_id, only.data.params) == (ours.info.run_id, ours.data.params)
    assert stage(colleague, "promote").count("promoted") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("artifacts", "get", "ORIGIN", "chargpt", "--rev", "v1.0.0", "--out", "model.pt"),
        ("artifacts", "get", "PROJECT", "chargpt", "--out", "model.pt"),
        ("get", "ORIGIN", CHECKPOINT, "--rev", VERSION, "--out", "model.pt"),
    ],
    ids=["version", "clone", "path"],
)
def test_dvc_downloads_the_model_from_git(project: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    places = {"ORIGIN": origin(project).as_uri(), "PROJECT": str(project)}
    dvc(tmp_path, *(places.get(word, word) for word in arguments))
    assert sha256_file(tmp_path / "model.pt") == sha256_file(project / CHECKPOINT)


def test_dvc_imports_the_model_into_another_repository(project: Path, tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    dvc(tmp_path, "init", "--quiet")
    dvc(tmp_path, "import", origin(project).as_uri(), CHECKPOINT)
    assert sha256_file(tmp_path / CHECKPOINT) == sha256_file(project / CHECKPOINT)
    assert (tmp_path / f"{CHECKPOINT}.dvc").exists()
