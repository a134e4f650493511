"""A workspace for the wrappers: a stand-in for the commands of gpt, real wrappers, and what the MLflow store holds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient, entities

from gpt.core.files import sha256_file
from gpt.core.params import read_params
from gpt.training.fingerprint import run_key
from stages.runs.run_record import EXPERIMENT
from tests.support import fake_gpt
from tests.support.common import environment, free_port, run, wait_for

PARAMS = """\
download: {sources: [here, "https://user:secret@host/text?key=1"], sha256: null}
tokenize: {kind: char, train_fraction: 0.9}
model: {n_layer: 1}
train: {shards: 2, device: cpu, seed: 1}
evaluate: {batch_size: 4}
generate: {prompts: ["ROMEO:"], seed: 1}
launch: {processes: auto, timeout: 77}
"""
Run = dict[str, Any]


class Workspace:
    """A folder like that of a clone, in which the stages train, evaluate and generate can run."""

    def __init__(self, folder: Path, store: Path | None = None) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "params.yaml").write_text(PARAMS)
        (folder / "tokens").mkdir()
        (folder / "tokens/meta.json").write_text(json.dumps({"corpus_sha256": "c" * 64, "train_tokens": 9}))
        user = {name: value for name, value in environment().items() if name.startswith(("MLFLOW_", "DVC_", "PET_"))}
        self.environment = {name: value for name, value in environment().items() if name not in user}
        self.environment["MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"] = "0.2"
        if store:
            shutil.copyfile(store, folder / "mlflow.db")

    def start(self, stage: str, *words: str, **plan: object) -> "subprocess.Popen[str]":
        (self.folder / "plan.json").write_text(json.dumps({"steps": 12, "loss": 1.5, **plan}))
        (self.folder / "ready").unlink(missing_ok=True)
        line, pipe = [sys.executable, "-m", f"stages.{stage}", *words], subprocess.PIPE
        return subprocess.Popen(line, cwd=self.folder, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def go_on(self, *, samples: int) -> None:
        """Let a command that was started with `hold` end when its run has this many samples of system metrics."""
        wait_for(lambda: (runs := self.runs()) and len(steps(runs[0], "system/cpu_utilization_percentage")) >= samples)
        (self.folder / "go").touch()

    def run_gpt(self, verb: str, *words: str, **plan: object) -> "subprocess.Popen[str]":
        common = ("--params", "params.yaml", "--checkpoint", "w.pt")
        return self.start(verb, "python", fake_gpt.__file__, verb, *common, *words, **plan)

    def train(self, *more: str, **plan: object) -> "subprocess.Popen[str]":
        outputs = ("--history", "plots/history.csv", "--validation", "plots/validation.csv")
        return self.run_gpt("train", "--tokens", "tokens", "--metrics", "m/train.json", *outputs, *more, **plan)

    def evaluate(self, *more: str, **plan: object) -> "subprocess.Popen[str]":
        tables = ("positions", "blocks", "calibration")
        outputs = [word for name in tables for word in (f"--{name}", f"plots/{name}.csv")]
        return self.run_gpt("evaluate", "--metrics", "m/evaluate.json", *outputs, *more, **plan)

    def generate(self, **plan: object) -> "subprocess.Popen[str]":
        return self.run_gpt("generate", "--out", "text.txt", **plan)

    def sync(self) -> "subprocess.Popen[str]":
        return self.start("sync")

    def key_with(self, changes: Sequence[str] = ()) -> str:
        return run_key(read_params(self.folder / "params.yaml", changes), self.folder / "tokens")

    @property
    def key(self) -> str:
        return self.key_with()

    @property
    def run(self) -> Path:
        return self.folder / ".runs" / self.key

    def child(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "child.json").read_text())
        return found

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")

    def runs(self) -> list[Run]:
        return runs_in(self.client)


def runs_in(client: MlflowClient, experiment_name: str = EXPERIMENT) -> list[Run]:
    """All that the store holds of our runs, the oldest first, without random ids."""
    if not client.get_experiment_by_name(experiment_name):
        return []
    found = client.search_runs([experiment_id(client, experiment_name)], order_by=["attributes.start_time ASC"])
    return [_contents(client, run) for run in found]


def experiment_id(client: MlflowClient, name: str = EXPERIMENT) -> str:
    experiment = client.get_experiment_by_name(name)
    assert experiment
    return str(experiment.experiment_id)


def _contents(client: MlflowClient, run: entities.Run) -> Run:
    run_id = run.info.run_id
    histories = {name: client.get_metric_history(run_id, name) for name in run.data.metrics}
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
    datasets = [given.dataset for given in run.inputs.dataset_inputs] if run.inputs else []
    tags = {name: value.replace(run_id, "ID") for name, value in run.data.tags.items()}
    tags["mlflow.note.content"] = tags.get("mlflow.note.content", "").partition("<!--")[
        0
    ]  # a digest: of the run id too
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "times": (run.info.start_time, run.info.end_time),
        "tags": tags,
        "params": run.data.params,
        "metrics": {k: sorted((m.step, m.timestamp, m.value) for m in v) for k, v in histories.items()},
        "datasets": [(each.name, each.digest, each.source, each.profile) for each in datasets],
        "artifacts": _artifacts(client, run_id),
        "models": [_model(model) for model in models],
    }


def _model(model: entities.LoggedModel) -> dict[str, Any]:
    metrics = {metric.key: (metric.value, metric.dataset_digest) for metric in model.metrics or []}
    return {"name": model.name, "status": model.status, "tags": model.tags, "params": model.params, "metrics": metrics}


def _artifacts(client: MlflowClient, run_id: str) -> dict[str, str]:
    """The text of the artifacts by path; of a plot, its SHA-256."""
    if not client.list_artifacts(run_id):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(client.download_artifacts(run_id, "", folder))
        files = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
        return {name: sha256_file(path) if path.suffix == ".png" else path.read_text() for name, path in files.items()}


def steps(run: Run, metric: str) -> list[int]:
    return [step for step, _, _ in run["metrics"].get(metric, [])]


def values(run: Run, metric: str) -> list[float]:
    return [value for _, _, value in sorted(run["metrics"][metric], key=lambda point: point[1])]


def ended(process: "subprocess.Popen[str]", code: int = 0) -> str:
    """Wait for a wrapper; returns its stderr."""
    out, err = process.communicate(timeout=90)
    assert process.returncode == code, (process.returncode, out, err)
    return err


def answers(server: str) -> bool:
    """Whether a server is up."""
    with suppress(requests.ConnectionError):
        return requests.get(f"{server}/health", timeout=5).ok
    return False


def start_server(folder: Path, port: int, *words: str, **more: str) -> "subprocess.Popen[bytes]":
    """Start a real `mlflow server` that works in a folder, with more variables, in a process group of its own."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    variables |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", **more}
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *words]
    with (folder / "log").open("a") as log:
        return subprocess.Popen(command, cwd=folder, env=variables, stdout=log, stderr=log, start_new_session=True)


