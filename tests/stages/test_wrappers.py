"""The wrappers: real processes, real stores, and a child that behaves towards the outside as gpt's verbs do."""

import hashlib
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import requests

from gpt.core.files import sha256_file
from stages.history import Follower
from stages.launch import option, options, status_of
from stages.log import append_failure, part_of_log
from stages.record import is_held, prune
from tests.support.common import environment
from tests.support.workspace import PARAMS, REPOSITORY, Row, Workspace, answers, ended, latest, steps, wait_for


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
        "parameters": "99",
        "evaluate.batch_size": "8",
        "generate.prompts": '["ROMEO:"]',
    }
    assert expected.items() <= row["tags"].items()
    page = row["tags"]["mlflow.note.content"]
    for part in ("**wise-owl**", "| 1.2500 |", "ROMEO: hm", "dvc exp apply wise-owl", "--run-id ID "):
        assert part in page, "of all three stages"
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
    for metric in ("cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_available_megabytes"):
        assert steps(row, f"system/{metric}") == [0]
    assert [time for key, step, time, _ in row["metrics"] if (key, step) == ("val_loss", 5)] == [1763700000625]
    figures = {"best_val_loss": 1.5, "best_step": 10, "eval_loss": 1.25, "eval_characters": 7}
    assert figures.items() <= latest(row).items()
    assert [value for key, _, _, value in row["metrics"] if key == "eval_loss"] == [1.5, 1.25]


def test_the_artifacts_of_a_trained_model(done: Workspace) -> None:
    (row,) = done.rows()
    folders = ("logs/", "pictures/")
    logs = {name: row["artifacts"].pop(name) for name in list(row["artifacts"]) if name.startswith(folders)}
    assert row["artifacts"] == {
        "w.pt": "weights",
        "params.yaml": PARAMS,
        "history.csv": "step,train_loss\n",
        "validation.csv": "step,val_loss\n",
        "train.json": (done.folder / "m/train.json").read_text(),
        "evaluate.json": '{"loss": 1.25, "characters": 7}',
        "positions.csv": "position,loss\n1,2\n",
        "calibration.csv": "probability,right,ideal,predictions\n0.5,0.6,0.5,7\n",
        "text.txt": "ROMEO: hm\n",
    }
    pictures = [f"pictures/{name}.png" for name in ("attention", "calibration", "learning_rate", "loss")]
    pictures.append("pictures/loss_by_position.png")
    assert sorted(logs) == ["logs/evaluate.log", "logs/generate.log", "logs/train.log", *pictures]
    assert logs["pictures/attention.png"] == hashlib.sha256(b"maps").hexdigest(), "what the command itself drew"
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
    ended(place.train(resume=3, later=500, rest=0.8))
    (row,) = place.rows()
    samples = steps(row, "system/cpu_utilization_percentage")
    assert samples == list(range(len(samples)))
    assert len(samples) > len(steps(killed, "system/cpu_utilization_percentage")) > 0
    assert row["status"] == "FINISHED"
    assert steps(row, "train_loss") == list(range(12))
    assert set(killed["metrics"]) <= set(row["metrics"])


def test_a_store_whose_making_was_killed_is_made_by_the_next(tmp_path: Path) -> None:
    place = Workspace(tmp_path / "new")
    for wait_s in (0.0, 0.2):  # MLflow needs about a second to make its tables
        killed = place.train(hang=True)
        wait_for((place.folder / "mlflow.db.making").exists)
        time.sleep(wait_s)
        killed.kill()
        killed.communicate()
        assert not (place.folder / "mlflow.db").exists()
    assert ended(place.train(rest=0.8)) == ""
    (row,) = place.rows()
    assert row["status"] == "FINISHED"
    assert [path.name for path in place.folder.glob("mlflow.db.*")] == []


