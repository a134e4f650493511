"""The wrappers: real processes, real stores, and a child that behaves towards the outside as gpt's verbs do."""

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
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests

from gpt.files import sha256_file
from gpt.fingerprint import run_key
from stages.history import Follower
from stages.launch import option, options, status_of
from stages.log import append_failure, part_of_log
from stages.record import is_held, prune

REPOSITORY = Path(__file__).parents[1]
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
    if plan.get("hang"):
        signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
        pathlib.Path("ready").touch()
        time.sleep(60)
    write(value("--checkpoint"), plan.get("weights", "weights"))
    write(value("--history"), "step,train_loss\n")
    write(value("--validation"), "step,val_loss\n")
    figures = {"val_loss": 1.5, "train_loss": 1.4, "best_step": 10}
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
    write(value("--calibration"), "probability,right\n1,1\n")
else:
    write(value("--out"), "ROMEO: hm\n")
"""

Row = dict[str, Any]


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
        history = "SELECT key, step, timestamp, value FROM metrics WHERE run_uuid = ? ORDER BY key, step, timestamp"
        return {
            "name": name,
            "status": status,
            "times": (start, end),
            "tags": dict(self.sql("SELECT key, value FROM tags WHERE run_uuid = ? ORDER BY key", uuid)),
            "params": dict(self.sql("SELECT key, value FROM params WHERE run_uuid = ? ORDER BY key", uuid)),
            "metrics": self.sql(history, uuid),
            "datasets": self.sql(datasets, uuid),
            "artifacts": {
                str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()
            },
        }


def steps(row: Row, metric: str) -> list[int]:
    return [step for key, step, _, _ in row["metrics"] if key == metric]


def latest(row: Row) -> dict[str, float]:
    return {key: value for key, _, _, value in row["metrics"]}


def ended(process: "subprocess.Popen[str]", code: int = 0) -> str:
    """Wait for a wrapper; returns its stderr."""
    out, err = process.communicate(timeout=40)
    assert process.returncode == code, (process.returncode, out, err)
    return err


def wait_for(what: Callable[[], object], seconds: float = 15) -> None:
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `mlflow server`; starts while the tests before it run."""
    folder = tmp_path_factory.mktemp("server")
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *stores], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(20)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, list[str]]:
    """Two trainings with different keys, started at once on a store that is not there yet; what they said."""
    place = Workspace(tmp_path_factory.mktemp("fresh") / "a b")
    both = [place.train(), place.train("-S", "train.seed=2")]
    return place, [ended(process) for process in both]


