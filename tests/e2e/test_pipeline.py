"""The whole pipeline as a user runs it: a clone, the real dvc, torchrun and MLflow, on a synthetic text."""

import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

from gpt.core.files import sha256_file
from stages.runs.run_record import COMMIT
from tests.support.common import ROOT, STAGES, contents, environment, read_yaml, run
from tests.support.project import (
    CHECKPOINT,
    OUTPUTS,
    TRAINED,
    artifacts,
    clone,
    dvc,
    dvc_environment,
    logged_steps,
    output_file,
    repair,
    runs,
    set_params,
    start,
)


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory, corpus: Path, empty_store: Path) -> list[Path]:
    """Two clones: the pipeline run with two processes in a folder with spaces, and its training as an experiment.

    Before the experiment sets it, the second one has another learning rate.
    """
    folders = [
        clone(tmp_path_factory.mktemp("two processes") / "a project", corpus, launch__processes=2),
        clone(tmp_path_factory.mktemp("one") / "project", corpus, launch__processes=1, train__learning_rate=0.005),
    ]
    shutil.copy(empty_store, folders[1] / "mlflow.db")
    experiment = ("exp", "run", "--name", "faster", "-S", "train.learning_rate=0.01", "train")
    for process, folder in [(start(folders[0], "repro"), folders[0]), (start(folders[1], *experiment), folders[1])]:
        assert process.wait(300) == 0, output_file(folder).read_text()
    return folders


@pytest.fixture
def project(projects: list[Path]) -> Path:
    return projects[0]


def test_repro_writes_the_outputs_and_nothing_else(project: Path) -> None:
    assert "Running stage 'generate'" in output_file(project).read_text()
    assert all((project / name).stat().st_size for name in OUTPUTS)
    status = run(["git", "status", "--short", "--untracked-files=all"], project).stdout
    assert {line.split(maxsplit=1)[1] for line in status.splitlines()} <= set(OUTPUTS)
    assert list(project.glob(".runs/*/history.jsonl"))
    assert not list(project.glob(".runs/*/resume-*"))
    log = (project / "gpt_nano.log").read_text()
    for verb in STAGES:
        assert re.search(rf" {verb}\b", log)


def test_an_experiment_in_another_folder_with_another_number_of_processes_trains_the_same_model(
    projects: list[Path],
) -> None:
    """Its dvc.lock, with the hash of every dependency and output, is equal, too; it differs in the name of its run."""
    two, one = (contents(project, [*TRAINED, "data/tokens/train.bin"]) for project in projects)
    assert one == two
    all_stages, stages = (read_yaml(project / "dvc.lock")["stages"] for project in projects)
    assert stages == {stage: all_stages[stage] for stage in ("download", "tokenize", "train")}
    ((pipeline,), (experiment,)) = map(runs, projects)
    assert pipeline.data.params == experiment.data.params
    assert pipeline.data.tags["run.key"] == experiment.data.tags["run.key"]
    assert experiment.info.run_name == experiment.data.tags["dvc.exp_name"] == "faster"


def test_a_second_repro_runs_nothing(project: Path) -> None:
    log = (project / "gpt_nano.log").read_text()
    assert "Data and pipelines are up to date" in dvc(project, "repro").stdout
    assert (project / "gpt_nano.log").read_text() == log


def test_one_mlflow_run_holds_everything_about_the_model(project: Path) -> None:
    (found,) = runs(project)
    assert found.info.status == "FINISHED"
    assert found.data.params["train.max_steps"] == "40"
    assert found.data.params["model.n_embd"] == "32"
    assert found.data.tags["checkpoint.sha256"] == sha256_file(project / CHECKPOINT)
    assert len(found.data.tags["run.key"]) == 64
    assert found.data.tags[COMMIT] == run(["git", "rev-parse", "HEAD"], project).stdout.strip()
    metrics = json.loads((project / "metrics" / "evaluate.json").read_text())
    assert found.data.metrics["val/bits_per_char"] == metrics["val/bits_per_char"]
    assert found.inputs is not None
    (dataset,) = found.inputs.dataset_inputs
    meta = json.loads((project / "data" / "tokens" / "meta.json").read_text())
    assert meta["corpus_sha256"].startswith(dataset.dataset.digest)
    assert logged_steps(project, found.info.run_id) == [10, 20, 30, 40]
    files = artifacts(project, found.info.run_id)
    assert {CHECKPOINT, "params.yaml", "history.csv", "generation_out.txt", "attention.png"} <= files
    assert any(name.endswith(".log") for name in files)


def test_an_invalid_parameter_stops_the_pipeline_with_one_line(project: Path) -> None:
    text = (project / "params.yaml").read_text()
    set_params(project, generate={"top_k": -3})
    stderr = dvc(project, "repro", code=None).stderr
    (project / "params.yaml").write_text(text)
    (line,) = (line for line in stderr.splitlines() if "generate.top_k" in line)
    assert "params.yaml" in line
    assert "found -3" in line
    assert "exited with 2" in stderr
    assert "Traceback" not in stderr