def test_signals_no_orphans_and_no_row_left_running(place: Workspace) -> None:
    """The next command sees to the rows of wrappers that were killed, and leaves those of living ones alone."""
    wrappers = [place.train("-S", f"train.seed={seed}", steps=1, hang=True) for seed in range(3)]
    asked, killed, late = wrappers

    def status() -> list[str]:
        return [row["status"] for row in sorted(place.rows(), key=lambda row: str(row["params"].get("train.seed")))]

    wait_for(lambda: [steps(row, "train_loss") for row in place.rows()] == [[0]] * 3)
    asked.send_signal(signal.SIGINT)
    (child,) = psutil.Process(killed.pid).children()
    killed.kill()
    psutil.wait_procs([child], timeout=3)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    with closing(sqlite3.connect(place.folder / "mlflow.db", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")  # so that what it writes down at its end cannot be published any more
        late.send_signal(signal.SIGTERM)
        wait_for(lambda: any('"KILLED"' in path.read_text() for path in place.folder.glob(".runs/*/row/train.json")))
        late.kill()
    for wrapper in (killed, late):
        wrapper.communicate()
    assert status() == ["RUNNING", "RUNNING", "RUNNING"]
    (place.folder / "w.pt").write_text("from elsewhere")
    ended(place.evaluate())
    assert status() == ["RUNNING", "KILLED", "KILLED", "FINISHED"]
    assert asked.poll() is None, "Ctrl-C is the child's to answer"
    asked.send_signal(signal.SIGTERM)
    assert ended(asked, 75) == "stages.train: stopped by SIGTERM\n"
    assert status() == ["KILLED", "KILLED", "KILLED", "FINISHED"]


@pytest.mark.parametrize(("left", "begins"), [("; true", True), ("&", False)], ids=["dvc waits", "dvc is gone"])
def test_a_stage_that_dvc_did_not_live_to_see_does_not_begin(tmp_path: Path, left: str, begins: bool) -> None:
    """Killed while Python was still starting, dvc could leave a stage that nobody ends."""
    stage = f"{sys.executable} -m stages.generate sh -c 'touch ran' --checkpoint w.pt --out text.txt"
    variables = environment(DVC_STAGE="generate", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    shell = subprocess.Popen(
        ["sh", "-c", f"{stage} {left}"], cwd=tmp_path, env=variables, start_new_session=True, stderr=subprocess.PIPE
    )
    shell.communicate(timeout=60)  # until the stage, too, has closed its end
    assert (tmp_path / "ran").exists() == begins


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
        "pictures/attention.png",
        "pictures/calibration.png",
        "pictures/loss_by_position.png",
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
    wait_for(lambda: answers(server), 30)
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
        "pictures",
        "positions.csv",
        "train.json",
        "validation.csv",
        "w.pt",
    ]
    assert len(row["history"]) == 12


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
import os, signal, sys, time
if sys.argv[1] == "refuse":
    sys.stderr.write("gpt train: model.n_head: wrong\\n")  # as gpt/__main__.py does
    sys.exit(2)
if os.environ["RANK"] == "0":
    time.sleep(60)
print("a traceback", file=sys.stderr, flush=True)
if sys.argv[1] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(9)
"""
BEGINS = r"stages.train: rank 1 \(PID \d+\)"
ENDS = r"after \d+ s; run again to continue; details in gpt_nano.log\n"


def test_through_torchrun(place: Workspace) -> None:
    """What a worker says reaches the person; of one that could not say anything, the wrapper does, in one line."""
    (place.folder / "worker.py").write_text(WORKER)
    place.environment |= {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{place.folder}", "PET_NPROC_PER_NODE": "2"}
    names = ("--checkpoint", "w.pt", "--params", "params.yaml", "--tokens", "tokens")
    refused, broken, killed = (
        place.start("train", "torchrun", "-m", "worker", kind, *names, "-S", f"train.seed={seed}")
        for seed, kind in enumerate(("refuse", "break", "die"))
    )
    assert ended(refused, 2) == "gpt train: model.n_head: wrong\n"
    assert re.fullmatch(f"a traceback\n{BEGINS} ended with exit code 9 {ENDS}", ended(broken, 9))
    assert re.fullmatch(f"{BEGINS} was killed by SIGKILL {ENDS}", ended(killed, 137))
    log = (place.folder / "gpt_nano.log").read_text()
    for line in ("exitcode  : 9 ", "exitcode  : -9 ", "worker FAILED"):
        assert line in log, "torchrun's own words are kept there"
    rows = {row["params"]["train.seed"]: row["status"] for row in place.rows()}
    assert rows == {"1": "FAILED", "2": "KILLED"}


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
