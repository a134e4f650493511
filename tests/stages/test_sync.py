"""`python -m stages.sync`: a tracking store gets what it lacks of the run folders, and keeps what it has."""

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from gpt.core.files import sha256_file
from stages import sync
from stages.runs.publish import tracking_uri
from stages.runs.run_record import EXPERIMENT, Record, save
from stages.tracking import tracked_run
from tests.support.common import environment, wait_for
from tests.support.workspace import Run, Workspace, answers, experiment_id, runs_in, steps

MD5 = hashlib.md5(b"weights").hexdigest()


@pytest.fixture
def kept(tmp_path: Path, done: Workspace, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A workspace with two run folders and the outputs of the newer one, which dvc.lock describes; no store."""
    runs = [tmp_path / ".runs" / key for key in (done.key, "0" * 64)]
    shutil.copytree(done.run, runs[0])
    other = Record(stage="train", name="other", began=1, ended=2, tags={"run.key": runs[1].name}, params={"a.b": "1"})
    save(runs[1], other, {"params.yaml": "a: {b: 1}"})
    shutil.copy(runs[0] / "history.jsonl", runs[1])
    os.utime(runs[0])
    shutil.copy(done.folder / "w.pt", tmp_path)
    (tmp_path / "dvc.lock").write_text(f"outs:\n- path: w.pt\n  md5: {MD5}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return runs


@pytest.fixture(params=["sqlite", "server"])
def store(
    request: pytest.FixtureRequest, kept: list[Path], empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> MlflowClient:
    """A store of each kind, without our runs."""
    address = f"sqlite:///{Path.cwd()}/mlflow.db"
    if request.param == "sqlite":
        shutil.copyfile(empty_store, "mlflow.db")
    else:
        address = request.getfixturevalue("server")
        wait_for(lambda: answers(address))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return MlflowClient(address)


def move_to(runs: list[Path], experiment: str) -> str:
    """Let the records name another experiment; returns it."""
    for run in runs:
        record = json.loads((run / "row/train.json").read_text())
        (run / "row/train.json").write_text(json.dumps(record | {"experiment": experiment}))
    return experiment


def log_half(runs: list[Run], client: MlflowClient) -> None:
    """Log the runs with all tags, but half of the metrics and params and no artifacts."""
    experiment = client.create_experiment("half")
    for run in runs:
        tags = {k: v for k, v in run["tags"].items() if not k.startswith("mlflow.")}
        created = client.create_run(experiment, run["times"][0], tags, run["name"]).info.run_id
        metrics = [Metric(k, v, time, step) for k, each in run["metrics"].items() for step, time, v in each[::2]]
        client.log_batch(created, metrics=metrics, params=[Param(k, v) for k, v in list(run["params"].items())[::2]])


def test_missing_content_is_published_and_nothing_else_changes(
    kept: list[Path], store: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    def synced(message: str) -> list[Run]:
        code, found = sync.main([]), runs_in(store, name)
        assert (code, capsys.readouterr().out[: len(message) or None]) == (0, message), found
        return found

    name = move_to(kept, "one after the other")
    kept[1].rename("away")
    (only,) = synced("stages.sync: published 1 of 1 run(s) to ")
    Path("away").rename(kept[1])
    os.utime(kept[0])
    whole = synced("stages.sync: published 1 of 2 run(s) to ")
    assert only in whole
    assert synced("") == whole
    name = move_to(kept, "half")
    log_half(whole, store)
    assert synced("stages.sync: published 2 of 2 run(s) to ") == whole
    name = move_to(kept, "nothing")
    assert synced("stages.sync: published 2 of 2 run(s) to ") == whole
    assert steps(only, "train/loss") == list(range(12))
    assert only["artifacts"]["w.pt"] == "weights"
    assert [run["artifacts"].get("dvc.lock") for run in whole] == [None, Path("dvc.lock").read_text()]


def test_sync_rebuilds_what_the_stages_published(
    done: Workspace, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except for system metrics, which only MLflow has, and the results of an earlier evaluation."""
    shutil.copyfile(empty_store, tmp_path / "new.db")
    monkeypatch.setenv("DVC_ROOT", str(done.folder))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'new.db'}")
    monkeypatch.chdir(done.folder)
    assert sync.main([]) == 0
    evaluation = json.loads((done.folder / "m/evaluate.json").read_text()).keys()
    ((before,), (rebuilt,)) = done.runs(), runs_in(MlflowClient(f"sqlite:///{tmp_path / 'new.db'}"))
    for run in (before, rebuilt):
        names = [name for name in run["metrics"] if name.startswith("system/") or name in evaluation]
        latest = {name: max(run["metrics"].pop(name), key=lambda point: point[1])[2] for name in names}
        run["evaluation"] = {name: value for name, value in latest.items() if name in evaluation}
    assert rebuilt == before