@pytest.mark.proof
@pytest.mark.parametrize("operation", ["mkdir .*/cache/runs/../", r"open .*/project/dvc\.lock', 'w"])
def test_dvc_killed_after_training_does_not_train_again(corpus: Path, tmp_path: Path, operation: str) -> None:
    """Killed before it has recorded the results, or when it has opened dvc.lock; only `--force` trains again.

    As in a fresh clone, dvc.lock names the results before anything has run.
    """
    project = clone(tmp_path / "project", corpus, launch__processes=1)
    dvc(project, "repro", "train")
    for folder in (".dvc/cache", ".dvc/tmp", ".runs"):
        shutil.rmtree(project / folder)
    (project / "mlflow.db").unlink()
    (project / CHECKPOINT).unlink()
    dvc(project, "repro", "tokenize")
    command = [sys.executable, "-m", "tests.support.killed_dvc", operation, "repro", "train"]
    killed = run(command, project, code=-signal.SIGKILL, env=environment(PYTHONPATH=str(ROOT)))
    assert "step 40/40" in killed.stdout
    if operation.startswith("open"):
        (project / "dvc.lock").write_text("")
    repair(project)
    again = dvc(project, "repro", "train").stdout
    assert not re.search(r"^step \d", again, re.MULTILINE), again
    assert (project / CHECKPOINT).exists()
    (found,) = runs(project)
    assert found.info.status == "FINISHED"
    assert "step 40/40" in dvc(project, "repro", "--force", "--single-item", "train").stdout


VARIANTS = {"relative": "model.position=relative", "average": "model.kind=average", "subword": "tokenize.kind=bpe"}


@pytest.mark.proof
def test_every_kind_of_model_has_a_run_but_sampling_settings_have_none(project: Path) -> None:
    before = {found.info.run_id for found in runs(project)}
    for name, change in {**VARIANTS, "stopped": "generate.stop=['the']"}.items():
        run(["git", "checkout", "--quiet", "."], project)
        dvc(project, "exp", "run", "--name", name, "-S", change, "-S", "tokenize.vocab_size=300")
    new = {found.info.run_name: found for found in runs(project) if found.info.run_id not in before}
    assert set(new) == set(VARIANTS)
    for name, found in new.items():
        key, _, value = VARIANTS[name].partition("=")
        assert found.info.status == "FINISHED"
        assert found.data.params[key] == value
        assert 0 < found.data.metrics["val/bits_per_char"] < 6
        assert {CHECKPOINT, "generation_out.txt"} <= artifacts(project, found.info.run_id)
    run(["git", "checkout", "--quiet", "."], project)
    dvc(project, "repro")
    assert json.loads((project / "data" / "tokens" / "meta.json").read_text())["kind"] == "char"


@pytest.mark.proof
def test_the_commands_in_the_description_restore_the_model(project: Path) -> None:
    dvc(project, "exp", "run", "--name", "lost", "-S", "train.learning_rate=0.005", "-S", "train.max_steps=20")
    weights = (project / CHECKPOINT).read_bytes()
    (lost,) = (found for found in runs(project) if found.info.run_name == "lost")
    blocks = re.findall(r"```\n(.*?)\n```", lost.data.tags["mlflow.note.content"], re.DOTALL)
    commands = [block for block in blocks if re.search(r"^(dvc|mlflow) ", block, re.MULTILINE)]
    assert any("gpt generate" in block for block in commands)
    for block in commands:
        run(["git", "checkout", "--quiet", "--force", "HEAD"], project)
        places = [project / CHECKPOINT, project / "restored" / CHECKPOINT]
        for path in places:
            path.unlink(missing_ok=True)
        stdout = run(["bash", "-ec", block], project, env=dvc_environment()).stdout
        assert [path.read_bytes() for path in places if path.exists()] == [weights], block
        assert not re.search(r"^step \d", stdout, re.MULTILINE), "trained again instead of restored"


@pytest.mark.proof
def test_make_repro_ends_with_a_sync_whose_failure_does_not_count(project: Path) -> None:
    for uri in ("http://127.0.0.1:9", ""):
        variables = environment(PYTHONPATH="", MLFLOW_TRACKING_URI=uri)
        stderr = run(["make", "--old-file=.venv/checked", "repro"], project, env=variables).stderr
        assert len([line for line in stderr.splitlines() if line.startswith("stages.sync: ")]) == bool(uri), stderr
    digest = sha256_file(project / CHECKPOINT)
    (found,) = (found for found in runs(project) if found.data.tags["checkpoint.sha256"] == digest)
    assert "dvc.lock" in artifacts(project, found.info.run_id)
