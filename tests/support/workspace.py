"""A clone-like workspace for the wrappers: a child that behaves as gpt's verbs do, and what the store then holds."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from gpt.core.files import sha256_file
from gpt.training.fingerprint import run_key

REPOSITORY = Path(__file__).parents[2]
PARAMS = """\
download: {sources: [here, "https://user:secret@host/text?key=1"], sha256: null}
tokenize: {kind: char, train_fraction: 0.9}
model: {n_layer: 1}
train: {shards: 2, device: cpu, seed: 1}
evaluate: {batch_size: 4}
generate: {prompts: ["ROMEO:"], seed: 1}
launch: {processes: auto, timeout: 77}
"""
# Obeys plan.json: behaves as gpt's verbs do towards the outside, without learning anything.
CHILD = r"""
import json, os, pathlib, signal, sys, time

def value(name):
    return pathlib.Path(sys.argv[sys.argv.index(name) + 1])

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

plan = json.loads(pathlib.Path("plan.json").read_text())
verb = sys.argv[1]
pathlib.Path("child.json").write_text(json.dumps({"argv": sys.argv, "env": dict(os.environ), "pid": os.getpid()}))

def log(about, text):
    with value("--log-file").open("a") as file:
        file.write(f"2026-11-21 07:00:00 INFO {verb}[{about[:8]}]: {text}\n")

def train():
    folder = value("--run-dir")
    folder.mkdir(parents=True, exist_ok=True)
    history = folder / "history.jsonl"
    old = history.read_text().splitlines(keepends=True) if history.exists() else []
    cut = folder / "cut"
    cut.write_text("".join(old[:plan.get("resume", 0)]))
    cut.replace(history)
    log(folder.name, "started\nand continued")
    log("other", "not ours")
    for step in range(plan.get("resume", 0), plan["steps"]):
        point = {"step": step, "train_loss": 3 - step / 100, "learning_rate": 0.1, "grad_norm": 1.0,
                 "time": 1763700000 + plan.get("later", 0) + step / 8, "tokens_per_second": time.perf_counter()}
        if step % 5 == 0:
            point["val_loss"] = 3.5 - step / 100
        line = json.dumps(point) + "\n"
        with history.open("a") as file:
            file.write(line[:20])
            file.flush()
            file.write(line[20:])
    time.sleep(plan.get("rest", 0))
    if plan.get("hang"):
        signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
        pathlib.Path("ready").touch()
        time.sleep(60)
    write(value("--checkpoint"), plan.get("weights", "weights"))
    write(value("--history"), "step,train_loss\n")
    write(value("--validation"), "step,val_loss\n")
    figures = {"val_loss": 1.5, "train_loss": 1.4, "best_step": 10, "parameters": 99}
    write(value("--metrics"), json.dumps(figures))

if "say" in plan:
    print(plan["say"], file=sys.stderr)
if "exit" in plan:
    sys.exit(plan["exit"])
if verb == "train":
    train()
elif verb == "evaluate":
    write(value("--metrics"), json.dumps({"loss": plan["loss"], "characters": 7}))
    write(value("--positions"), "position,loss\n1,2\n")
    write(value("--calibration"), "probability,right,ideal,predictions\n0.5,0.6,0.5,7\n")
    write(value("--pictures") / "attention.png", plan.get("drawn", "maps"))
else:
    write(value("--out"), "ROMEO: hm\n")
