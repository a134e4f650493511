"""The whole pipeline as people run it: a clone, the real dvc, torchrun and MLflow, on a made-up text."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from gpt.core.files import sha256_file
from tests.support.common import ROOT, environment
from tests.support.project import OUTPUTS, artifacts, clone, contents, dvc, rows, set_processes


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A clone in a folder with a space in its name, the pipeline run once by two processes."""
    folder = clone(tmp_path_factory.mktemp("a clone") / "of it", corpus)
    set_processes(folder, 2)
    done = dvc(folder, "repro")
    assert "Running stage 'generate'" in done.stdout
    return folder


def test_everything_is_made_and_nothing_else(project: Path) -> None:
    assert all((project / name).stat().st_size for name in OUTPUTS)
    status = subprocess.run(
        ["git", "status", "--short"], cwd=project, text=True, capture_output=True, check=True
    ).stdout
    changed = {line.split(maxsplit=1)[1] for line in status.splitlines()}
    assert changed <= {"dvc.lock", "params.yaml", "metrics/", "plots/"} | {
        n for n in OUTPUTS if "metrics" in n or "plots" in n
    }
    assert list(project.glob(".runs/*/history.jsonl"))
    assert list(project.glob(".runs/*/resume-*")) == []


def test_a_second_run_does_nothing(project: Path) -> None:
    log = (project / "gpt_nano.log").read_text()
    done = dvc(project, "repro")
    assert "Data and pipelines are up to date" in done.stdout
    assert (project / "gpt_nano.log").read_text() == log


def test_every_command_logs(project: Path) -> None:
    log = (project / "gpt_nano.log").read_text()
    for verb in ("download", "tokenize", "train", "evaluate", "generate"):
        assert f" {verb}" in log
        assert "started" in log


def test_one_row_holds_all_of_the_model(project: Path) -> None:
    (row,) = rows(project)
    assert row.info.status == "FINISHED"
    assert row.data.params["train.max_steps"] == "40"
    assert row.data.params["model.n_embd"] == "32"
    digest = subprocess.run(
        ["sha256sum", "chargpt_nano.pt"], cwd=project, text=True, capture_output=True, check=True
    ).stdout.split()[0]
    assert row.data.tags["checkpoint.sha256"] == digest
    assert len(row.data.tags["run.key"]) == 64
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, text=True, capture_output=True, check=True).stdout
    assert row.data.tags["git.commit"] == head.strip()
    figures = json.loads((project / "metrics" / "evaluate.json").read_text())
    assert row.data.metrics["eval_bits_per_char"] == figures["bits_per_char"]
    assert row.inputs is not None
    (dataset,) = row.inputs.dataset_inputs
    corpus_digest = json.loads((project / "data" / "tokens" / "meta.json").read_text())["corpus_sha256"]
    assert corpus_digest.startswith(dataset.dataset.digest)
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    steps = [metric.step for metric in client.get_metric_history(row.info.run_id, "train_loss")]
    assert steps == [10, 20, 30, 40]
    names = artifacts(client, row.info.run_id)
    for name in ("chargpt_nano.pt", "params.yaml", "history.csv", "generation_out.txt", "pictures/attention.png"):
        assert any(path.endswith(name) for path in names), names
    assert any(path.endswith(".log") for path in names)
    assert (project / "mlruns").is_dir()


def test_one_process_in_another_folder_gives_the_same_bytes(project: Path, corpus: Path, tmp_path: Path) -> None:
    other = clone(tmp_path / "other", corpus)
    set_processes(other, 1)
    dvc(other, "repro")
    assert contents(other) == contents(project)


def test_sampling_otherwise_trains_nothing_and_makes_no_row(project: Path) -> None:
    done = dvc(project, "repro", "--force", "--single-item", "generate")
    assert "Running stage 'generate'" in done.stdout
    assert len(rows(project)) == 1


def test_an_experiment_is_a_second_row(project: Path) -> None:
    weights = (project / "chargpt_nano.pt").read_bytes()
    dvc(project, "exp", "run", "--name", "faster", "-S", "train.learning_rate=0.02")
    assert (project / "chargpt_nano.pt").read_bytes() != weights
    by_name = {row.info.run_name: row for row in rows(project)}
    assert len(by_name) == 2
    assert by_name["faster"].data.tags["dvc.exp_name"] == "faster"
    assert by_name["faster"].data.params["train.learning_rate"] == "0.02"
    table = dvc(project, "exp", "show", "--csv").stdout
    assert "faster" in table


