"""What the stages publish: real wrappers, real stores, and a stand-in for the commands of gpt."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier

import psutil
import pytest
from filelock import FileLock
from mlflow import MlflowClient

from gpt.core.errors import UserError
from gpt.core.files import sha256_file
from stages.tracking.store import Store
from tests.support.common import wait_for
from tests.support.workspace import PARAMS, Workspace, answers, ended, experiment_id, runs_in, serving, steps, values


def test_two_wrappers_that_create_the_store_at_the_same_time(server: str, tmp_path: Path) -> None:
    place = Workspace(tmp_path / "a b")
    both = [place.train(), place.train("-S", "train.seed=2")]
    assert [ended(process) for process in both] == ["", ""]
    runs = place.runs()
    assert {run["params"]["train.seed"] for run in runs} == {"1", "2"}
    assert [steps(run, "train/loss") for run in runs] == [list(range(12))] * 2


def test_workspaces_that_create_the_same_experiment_at_once_all_open_it(server: str, tmp_path: Path) -> None:
    """Each finds none first, since the server answers all of them before the first one creates it."""
    wait_for(lambda: answers(server))
    start = Barrier(8)

    def connect(number: int) -> Store:
        start.wait(20)
        return Store(server, tmp_path / str(number), "at once")

    with ThreadPoolExecutor(8) as threads:
        assert len(list(threads.map(connect, range(8)))) == 8


def test_tags_params_and_dataset_of_a_trained_model(done: Workspace) -> None:
    (run,) = done.runs()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=done.folder, capture_output=True, text=True, check=True)
    assert (run["name"], run["status"]) == ("wise-owl", "FINISHED")
    expected = {
        "run.key": done.key,
        "checkpoint.sha256": sha256_file(done.folder / "w.pt"),
        "mlflow.source.git.commit": commit.stdout.strip(),
        "dvc.exp_name": "wise-owl",
        "run.origin": "training",
        "mlflow.source.name": "dvc.yaml:train",
        "mlflow.source.type": "LOCAL",
    }
    assert expected.items() <= run["tags"].items()
    description = run["tags"]["mlflow.note.content"]
    for part in ("**wise-owl**", "| 1.2500 |", "ROMEO: hm", "--run-id ID "):
        assert part in description
    assert run["params"] == {
        "download.sha256": "null",
        "download.sources": '["here","https://host/text?…"]',
        "model.n_layer": "1",
        "tokenize.kind": "char",
        "tokenize.train_fraction": "0.9",
        "train.device": "cpu",
        "train.seed": "1",
        "train.shards": "2",
    }
    ((name, digest, source, profile),) = run["datasets"]
    assert (name, digest) == ("corpus", "c" * 36)
    assert "c" * 64 in source
    assert '"train_tokens":9' in profile


def test_metrics_at_their_recorded_steps_and_times(done: Workspace) -> None:
    (run,) = done.runs()
    for metric in ("train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second"):
        assert steps(run, metric) == list(range(12))
    assert [(step, time) for step, time, _ in run["metrics"]["val/loss"]][1] == (5, 1763700000625)
    assert steps(run, "val/loss") == [0, 5, 10]
    assert len(steps(run, "system/cpu_utilization_percentage")) > 0
    final = {"val/best_loss": 1.5, "val/best_step": 10, "val/bits_per_char": 1.25, "val/characters": 7}
    assert {name: values(run, name)[-1] for name in final} == final
    assert values(run, "val/bits_per_char") == [1.5, 1.25]


def test_artifacts_of_a_trained_model(done: Workspace) -> None:
    (run,) = done.runs()
    folders = ("logs/", "pictures/", "checksums/")
    special = {name: content for name, content in run["artifacts"].items() if name.startswith(folders)}
    assert {name: content for name, content in run["artifacts"].items() if name not in special} == {
        "w.pt": "weights",
        "params.yaml": PARAMS,
        "history.csv": "step,train/loss\n1,2.99\n",
        "validation.csv": "step,val/loss\n5,3.45\n",
        "train.json": (done.folder / "m/train.json").read_text(),
        "evaluate.json": '{"val/bits_per_char": 1.25, "val/characters": 7}',
        "positions.csv": "position,loss\n1,2\n",
        "blocks.csv": "block,characters,nats\n1,7,10.5\n",
        "calibration.csv": "probability,right,ideal,predictions\n0.5,0.6,0.5,7\n",
        "params/evaluate.json": '{\n  "evaluate.batch_size": "8"\n}',
        "params/generate.json": json.dumps({"generate.prompts": '["ROMEO:"]', "generate.seed": "1"}, indent=2),
        "text.txt": "ROMEO: hm\n",
    }
    sums = [f"checksums/{stage}.sha256" for stage in ("evaluate", "generate", "train")]
    logs = [f"logs/{stage}.log" for stage in ("evaluate", "generate", "train")]
    assert sorted(special) == [*sums, *logs, "pictures/attention.png"]
    assert special["pictures/attention.png"] == hashlib.sha256(b"attention maps").hexdigest()
    digest = hashlib.sha256(b"ROMEO: hm\n").hexdigest()
    assert f"{digest}  text.txt" in special["checksums/generate.sha256"]
    line = f"2026-11-21 07:00:00 INFO train[{done.key[:8]}]: started\n"
    assert special["logs/train.log"] == line
    assert line in (done.folder / "gpt_nano.log").read_text(), "which has every command"


def test_the_logged_model_has_checkpoint_params_and_metrics(done: Workspace) -> None:
    (run,) = done.client.search_runs([experiment_id(done.client)])
    (model,) = done.client.search_logged_models([run.info.experiment_id])
    assert (model.name, model.status, model.source_run_id) == ("chargpt", "READY", run.info.run_id)
    assert model.tags["checkpoint.sha256"] == sha256_file(done.folder / "w.pt")
    assert model.params == run.data.params
    metrics = {metric.key: metric.value for metric in model.metrics}
    assert metrics == {
        "val/best_loss": 1.5,
        "val/best_step": 10,
        "train/parameters": 99,
        "val/bits_per_char": 1.25,
        "val/characters": 7,
    }
    assert {(metric.dataset_name, metric.dataset_digest) for metric in model.metrics} == {("corpus", "c" * 36)}
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    folder = Path(model.artifact_location.removeprefix("file://").replace("%20", " "))
    assert (folder / "data/w.pt").read_text() == "weights"
    assert str(done.folder) not in (folder / "MLmodel").read_text()


def test_variables_of_mlflow_name_run_and_experiment_and_a_parent_groups_runs(place: Workspace) -> None:
    place.environment |= {
        "MLFLOW_EXPERIMENT_NAME": "it's",
        "MLFLOW_RUN_NAME": "mine",
        "CHARGPT_PARENT_RUN": "the sweep's",
    }
    for seed in (1, 2):
        assert ended(place.train("-S", f"train.seed={seed}")) == ""
    del place.environment["MLFLOW_EXPERIMENT_NAME"]
    assert [ended(place.evaluate()), ended(place.sync())] == ["", ""]
    assert place.runs() == []
    runs = runs_in(place.client, "it's")
    assert sorted(run["name"] for run in runs) == ["mine", "mine", "the sweep's"]
    experiment = experiment_id(place.client, "it's")
    (parent,) = place.client.search_runs([experiment], 'attributes.run_name = "the sweep\'s"')
    children = place.client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert sorted(child.data.params["train.seed"] for child in children) == ["1", "2"]
    assert sum("val/bits_per_char" in child.data.metrics for child in children) == 1


def test_a_run_that_is_trained_again_has_the_duration_of_that_training(place: Workspace) -> None:
    assert ended(place.train()) == ""
    (first,) = place.runs()
    time.sleep(2)
    assert ended(place.train()) == ""
    (again,) = place.runs()
    (before, after) = (end - start for start, end in (first["times"], again["times"]))
    assert first["times"][0] == again["times"][0]
    assert after < before + 1900


def test_a_refused_command_changes_no_run_and_gets_its_options(done: Workspace) -> None:
    before = done.runs()
    ended(done.train(exit=2, stderr="gpt train: no"), 2)
    assert done.runs() == before
    child = done.child()
    logs = ["--log-file", str(done.folder / "gpt_nano.log"), "--log-file", str(done.run / "logs/train.log")]
    assert child["argv"][-8:] == ["--timeout", "77", "--run-dir", str(done.run), *logs]
    assert child["env"]["OMP_NUM_THREADS"] == child["env"]["PET_STANDALONE"] == "1"
    assert child["env"]["PET_NPROC_PER_NODE"] in ("1", "2")


def test_every_step_once_after_a_kill_and_a_rerun(place: Workspace) -> None:
    wrapper = place.train(steps=8, hang=True)
    wait_for(lambda: (runs := place.runs()) and steps(runs[0], "train/loss") == list(range(8)))  # live
    wait_for(lambda: steps(place.runs()[0], "system/cpu_utilization_percentage"))
    assert place.runs()[0]["status"] == "RUNNING"
    os.kill(place.child()["pid"], signal.SIGKILL)
    assert ended(wrapper, 137) == "stages.train: python ended with exit code 137\n"
    (killed,) = place.runs()
    assert killed["status"] == "KILLED"
    wrapper = place.train(resume=3, later=500, hold=True)
    place.go_on(samples=len(steps(killed, "system/cpu_utilization_percentage")) + 1)
    assert ended(wrapper) == ""
    (run,) = place.runs()
    samples = steps(run, "system/cpu_utilization_percentage")
    assert samples == list(range(len(samples)))
    assert run["status"] == "FINISHED"
    assert steps(run, "train/loss") == list(range(12))
    assert set(killed["metrics"]["train/loss"]) <= set(run["metrics"]["train/loss"])


def test_signals_leave_no_orphans_and_sync_corrects_the_runs_of_killed_wrappers(place: Workspace) -> None:
    stopped, killed, late = (place.train("-S", f"train.seed={seed}", steps=1, hang=True) for seed in range(3))

    def status() -> list[str]:
        return [run["status"] for run in sorted(place.runs(), key=lambda run: str(run["params"]["train.seed"]))]

    wait_for(lambda: [steps(run, "train/loss") for run in place.runs()] == [[0]] * 3)
    stopped.send_signal(signal.SIGINT)
    (child,) = psutil.Process(killed.pid).children()
    killed.kill()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    with FileLock(place.folder / ".runs/store.lock"):  # so that `late` cannot publish its end
        late.send_signal(signal.SIGTERM)
        wait_for(lambda: any('"KILLED"' in path.read_text() for path in place.folder.glob(".runs/*/row/train.json")))
        late.kill()
    for wrapper in (killed, late):
        wrapper.communicate()
    assert status() == ["RUNNING"] * 3
    assert ended(place.sync()) == ""
    assert status() == ["RUNNING", "KILLED", "KILLED"]
    assert stopped.poll() is None, "Ctrl-C is handled by the child"
    stopped.send_signal(signal.SIGTERM)
    assert ended(stopped, 75) == "stages.train: stopped by SIGTERM\n"
    assert status() == ["KILLED"] * 3


def test_a_store_that_becomes_available_before_the_end_gets_everything(place: Workspace) -> None:
    """A damaged store costs one line with the remedy."""
    store = place.folder / "mlflow.db"
    sound = store.read_bytes()
    store.write_bytes(b"no database " * 100)
    wrapper = place.train(steps=3, hang=True)
    assert wrapper.stderr
    line = wrapper.stderr.readline()
    for part in (f"stages.train: tracking is unavailable (sqlite:///{store})", "delete mlflow.db", "stages.sync"):
        assert part in line
    wait_for((place.folder / "ready").exists)
    store.write_bytes(sound)
    wrapper.send_signal(signal.SIGTERM)
    assert ended(wrapper, 75) == "stages.train: stopped by SIGTERM\n"
    (run,) = place.runs()
    assert (run["status"], steps(run, "train/loss")) == ("KILLED", [0, 1, 2])


def test_a_store_that_is_deleted_or_replaced_while_it_is_open_is_noticed(place: Workspace) -> None:
    """MLflow's open connections would go on writing to the deleted file."""
    file = place.folder / "mlflow.db"
    store = Store(f"sqlite:///{file}", place.folder, "chargpt")
    store.check_file()
    content = file.read_bytes()
    file.rename(file.with_name("kept.db"))
    with pytest.raises(UserError, match=r"mlflow\.db was deleted"):
        store.check_file()
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"mlflow\.db was deleted or replaced"):
        store.check_file()