def test_changes_are_published_and_a_users_edits_are_kept(
    kept: list[Path], empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: the checkpoint from DVC's cache, and the run of an evaluation without run folder becomes this run."""
    shutil.copyfile(empty_store, "mlflow.db")
    client = MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    monkeypatch.setattr(tracked_run, "dvc_cache", lambda root: root / "cache")
    shutil.rmtree(kept[1])
    cached = Path("cache/files/md5", MD5[:2], MD5[2:])
    cached.parent.mkdir(parents=True)
    Path("w.pt").rename(cached)
    Path("w.pt").write_text("of another run")
    tags = {"checkpoint.sha256": sha256_file(cached)}
    evaluated = client.create_run(client.create_experiment(EXPERIMENT), tags=tags)
    assert sync.main([]) == 0
    (run,) = runs_in(client)
    assert run["tags"]["run.key"] == kept[0].name
    assert run["artifacts"]["w.pt"] == "weights"
    (model,) = client.search_logged_models([experiment_id(client)])
    assert (Path(model.artifact_location.removeprefix("file://")) / "data/w.pt").read_text() == "weights"
    (kept[0] / "row/generate/text.txt").write_text("ROMEO: ah\n")  # as long as before
    client.set_tag(evaluated.info.run_id, "mlflow.note.content", "the best so far")
    Path("dvc.lock").write_text(f"{Path('dvc.lock').read_text()}# of another evaluation\n")
    assert sync.main([]) == 0
    (run,) = runs_in(client)
    assert run["tags"]["mlflow.note.content"] == "the best so far"
    assert run["artifacts"]["text.txt"] == "ROMEO: ah\n"
    assert run["artifacts"]["dvc.lock"] == Path("dvc.lock").read_text()


def test_a_deleted_experiment_is_named_and_after_its_restoration_published_once(
    kept: list[Path], empty_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(empty_store, "mlflow.db")
    client = MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    experiment = client.create_experiment(EXPERIMENT, (Path.cwd() / "mlruns").as_uri())
    client.delete_experiment(experiment)
    assert sync.main([]) == 1
    assert f"mlflow experiments restore --experiment-id {experiment}" in capsys.readouterr().err
    client.restore_experiment(experiment)
    assert [sync.main([]), sync.main([])] == [0, 0]
    assert [run["name"] for run in runs_in(client)] == ["other", "wise-owl"]


def test_a_deleted_run_stays_deleted_until_it_is_restored(
    kept: list[Path], store: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store may be shared, so a command of the user, not another run, brings it back."""
    move_to(kept, "deleted")
    assert sync.main([]) == 0
    before = runs_in(store, "deleted")
    experiment = experiment_id(store, "deleted")
    (run,) = store.search_runs([experiment], f"tags.`run.key` = '{kept[0].name}'")
    store.delete_run(run.info.run_id)
    capsys.readouterr()
    assert [sync.main([]), sync.main([])] == [0, 0]
    printed = capsys.readouterr().out
    assert printed.count(f"mlflow runs restore --run-id {run.info.run_id}") == 1
    assert [run["name"] for run in runs_in(store, "deleted")] == ["other"]
    store.restore_run(run.info.run_id)
    assert sync.main([]) == 0
    assert runs_in(store, "deleted") == before


def test_a_store_of_a_moved_folder_is_refused_and_rebuilt(
    kept: list[Path], empty_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    old = Path.cwd()
    shutil.copyfile(empty_store, "mlflow.db")
    assert sync.main([]) == 0
    moved = old.rename(old.with_name("moved"))
    monkeypatch.chdir(moved)
    assert sync.main([]) == 1
    assert "delete mlflow.db" in capsys.readouterr().err
    for file in moved.glob("mlflow.db*"):
        file.unlink()
    shutil.copyfile(empty_store, "mlflow.db")
    # In a process of its own, since MLflow keeps connections to the deleted file open.
    subprocess.run([sys.executable, "-m", "stages.sync"], env=environment(), check=True)
    runs = runs_in(MlflowClient(f"sqlite:///{moved}/mlflow.db?"))
    assert ["params.yaml" in run["artifacts"] for run in runs] == [True, True]
    assert not old.exists()


def test_artifacts_that_cannot_be_stored_are_added_later(
    kept: list[Path], empty_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything else is there, also if the user has switched on asynchronous logging."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    shutil.copyfile(empty_store, "mlflow.db")
    shutil.rmtree(kept[1])
    Path("mlruns").write_text("no folder")
    assert sync.main([]) == 1
    assert "artifacts not stored: " in capsys.readouterr().err
    client = MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    Path("mlruns").unlink()
    (without,) = runs_in(client)
    assert (without["status"], without["artifacts"], steps(without, "train/loss")) == ("FINISHED", {}, list(range(12)))
    assert sync.main([]) == 0
    (run,) = runs_in(client)
    assert run["artifacts"]["text.txt"] == "ROMEO: hm\n"
    assert {**run, "artifacts": {}, "models": [], "tags": 0} == {**without, "models": [], "tags": 0}


def test_a_store_of_another_mlflow_version_is_named_with_the_remedy(
    kept: list[Path], empty_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(empty_store, "mlflow.db")
    with closing(sqlite3.connect("mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '1bd49d398cd2'")
    assert sync.main([]) == 1
    assert f"mlflow db upgrade sqlite:///{Path.cwd()}/mlflow.db" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "sqlite:////main/mlflow.db"),
        ("sqlite:///a/b.db", "sqlite:////main/a/b.db"),
        ("sqlite:////c.db?x=1", "sqlite:////c.db?x=1"),
        ("http://host/sqlite:///", "http://host/sqlite:///"),
    ],
)
def test_relative_addresses_mean_the_main_workspace(given: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert tracking_uri(Path("/main")) == expected