def stop_server(process: "subprocess.Popen[bytes]", number: signal.Signals = signal.SIGTERM) -> None:
    """End a server with all its processes."""
    os.killpg(process.pid, number)
    process.wait(20)


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[str]:
    """The address of a real `mlflow server` that works in a folder; `answers` tells whether it is up already."""
    port = free_port()
    process = start_server(folder, port, *words)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stop_server(process)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server with an empty store; starts while the tests before it run."""
    folder = tmp_path_factory.mktemp("server")
    stores = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    with serving(folder, *stores) as address:
        yield address


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without our experiment; copying it is faster than creating one."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def place(tmp_path: Path, empty_store: Path) -> Workspace:
    return Workspace(tmp_path / "work space", empty_store)


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Workspace:
    """Trained as a DVC experiment, evaluated twice with different params, and sampled."""
    place = Workspace(tmp_path_factory.mktemp("done") / "work space", empty_store)
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "a"]):
        run(["git", *words], place.folder)
    place.environment |= {"DVC_EXP_NAME": "wise-owl", "DVC_ROOT": str(place.folder)}
    train = place.train(hold=True)
    place.go_on(samples=1)
    assert ended(train) == ""
    assert ended(place.evaluate()) == ""
    both = [place.evaluate("-S", "evaluate.batch_size=8", loss=1.25), place.generate(loss=1.25)]
    assert [ended(process) for process in both] == ["", ""]
    return place