@pytest.mark.proof
@pytest.mark.parametrize(
    "moment", ["mkdir .*/cache/runs/../", r"+open .*/project/dvc\.lock"], ids=["before", "while filing"]
)
def test_dvc_killed_after_the_training_does_not_train_again(corpus: Path, tmp_path: Path, moment: str) -> None:
    """Before it has written anything down, and while it writes dvc.lock; but `--force` does.

    In what is like a fresh clone: its dvc.lock names the bytes that come out, before anything has run.
    """
    project = clone(tmp_path / "project", corpus)
    set_processes(project, 1)
    dvc(project, "repro", "train")
    for folder in (".dvc/cache", ".dvc/tmp", ".runs"):
        shutil.rmtree(project / folder)
    (project / "mlflow.db").unlink()
    (project / "chargpt_nano.pt").unlink()
    dvc(project, "repro", "tokenize")
    killed = [sys.executable, "-m", "tests.support.killed_dvc", moment, str(tmp_path / "log"), "repro", "train"]
    found = subprocess.run(
        killed, cwd=project, env=environment(PYTHONPATH=str(ROOT)), text=True, capture_output=True, check=False
    )
    assert found.returncode == -signal.SIGKILL
    assert "step 40/40" in found.stdout
    done = dvc(project, "repro", "train")
    assert re.search("validation loss|Stage 'train' (is cached|didn't change)", done.stdout)
    assert not re.search(r"^step \d", done.stdout, re.MULTILINE), done.stdout
    (row,) = rows(project)
    assert row.info.status == "FINISHED"
    assert "step 40/40" in dvc(project, "repro", "--force", "--single-item", "train").stdout


FAMILY = {
    "relative": "model.position=relative",
    "average": "model.kind=average",
    "parts of words": "tokenize.kind=bpe",
    "other words": "generate.stop=['the']",
}


@pytest.mark.proof
def test_every_member_of_the_family_is_a_row_of_its_own(project: Path) -> None:
    """But what only writes otherwise is shown on the row of its model."""
    before = {row.info.run_id for row in rows(project)}
    clean = ["git", "checkout", "--quiet", "."]
    for name, change in FAMILY.items():
        subprocess.run(clean, cwd=project, check=True)
        dvc(project, "exp", "run", "--name", name.replace(" ", "-"), "-S", change, "-S", "tokenize.vocab_size=300")
    new = {row.info.run_name: row for row in rows(project) if row.info.run_id not in before}
    assert set(new) == {"relative", "average", "parts-of-words"}
    for name, row in new.items():
        key, _, value = FAMILY[name.replace("-", " ")].partition("=")
        assert row.info.status == "FINISHED"
        assert row.data.params[key] == value
        assert 0 < row.data.metrics["eval_bits_per_char"] < 6
        found = artifacts(MlflowClient(f"sqlite:///{project / 'mlflow.db'}"), row.info.run_id)
        assert {"chargpt_nano.pt", "generation_out.txt"} <= set(found)
    subprocess.run(clean, cwd=project, check=True)
    dvc(project, "repro")
    assert json.loads((project / "data" / "tokens" / "meta.json").read_text())["kind"] == "char"


@pytest.mark.proof
def test_the_commands_on_a_rows_page_bring_its_run_back(project: Path) -> None:
    dvc(project, "exp", "run", "--name", "lost", "-S", "train.learning_rate=0.005", "-S", "train.max_steps=20")
    weights = (project / "chargpt_nano.pt").read_bytes()
    page = next(row for row in rows(project) if row.info.run_name == "lost").data.tags["mlflow.note.content"]
    everything, experiment, checkpoint = re.findall(
        r"```\n(.*?)\n```", page.partition("## How to get it back")[2], re.DOTALL
    )
    said = []
    for commands in (everything, experiment, checkpoint):
        subprocess.run(["git", "checkout", "--quiet", "--force", "HEAD"], cwd=project, check=True)
        (project / "chargpt_nano.pt").unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", "-ec", commands],
            cwd=project,
            env=environment(PYTHONPATH=""),
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said.append(done.stdout)
        restored = project / "restored" if commands == checkpoint else project
        assert (restored / "chargpt_nano.pt").read_bytes() == weights
    assert "Stage 'train' is cached" in said[0]
    assert "chargpt_nano.pt: OK" in said[0]
    assert said[2].strip().partition("\n")[2].startswith("the "), "the first prompt, continued"


@pytest.mark.proof
def test_make_repro_ends_with_a_sync_that_costs_no_build(project: Path) -> None:
    command = ["make", "--old-file=.venv/checked", "repro"]
    for uri, code in (("http://127.0.0.1:9", 0), ("", 0)):
        variables = environment(PYTHONPATH="", MLFLOW_TRACKING_URI=uri)
        done = subprocess.run(command, cwd=project, env=variables, text=True, capture_output=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        said = [line for line in done.stderr.splitlines() if line.startswith("stages.sync: ")]
        assert len(said) == bool(uri), done.stderr
    (row,) = (
        row for row in rows(project) if row.data.tags["checkpoint.sha256"] == sha256_file(project / "chargpt_nano.pt")
    )
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    assert "dvc.lock" in artifacts(client, row.info.run_id)


def test_a_mistake_in_params_stops_the_pipeline_with_one_line(project: Path) -> None:
    text = (project / "params.yaml").read_text()
    try:
        (project / "params.yaml").write_text(text.replace("shards: 4", "shards: 3"))
        command = [str(Path(sys.executable).with_name("dvc")), "repro"]
        done = subprocess.run(
            command, cwd=project, env=environment(PYTHONPATH=""), text=True, capture_output=True, check=False
        )
        assert done.returncode != 0
        assert "gpt train: params.yaml: train.shards: expected a power of two, found 3" in done.stderr
        assert "Traceback" not in done.stderr
        assert "exited with 2" in done.stderr
    finally:
        (project / "params.yaml").write_text(text)
