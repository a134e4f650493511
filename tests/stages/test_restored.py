"""A model that comes from DVC, not from a training here, gets its MLflow run from `dvc.lock`."""

import shutil
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support import fake_gpt
from tests.support.common import run
from tests.support.workspace import Workspace, ended, steps, values

COMMON = "--params params.yaml --checkpoint w.pt"
STAGES = {
    "train": (
        "--tokens tokens --metrics m/train.json --history plots/history.csv --validation plots/validation.csv",
        ["w.pt", "plots/history.csv", "plots/validation.csv"],
        ["download", "tokenize", "model", "train"],
    ),
    "evaluate": (
        "--metrics m/evaluate.json --positions plots/positions.csv --blocks plots/blocks.csv "
        "--calibration plots/calibration.csv",
        ["plots/positions.csv", "plots/blocks.csv", "plots/calibration.csv"],
        ["evaluate"],
    ),
    "generate": ("--out text.txt", ["text.txt"], ["generate"]),
}


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Workspace:
    """A workspace in which the real dvc ran all stages."""
    origin = Workspace(tmp_path_factory.mktemp("origin") / "work space", empty_store)
    stages = {}
    for name, (options, outs, params) in STAGES.items():
        command = f"exec {sys.executable} -m stages.{name} python {fake_gpt.__file__} {name} {COMMON} {options}"
        metrics = [] if name == "generate" else [{f"m/{name}.json": {"cache": False}}]
        deps = ["tokens"] if name == "train" else ["w.pt"]
        stages[name] = {"cmd": command, "deps": deps, "params": params, "outs": outs, "metrics": metrics}
    with (origin.folder / "dvc.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump({"stages": stages}, file)
    (origin.folder / "plan.json").write_text('{"steps": 12, "loss": 1.5}')
    origin.environment["DVC_NO_ANALYTICS"] = "1"
    dvc(origin, "init", "--no-scm", "--quiet")
    dvc(origin, "repro", "--quiet")
    return origin


@pytest.fixture
def pulled(origin: Workspace, tmp_path: Path, empty_store: Path) -> Workspace:
    """A copy of it with all outputs, but without run folders and MLflow runs."""
    pulled = Workspace(tmp_path / "pulled", empty_store)
    pulled.environment = origin.environment
    others = shutil.ignore_patterns(".runs", "mlflow.db*", "mlruns", "gpt_nano.log")
    shutil.copytree(origin.folder, pulled.folder, ignore=others, dirs_exist_ok=True)
    return pulled


def dvc(place: Workspace, *arguments: str) -> None:
    run([sys.executable, "-m", "dvc", *arguments], place.folder, env=place.environment)


def test_a_pulled_model_gets_a_run_which_becomes_that_of_a_later_training(origin: Workspace, pulled: Workspace) -> None:
    assert [ended(pulled.sync()), ended(pulled.sync())] == ["", ""]
    (trained,), (restored,) = origin.runs(), pulled.runs()
    assert restored["params"] == trained["params"]
    assert restored["tags"]["run.origin"] == "dvc.lock"
    assert restored["tags"]["run.key"] == trained["tags"]["run.key"]
    assert restored["datasets"] == trained["datasets"]
    assert (steps(restored, "train/loss"), steps(restored, "val/loss")) == ([1], [5])
    for metric in ("val/best_loss", "val/bits_per_char"):
        assert values(restored, metric) == values(trained, metric)
    logs = {name for name in trained["artifacts"] if name.startswith(("logs/", "pictures/", "checksums/"))}
    assert trained["artifacts"].keys() - restored["artifacts"].keys() <= logs
    assert restored["artifacts"]["w.pt"] == "weights"
    dvc(pulled, "repro", "--quiet", "--force", "--single-item", "train")
    (again,) = pulled.runs()
    assert again["tags"]["run.origin"] == "training"
    assert steps(again, "train/loss") == list(range(12))


def test_the_run_of_an_evaluation_of_a_pulled_model_gets_params(origin: Workspace, pulled: Workspace) -> None:
    assert ended(pulled.evaluate("-S", "evaluate.batch_size=8", loss=1.25)) == ""
    assert ended(pulled.sync()) == ""
    (only,) = pulled.runs()
    assert only["params"] == origin.runs()[0]["params"]
    assert values(only, "val/bits_per_char")[-1] == 1.25
    assert "val/best_loss" in only["metrics"]


def test_a_changed_workspace_gets_no_run(pulled: Workspace) -> None:
    """The run key would be wrong."""
    params = pulled.folder / "params.yaml"
    params.write_text(params.read_text().replace("seed: 1}", "seed: 2}", 1))
    assert ended(pulled.sync()) == ""
    assert pulled.runs() == []