@pytest.fixture(scope="module")
def empty_store(fresh: tuple[Workspace, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with our experiment and nothing in it."""
    place = Workspace(tmp_path_factory.mktemp("empty") / "store")
    shutil.copyfile(fresh[0].folder / "mlflow.db", place.folder / "mlflow.db")
    for table in ("metrics", "latest_metrics", "params", "tags", "inputs", "input_tags", "datasets", "runs"):
        place.sql(f"DELETE FROM {table}")
    return place.folder / "mlflow.db"


@pytest.fixture
def place(tmp_path: Path, empty_store: Path) -> Workspace:
    return Workspace(tmp_path / "work space", empty_store)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Workspace:
    """Trained as a DVC experiment, evaluated twice with different settings, and sampled."""
    place = Workspace(tmp_path_factory.mktemp("done") / "work space", empty_store)
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "a"],
    ):
        subprocess.run(["git", *words], cwd=place.folder, check=True)
    place.environment |= {"DVC_EXP_NAME": "wise-owl", "DVC_ROOT": str(place.folder)}
    assert ended(place.train()) == ""
    assert ended(place.evaluate()) == ""
    both = [place.evaluate("-S", "evaluate.batch_size=8", loss=1.25), place.generate(loss=1.25)]
    assert [ended(process) for process in both] == ["", ""]
    return place


def test_two_first_runs_at_once_make_one_sound_store(server: str, fresh: tuple[Workspace, list[str]]) -> None:
    place, said = fresh
    assert said == ["", ""]
    first, second = place.rows()
    assert {first["params"]["train.seed"], second["params"]["train.seed"]} == {"1", "2"}
    assert steps(first, "train_loss") == steps(second, "train_loss") == list(range(12))
    assert place.sql("PRAGMA integrity_check") == [("ok",)]
    assert place.sql("PRAGMA journal_mode") == [("wal",)]


def test_the_row_of_a_trained_model(done: Workspace) -> None:
    (row,) = done.rows()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=done.folder, capture_output=True, text=True, check=True)
    assert (row["name"], row["status"]) == ("wise-owl", "FINISHED")
    expected = {
        "run.key": done.key,
        "checkpoint.sha256": sha256_file(done.folder / "w.pt"),
        "git.commit": commit.stdout.strip(),
        "mlflow.source.git.commit": commit.stdout.strip(),
        "dvc.exp_name": "wise-owl",
        "evaluate.batch_size": "8",
        "generate.prompts": '["ROMEO:"]',
    }
    assert expected.items() <= row["tags"].items()
    assert row["params"] == {
        "download.sha256": "null",
        "download.sources": '["here","https://host/text?…"]',
        "model.n_layer": "1",
        "tokenize.kind": "char",
        "tokenize.train_fraction": "0.9",
        "train.device": "cpu",
        "train.seed": "1",
        "train.shards": "2",
    }
    ((name, digest, source, profile),) = row["datasets"]
    assert (name, digest) == ("corpus", "c" * 36)
    assert "c" * 64 in source
    assert '"train_tokens":9' in profile


def test_every_figure_at_its_recorded_step_and_time(done: Workspace) -> None:
    (row,) = done.rows()
    for metric in ("train_loss", "learning_rate", "grad_norm", "tokens_per_second"):
        assert steps(row, metric) == list(range(12))
    assert steps(row, "val_loss") == [0, 5, 10]
    assert [time for key, step, time, _ in row["metrics"] if (key, step) == ("val_loss", 5)] == [1763700000625]
    figures = {"best_val_loss": 1.5, "best_step": 10, "eval_loss": 1.25, "eval_characters": 7}
    assert figures.items() <= latest(row).items()
    assert [value for key, _, _, value in row["metrics"] if key == "eval_loss"] == [1.5, 1.25]


def test_the_artifacts_of_a_trained_model(done: Workspace) -> None:
    (row,) = done.rows()
    logs = {name: row["artifacts"].pop(name) for name in list(row["artifacts"]) if name.startswith("logs/")}
    assert row["artifacts"] == {
        "w.pt": "weights",
        "params.yaml": PARAMS,
        "history.csv": "step,train_loss\n",
        "validation.csv": "step,val_loss\n",
        "train.json": (done.folder / "m/train.json").read_text(),
        "evaluate.json": '{"loss": 1.25, "characters": 7}',
        "positions.csv": "position,loss\n1,2\n",
        "calibration.csv": "probability,right\n1,1\n",
        "text.txt": "ROMEO: hm\n",
    }
    assert logs["logs/train.log"] == f"2026-11-21 07:00:00 INFO train[{done.key[:8]}]: started\nand continued\n"


def test_the_child_is_told_where_and_how(done: Workspace) -> None:
    before = done.rows()
    ended(done.train(exit=2, say="gpt train: no"), 2)
    assert done.rows() == before, "a run that was refused leaves the row of an earlier one as it is"
    child = done.child()
    end = ["--timeout", "77", "--run-dir", str(done.run), "--log-file", str(done.folder / "gpt_nano.log")]
    assert child["argv"][-6:] == end
    assert child["env"]["OMP_NUM_THREADS"] == "1"
    assert child["env"]["PET_STANDALONE"] == "1"
    assert child["env"]["PET_NPROC_PER_NODE"] in ("1", "2")


def test_sync_leaves_a_full_store_as_it_is_and_rebuilds_a_lost_one(done: Workspace, empty_store: Path) -> None:
    before = done.rows()
    assert ended(done.sync()) == ""
    assert done.rows() == before
    for name in ("mlflow.db", "mlflow.db-wal", "mlflow.db-shm"):
        (done.folder / name).unlink(missing_ok=True)
    shutil.rmtree(done.folder / "mlruns")
    done.take_store(empty_store)
    ended(done.sync())
    (rebuilt,) = done.rows()
    # An evaluation with other settings since then has left its last figures only.
    before[0]["metrics"] = [found for found in before[0]["metrics"] if (found[0], found[3]) != ("eval_loss", 1.5)]
    evaluated = ("eval_characters",)  # unchanged by the second evaluation, so kept with the first one's time
    for row in (before[0], rebuilt):
        row["metrics"] = [found for found in row["metrics"] if found[0] not in evaluated]
    assert rebuilt == before[0]


def test_every_step_once_after_a_kill_and_a_rerun(place: Workspace) -> None:
    wrapper = place.train(steps=8, hang=True)
    wait_for(lambda: (rows := place.rows()) and steps(rows[0], "train_loss") == list(range(8)))  # live
    assert place.rows()[0]["status"] == "RUNNING"
    os.kill(place.child()["pid"], signal.SIGKILL)
    err = ended(wrapper, 137)
    assert err == "stages.train: python ended with exit code 137\n"
    (killed,) = place.rows()
    assert killed["status"] == "KILLED"
    ended(place.train(resume=3, later=500))
    (row,) = place.rows()
    assert row["status"] == "FINISHED"
    assert steps(row, "train_loss") == list(range(12))
    assert set(killed["metrics"]) <= set(row["metrics"])


def test_signals_and_no_orphans(tmp_path: Path, empty_store: Path) -> None:
    asked, killed = Workspace(tmp_path / "asked", empty_store), Workspace(tmp_path / "killed", empty_store)
    places = (asked, killed)
    wrappers = [place.train(steps=1, hang=True) for place in places]
    for place in places:
        wait_for(lambda place=place: (place.folder / "ready").exists() and place.rows())  # type: ignore[misc]
    wrappers[0].send_signal(signal.SIGINT)
    pid = killed.child()["pid"]
    assert is_alive(pid)
    wrappers[1].kill()
    wait_for(lambda: not is_alive(pid), seconds=3)
    assert wrappers[0].poll() is None, "Ctrl-C is the child's to answer"
    wrappers[0].send_signal(signal.SIGTERM)
    wrappers[1].communicate()
    assert killed.rows()[0]["status"] == "RUNNING"
    sync = killed.sync()
    assert ended(wrappers[0], 75) == "stages.train: stopped by SIGTERM\n"
    ended(sync)
    assert [place.rows()[0]["status"] for place in places] == ["KILLED", "KILLED"]


def test_a_store_that_comes_back_before_the_end_gets_everything(place: Workspace) -> None:
    store = place.folder / "mlflow.db"
    sound = store.read_bytes()
    store.write_bytes(b"no database " * 100)
    wrapper = place.train(steps=3, hang=True)
    assert wrapper.stderr
    assert wrapper.stderr.readline().startswith(f"stages.train: not tracked for now, sqlite:///{store}: ")
    wait_for((place.folder / "ready").exists)
    store.write_bytes(sound)
    wrapper.send_signal(signal.SIGTERM)
    assert ended(wrapper, 75) == "stages.train: stopped by SIGTERM\n"
    (row,) = place.rows()
    assert (row["status"], steps(row, "train_loss")) == ("KILLED", [0, 1, 2])


def test_a_refused_run_says_one_line_and_leaves_no_row(place: Workspace) -> None:
    said = "some warning\ngpt train: train.seed: wrong\ngpt train: train.seed: wrong\nTraceback"
    assert ended(place.train(exit=2, say=said), 2) == "gpt train: train.seed: wrong\n"
    assert place.rows() == []
    assert "ended with exit code 2\nsome warning\nTraceback\n" in (place.folder / "gpt_nano.log").read_text()
    (place.folder / "params.yaml").write_text(PARAMS.replace("processes: auto", "processes: 4"))
    line = "stages.train: launch.processes: expected at most train.shards (2), found 4; set it to auto, or raise "
    assert ended(place.train(), 2) == line + "train.shards (which trains another model)\n"


def test_a_checkpoint_without_a_row(place: Workspace) -> None:
    (place.folder / "w.pt").write_text("from elsewhere")
    for process in (place.evaluate(), place.generate()):  # at once
        ended(process)
    (row,) = place.rows()
    assert row["status"] == "FINISHED"
    assert row["tags"]["checkpoint.sha256"] == sha256_file(place.folder / "w.pt")
    assert sorted(row["artifacts"]) == [
        "calibration.csv",
        "evaluate.json",
        "logs/evaluate.log",
        "logs/generate.log",
        "positions.csv",
        "text.txt",
    ]


def test_a_server_that_is_down_costs_a_line_and_sync_publishes_later(place: Workspace, server: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    place.environment["MLFLOW_TRACKING_URI"] = dead.replace("http://", "http://me:secret@")
    err = ended(place.train())
    assert err.startswith(f"stages.train: not tracked for now, {dead}: ")
    assert err.endswith("; `python -m stages.sync` publishes later\n")
    assert (err.count("\n"), err.count("secret")) == (1, 0)
    evaluate, sync = place.evaluate(), place.sync()
    err = ended(evaluate)
    assert err.count("\n") == 1
    assert err.startswith("stages.evaluate: not tracked for now, ")
    assert ended(sync, 1).startswith(f"stages.sync: {dead}: ")
    place.environment["MLFLOW_TRACKING_URI"] = server
    wait_for(lambda: _answers(server), 30)
    assert ended(place.sync()) == ""
    first = _rows_of(server)
    assert ended(place.sync()) == ""
    assert _rows_of(server) == first
    (row,) = first
    assert {"eval_loss", "train_loss", "best_val_loss"} <= {metric["key"] for metric in row["data"]["metrics"]}
    assert row["files"] == [
        "calibration.csv",
        "evaluate.json",
        "history.csv",
        "logs",
        "params.yaml",
        "positions.csv",
        "train.json",
        "validation.csv",
        "w.pt",
    ]
    assert len(row["history"]) == 12


def _answers(server: str) -> bool:
    try:
        return requests.get(f"{server}/health", timeout=5).ok
    except requests.ConnectionError:
        return False


def _rows_of(server: str) -> list[Row]:
    api = f"{server}/api/2.0/mlflow"
    named = requests.get(f"{api}/experiments/get-by-name", {"experiment_name": "chargpt"}, timeout=5).json()
    query = {"experiment_ids": [named["experiment"]["experiment_id"]]}
    rows: list[Row] = requests.post(f"{api}/runs/search", json=query, timeout=5).json()["runs"]
    for row in rows:
        which = {"run_id": row["info"]["run_id"]}
        history = {**which, "metric_key": "train_loss"}
        row["history"] = requests.get(f"{api}/metrics/get-history", history, timeout=5).json()["metrics"]
        found = requests.get(f"{api}/artifacts/list", which, timeout=5).json()["files"]
        row["files"] = sorted(file["path"] for file in found)
    return rows


def test_a_server_that_never_answers_costs_bounded_time(place: Workspace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        place.environment["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "1"  # what a person sets stands; the retries stay ours
        began = time.monotonic()
        assert ended(place.evaluate()).startswith("stages.evaluate: not tracked for now")
    assert time.monotonic() - began < 10


WORKER = """
import os, sys
if sys.argv[1] == "refuse":
    print("gpt train: model.n_head: wrong", file=sys.stderr, flush=True)
    sys.exit(2)
print("a traceback", file=sys.stderr, flush=True)
sys.exit(9 if os.environ["RANK"] == "1" else 0)
"""


def test_through_torchrun(place: Workspace) -> None:
    (place.folder / "worker.py").write_text(WORKER)
    place.environment |= {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{place.folder}", "PET_NPROC_PER_NODE": "2"}
    names = ("--checkpoint", "w.pt", "--params", "params.yaml", "--tokens", "tokens")
    begun = [
        place.start("train", "torchrun", "-m", "worker", kind, *names, "-S", f"train.seed={seed}")
        for seed, kind in enumerate(("refuse", "break"))
    ]
    assert ended(begun[0], 2) == "gpt train: model.n_head: wrong\n"
    err = ended(begun[1], 9)
    assert "a traceback" in err
    assert "exitcode  : 9" in err
    assert "exitcode  : 9" in (place.folder / "gpt_nano.log").read_text()
    (row,) = place.rows()
    assert (row["status"], row["params"]["train.seed"]) == ("FAILED", "1")


def test_the_follower_reads_each_line_once_and_notices_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    follower = Follower(path)

    def lines(*numbers: int, time: int = 1) -> str:
        return "".join(f'{{"step": {n}, "time": {time}, "val_loss": null}}\n' for n in numbers)

    def news() -> list[float]:
        return [point["step"] for point in follower.news()]

    assert news() == []
    path.write_text(lines(1, 2) + '{"step": 3, "ti')
    assert (news(), news()) == ([1, 2], [])
    path.write_text(lines(1, 2, 3) + "torn by a power cut\n" + lines(4))
    assert (news(), news()) == ([3, 4], [])
    path.write_text(lines(1))
    assert (news(), news()) == ([1], [])
    path.write_text(lines(1))
    with path.open("a") as file:
        file.write(lines(2, 3, time=2))
    assert news() == [2, 3]
    path.write_text(lines(1, 2, 3, 4, time=3))  # replaced by a longer one between two looks
    assert news() == [1, 2, 3, 4]


def test_only_the_lines_of_one_run_are_its_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(
        "torn\n2026-11-21 07:00:00 INFO train[aaaaaaaa]: one\nmore\n2026-11-21 07:00:00 INFO download: x\ny\n"
    )
    append_failure(path, "train[aaaaaaaa]", "ended", "last\nwords\n")
    lines = part_of_log(path, "train[aaaaaaaa]").splitlines()
    assert lines[:2] == ["2026-11-21 07:00:00 INFO train[aaaaaaaa]: one", "more"]
    assert lines[2].endswith(" ERROR train[aaaaaaaa]: ended")
    assert lines[3:] == ["last", "words"]


def test_options_of_a_command() -> None:
    command = ["x", "--set", "a.b=1", "-S", "a.c=2", "--out=dir/f", "--set=a.d=3"]
    assert options(command, "--set", "-S") == ["a.b=1", "a.c=2", "a.d=3"]
    assert option(command, "--out") == Path("dir/f")


def test_statuses() -> None:
    assert [status_of(code) for code in (0, 1, 2, 75, 137, 143)] == [
        "FINISHED",
        "FAILED",
        "FAILED",
        "KILLED",
        "KILLED",
        "KILLED",
    ]


def test_old_run_folders_go_except_those_in_use(tmp_path: Path) -> None:
    runs = [tmp_path / ".runs" / (digit * 64) for digit in "abcde"]
    for age, run in enumerate(runs):
        run.mkdir(parents=True)
        os.utime(run, (1000 - age, 1000 - age))
    hold = f"import filelock; lock = filelock.FileLock({str(runs[3] / 'lock')!r}); lock.acquire(); print(); input()"
    holder = subprocess.Popen([sys.executable, "-uc", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout
    holder.stdout.readline()
    os.utime(runs[3], (997, 997))
    try:
        assert (is_held(runs[3]), is_held(runs[0])) == (True, False)
        prune(tmp_path, current=runs[4], keep=1)
    finally:
        holder.communicate(b"\n")
    assert [run.exists() for run in runs] == [True, False, False, True, True]