def test_a_refused_command_leaves_its_message_and_no_run(place: Workspace) -> None:
    stderr = "some warning\ngpt train: train.seed: wrong\ngpt train: train.seed: wrong\nTraceback"
    assert ended(place.train(exit=2, stderr=stderr), 2) == "gpt train: train.seed: wrong\n"
    assert place.runs() == []
    assert not place.run.exists()
    assert "ended with exit code 2\nsome warning\nTraceback\n" in (place.folder / "gpt_nano.log").read_text()
    (place.folder / "params.yaml").write_text(PARAMS.replace("processes: auto", "processes: 4"))
    assert ended(place.train(), 2).startswith("stages.train: launch.processes: ")


def test_a_checkpoint_without_a_run_folder(place: Workspace) -> None:
    (place.folder / "w.pt").write_text("from elsewhere")
    for process in (place.evaluate(), place.generate()):  # at the same time
        ended(process)
    (run,) = place.runs()
    assert run["status"] == "FINISHED"
    assert run["tags"]["checkpoint.sha256"] == sha256_file(place.folder / "w.pt")
    found = {"evaluate.json", "logs/evaluate.log", "logs/generate.log", "pictures/attention.png", "text.txt"}
    assert found <= set(run["artifacts"])


def test_a_server_that_is_down_costs_a_line_and_sync_publishes_later(place: Workspace, server: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    place.environment["MLFLOW_TRACKING_URI"] = dead.replace("http://", "http://me:secret@")
    evaluate: subprocess.Popen[str] | None = None
    for stage in ("train", "evaluate"):
        evaluate = place.train() if stage == "train" else place.evaluate()
        err = ended(evaluate)
        assert err.startswith(f"stages.{stage}: tracking is unavailable ({dead}): ")
        assert "`python -m stages.sync`" in err
        assert (err.count("\n"), err.count("secret")) == (1, 0)
    assert ended(place.sync(), 1).startswith(f"stages.sync: {dead}: ")
    place.environment["MLFLOW_TRACKING_URI"] = server
    wait_for(lambda: answers(server))
    assert ended(place.sync()) == ""
    client = MlflowClient(server)
    first = runs_in(client)
    assert ended(place.sync()) == ""
    assert runs_in(client) == first
    (run,) = first
    assert {"val/bits_per_char", "val/best_loss"} <= set(run["metrics"])
    assert steps(run, "train/loss") == list(range(12))
    assert {"w.pt", "params.yaml", "evaluate.json", "pictures/attention.png"} <= set(run["artifacts"])


@pytest.mark.proof
def test_a_server_below_a_path_is_reached_without_the_proxy_of_the_environment(
    place: Workspace, tmp_path: Path
) -> None:
    """The address has a path, as behind a reverse proxy; the proxy for outgoing requests does not exist."""
    (tmp_path / "server").mkdir()
    stores = ["--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", "files"]
    with serving(tmp_path / "server", *stores, "--static-prefix", "/team") as server:
        place.environment |= {"MLFLOW_TRACKING_URI": f"{server}/team", "http_proxy": "http://127.0.0.1:9"}
        wait_for(lambda: answers(f"{server}/team") or answers(server), 60)
        assert ended(place.train()) == ""
        (run,) = runs_in(MlflowClient(f"{server}/team"))
        assert "val/best_loss" in run["metrics"]
        assert {"w.pt", "params.yaml"} <= set(run["artifacts"])


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_server_that_never_answers_does_not_block_the_stage(place: Workspace, stage: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        place.environment["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "1"  # the user's value is kept; the retries are ours
        process = place.train() if stage == "train" else place.evaluate()
        assert ended(process).startswith(f"stages.{stage}: tracking is unavailable")
