"""`python -m stages.sync`: whatever a tracking server lacks of the kept runs, it gets; what it has, stays as it is."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from gpt.core.files import sha256_file
from stages import record, sync, tracking
from tests.support.workspace import PAGE_MARK, PARAMS, Workspace, answers, wait_for

Contents = list[dict[str, Any]]


@pytest.fixture
def kept(
    tmp_path: Path, done: Workspace, fresh: tuple[Workspace, list[str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Path]]:
    """A workspace with two run folders and the outputs of the newer one, which dvc.lock describes; no store."""
    other = next(run for run in record.runs(fresh[0].folder) if run.name != done.key)
    for run in (done.run, other):
        shutil.copytree(run, tmp_path / ".runs" / run.name)
    os.utime(tmp_path / ".runs" / done.key)
    shutil.copy(done.folder / "w.pt", tmp_path)
    (tmp_path / "dvc.lock").write_text(f"outs:\n- path: w.pt\n  md5: {hashlib.md5(b'weights').hexdigest()}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    yield [tmp_path / ".runs" / done.key, tmp_path / ".runs" / other.name]


@pytest.fixture(params=["sqlite", "server"])
def store(
    request: pytest.FixtureRequest, kept: list[Path], empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> MlflowClient:
    """A store of each kind, which holds none of our rows."""
    address = f"sqlite:///{Path.cwd()}/mlflow.db"
    if request.param == "sqlite":
        shutil.copyfile(empty_store, "mlflow.db")
    else:
        address = request.getfixturevalue("server")
        wait_for(lambda: answers(address))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    return MlflowClient(address)


def contents(client: MlflowClient) -> Contents:
    """All that the rows hold, the newest first, without the ids and the order that MLflow draws."""
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment
    rows = []
    for row in client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"]):
        named, data = row.info.run_id, row.data
        metrics = {name: client.get_metric_history(named, name) for name in data.metrics}
        with tempfile.TemporaryDirectory() as folder:
            files = [path for path in Path(client.download_artifacts(named, "", folder)).rglob("*") if path.is_file()]
            artifacts = {str(path.relative_to(folder)): sha256_file(path) for path in files}
        rows.append(
            {
                "info": (row.info.run_name, row.info.status, row.info.start_time, row.info.end_time),
                "tags": {k: v.replace(named, "ID") for k, v in data.tags.items() if k != PAGE_MARK},
                "params": data.params,
                "metrics": {k: sorted((m.step, m.timestamp, m.value) for m in v) for k, v in metrics.items()},
                "dataset": [given.dataset.digest for given in row.inputs.dataset_inputs] if row.inputs else [],
                "artifacts": artifacts,
            }
        )
    return rows


def half_of(whole: Contents, client: MlflowClient) -> None:
    """Rows that say they have everything, with half of the figures and params and no artifacts."""
    experiment = client.create_experiment(tracking.EXPERIMENT)
    for row in whole:
        name, _, start, _ = row["info"]
        tags = {k: v for k, v in row["tags"].items() if not k.startswith("mlflow.")}
        made = client.create_run(experiment, start, tags, name).info.run_id
        metrics = [Metric(k, v, time, step) for k, each in row["metrics"].items() for step, time, v in each[::2]]
        client.log_batch(made, metrics=metrics, params=[Param(k, v) for k, v in list(row["params"].items())[::2]])


def test_whatever_is_missing_comes_and_nothing_else_changes(
    kept: list[Path], store: MlflowClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def synced(said: str) -> Contents:
        code, found = sync.main([]), contents(store)
        assert (code, capsys.readouterr().out[: len(said) or None]) == (0, said), found
        return found

    monkeypatch.setattr(tracking, "EXPERIMENT", "one after the other")
    kept[1].rename("away")
    (only,) = synced("stages.sync: brought 1 of 1 run(s) up to date in ")
    Path("away").rename(kept[1])
    os.utime(kept[0])
    whole = synced("stages.sync: brought 1 of 2 run(s) up to date in ")
    assert only in whole
    assert synced("") == whole
    monkeypatch.setattr(tracking, "EXPERIMENT", "half")
    half_of(whole, store)
    assert contents(store) != whole
    assert synced("stages.sync: brought 2 of 2 run(s) up to date in ") == whole
    monkeypatch.setattr(tracking, "EXPERIMENT", "nothing")
    assert synced("stages.sync: brought 2 of 2 run(s) up to date in ") == whole
    assert synced("") == whole
    assert only["artifacts"]["dvc.lock"] == sha256_file(Path("dvc.lock"))
    assert only["artifacts"]["w.pt"] == sha256_file(Path("w.pt"))
    assert only["artifacts"]["pictures/attention.png"] == hashlib.sha256(b"maps").hexdigest()
    assert only["artifacts"]["params.yaml"] == hashlib.sha256(PARAMS.encode()).hexdigest()
    assert [step for step, _, _ in only["metrics"]["train_loss"]] == list(range(12))
    assert ["dvc.lock" in row["artifacts"] for row in whole] == [row == only for row in whole]


def test_what_a_run_continues_from_stays_until_dvc_has_filed_its_result(kept: list[Path]) -> None:
    states = [run / "resume-000000012.pt" for run in kept]
    for state in states:
        state.touch()
    lock = Path("dvc.lock")
    named = lock.read_text()
    for text in (named, "outs: []\n", None):
        lock.write_text(text) if text else lock.unlink()
        if text == named:
            os.utime(lock, (1, 1))  # a fresh clone's: the same bytes have been filed before
        record.drop_states(Path.cwd())
        assert all(state.exists() for state in states)
    lock.write_text(named)
    with FileLock(kept[1] / "lock"):  # a run is under way
        record.drop_states(Path.cwd())
    assert [state.exists() for state in states] == [False, True]
    sync.main([])
    assert [state.exists() for state in states] == [False, False]


def test_what_changed_since_is_brought_and_what_a_person_wrote_stays(
    kept: list[Path], empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: the checkpoint from DVC's cache, and the row of an evaluation that knew no run becomes the run's."""
    shutil.copyfile(empty_store, "mlflow.db")
    client = MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    monkeypatch.setattr(tracking, "EXPERIMENT", "changes")
    shutil.rmtree(kept[1])
    md5 = hashlib.md5(b"weights").hexdigest()
    cached = Path(".dvc/cache/files/md5", md5[:2], md5[2:])
    cached.parent.mkdir(parents=True)
    Path("w.pt").rename(cached)
    Path("w.pt").write_text("others'")
    sha256 = sha256_file(cached)
    evaluated = client.create_run(client.create_experiment("changes"), tags={"checkpoint.sha256": sha256})
    assert sync.main([]) == 0
    (row,) = contents(client)
    assert row["tags"]["run.key"] == kept[0].name
    assert row["artifacts"]["w.pt"] == sha256
    (kept[0] / "row/generate/text.txt").write_text("ROMEO: ah\n")  # as long as before
    client.set_tag(evaluated.info.run_id, "mlflow.note.content", "the best so far")
    Path("dvc.lock").write_text(f"{Path('dvc.lock').read_text()}# of another evaluation\n")
    assert sync.main([]) == 0
    (row,) = contents(client)
    assert row["tags"]["mlflow.note.content"] == "the best so far"
    assert row["artifacts"]["text.txt"] == hashlib.sha256(b"ROMEO: ah\n").hexdigest()
    assert row["artifacts"]["dvc.lock"] == sha256_file(Path("dvc.lock"))