"""

Row = dict[str, Any]
PAGE_MARK = "published.page"  # a digest of a text that holds the row's id


class Workspace:
    """A folder like a clone's, and what its store holds, read past MLflow."""

    def __init__(self, folder: Path, store: Path | None = None) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "params.yaml").write_text(PARAMS)
        (folder / "child.py").write_text(CHILD)
        (folder / "tokens").mkdir()
        (folder / "tokens/meta.json").write_text(json.dumps({"corpus_sha256": "c" * 64, "train_tokens": 9}))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DVC_", "PET_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment |= {"PYTHONPATH": str(REPOSITORY), "PATH": path}
        if store:
            self.take_store(store)

    def take_store(self, store: Path) -> None:
        """Copy an empty store, which is faster than making one."""
        shutil.copyfile(store, self.folder / "mlflow.db")
        self.sql("UPDATE experiments SET artifact_location = ?", (self.folder / "mlruns").as_uri())

    def start(self, stage: str, *words: str, **plan: object) -> "subprocess.Popen[str]":
        (self.folder / "plan.json").write_text(json.dumps({"steps": 12, "loss": 1.5, **plan}))
        (self.folder / "ready").unlink(missing_ok=True)
        return subprocess.Popen(
            [sys.executable, "-m", f"stages.{stage}", *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def train(self, *more: str, **plan: object) -> "subprocess.Popen[str]":
        names = ["--checkpoint", "w.pt", "--metrics", "m/train.json", "--history", "plots/history.csv"]
        names += ["--validation", "plots/validation.csv"]
        words = ("train", "--params", "params.yaml", "--tokens", "tokens", *names)
        return self.start("train", "python", "child.py", *words, *more, **plan)

    def evaluate(self, *more: str, **plan: object) -> "subprocess.Popen[str]":
        names = ["--checkpoint", "w.pt", "--metrics", "m/evaluate.json", "--positions", "plots/positions.csv"]
        names += ["--calibration", "plots/calibration.csv", "--params", "params.yaml"]
        return self.start("evaluate", "python", "child.py", "evaluate", *names, *more, **plan)

    def generate(self, **plan: object) -> "subprocess.Popen[str]":
        words = ("generate", "--params", "params.yaml", "--checkpoint", "w.pt", "--out", "text.txt")
        return self.start("generate", "python", "child.py", *words, **plan)

    def sync(self) -> "subprocess.Popen[str]":
        return self.start("sync")

    @property
    def key(self) -> str:
        return run_key(self.folder / "params.yaml", self.folder / "tokens")

    @property
    def run(self) -> Path:
        return self.folder / ".runs" / self.key

    def child(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "child.json").read_text())
        return found

    def sql(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.folder / "mlflow.db")) as database, database:
            return database.execute(query, values).fetchall()

    def rows(self) -> list[Row]:
        """Everything the store holds of each row, without the ids that MLflow draws."""
        query = "SELECT run_uuid, name, status, start_time, end_time, artifact_uri FROM runs ORDER BY start_time"
        return [self._row(*found) for found in self.sql(query)]

    def _row(self, uuid: str, name: str, status: str, start: int, end: int | None, artifacts: str) -> Row:
        folder = self.folder / "mlruns" / uuid / "artifacts"
        assert artifacts == folder.as_uri()
        datasets = """SELECT name, digest, dataset_source, dataset_profile FROM datasets
                      JOIN inputs ON source_id = dataset_uuid WHERE destination_id = ?"""
        tags = "SELECT key, value FROM tags WHERE run_uuid = ? ORDER BY key"
        history = "SELECT key, step, timestamp, value FROM metrics WHERE run_uuid = ? ORDER BY key, step, timestamp"
        return {
            "name": name,
            "status": status,
            "times": (start, end),
            "tags": {name: value.replace(uuid, "ID") for name, value in self.sql(tags, uuid) if name != PAGE_MARK},
            "params": dict(self.sql("SELECT key, value FROM params WHERE run_uuid = ? ORDER BY key", uuid)),
            "metrics": self.sql(history, uuid),
            "datasets": self.sql(datasets, uuid),
            "artifacts": {
                str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()
            },
        }


def content(path: Path) -> str:
    """A file's text; of a picture, its SHA-256."""
    return sha256_file(path) if path.suffix == ".png" else path.read_text()


def steps(row: Row, metric: str) -> list[int]:
    return [step for key, step, _, _ in row["metrics"] if key == metric]


def latest(row: Row) -> dict[str, float]:
    return {key: value for key, _, _, value in row["metrics"]}


def ended(process: "subprocess.Popen[str]", code: int = 0) -> str:
    """Wait for a wrapper; returns its stderr."""
    out, err = process.communicate(timeout=90)
    assert process.returncode == code, (process.returncode, out, err)
    return err


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)


def answers(server: str) -> bool:
    """Whether a server is up."""
    try:
        return requests.get(f"{server}/health", timeout=5).ok
    except requests.ConnectionError:
        return False


@contextmanager
def serving(folder: Path, *words: str) -> Iterator[str]:
    """The address of a real `mlflow server` that works in a folder; whether it is up already, `answers` says."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *words], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server with a store of its own; starts while the tests before it run."""
    folder = tmp_path_factory.mktemp("server")
    stores = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    with serving(folder, *stores) as address:
        yield address


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, list[str]]:
    """Two trainings with different keys, started at once on a store that is not there yet; what they said."""
    place = Workspace(tmp_path_factory.mktemp("fresh") / "a b")
    both = [place.train(), place.train("-S", "train.seed=2")]
    return place, [ended(process) for process in both]


@pytest.fixture(scope="session")
def empty_store(fresh: tuple[Workspace, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with our experiment and nothing in it."""
    place = Workspace(tmp_path_factory.mktemp("empty") / "store")
    with (
        closing(sqlite3.connect(fresh[0].folder / "mlflow.db")) as full,
        closing(sqlite3.connect(place.folder / "mlflow.db")) as copy,
    ):
        full.backup(copy)  # the file alone may lack what is still in its write-ahead log
    for table in ("metrics", "latest_metrics", "params", "tags", "inputs", "input_tags", "datasets", "runs"):
        place.sql(f"DELETE FROM {table}")
    return place.folder / "mlflow.db"


@pytest.fixture
def place(tmp_path: Path, empty_store: Path) -> Workspace:
    return Workspace(tmp_path / "work space", empty_store)


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Workspace:
    """Trained as a DVC experiment, evaluated twice with different settings, and sampled."""
    place = Workspace(tmp_path_factory.mktemp("done") / "work space", empty_store)
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "a"],
    ):
        subprocess.run(["git", *words], cwd=place.folder, check=True)
    place.environment |= {"DVC_EXP_NAME": "wise-owl", "DVC_ROOT": str(place.folder)}
    assert ended(place.train(rest=0.8)) == ""
    assert ended(place.evaluate()) == ""
    both = [place.evaluate("-S", "evaluate.batch_size=8", loss=1.25), place.generate(loss=1.25)]
    assert [ended(process) for process in both] == ["", ""]
    return place
