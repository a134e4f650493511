"""`python -m stages.promote` with real stores: registers, compares, moves the alias, rolls back, tells the history."""

import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from gpt.core.errors import UserError
from stages import promote
from stages.runs.publish import connect
from stages.tracking.logged_model import models_of
from tests.support.models import CHECKPOINT, blocks, publish_model

Promote = Callable[..., str]
LAYERS = [{"model.n_layer": str(number), "train.seed": "1"} for number in range(4)]
MODELS = {
    "first": {"table": blocks(2.2), "params": LAYERS[0]},
    "better": {"table": blocks(2.1, noise=0.05), "params": LAYERS[1]},
    "best": {"table": blocks(2.0), "params": LAYERS[2], "tags": {"dvc.exp_name": "wise-owl"}},
    "as good": {"table": blocks(2.195), "params": LAYERS[3]},
    "copying": {"table": blocks(1.9), "metrics": {"val/copied_windows": 0.2}, "params": LAYERS[3]},
    "elsewhere": {"table": blocks(1.9), "corpus": "d" * 64, "params": LAYERS[3]},
}
Runs = dict[str, str]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> tuple[Path, Runs]:
    """A folder with a store of models, and the ID of each model's run."""
    root = tmp_path_factory.mktemp("published")
    shutil.copyfile(empty_store, root / "models.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/models.db")
        store = connect(root, "chargpt")
        return root, {name: publish_model(store, name, **model) for name, model in MODELS.items()}  # type: ignore[arg-type]


@pytest.fixture
def runs(published: tuple[Path, Runs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The runs, in a copy of the store, and its folder as the working directory."""
    with closing(sqlite3.connect(published[0] / "models.db")) as old, closing(sqlite3.connect("models.db")) as new:
        old.backup(new)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/models.db")
    return published[1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Promote:
    """Run the command in this process, check its exit code, and return what it printed."""

    def invoke(*arguments: str, code: int = 0) -> str:
        capsys.readouterr()
        assert promote.main(arguments) == code
        return capsys.readouterr().out

    return invoke


def client() -> MlflowClient:
    return MlflowClient(os.environ["MLFLOW_TRACKING_URI"])


def registered() -> dict[str, tuple[str, list[str]]]:
    """The run and the aliases of each version."""
    versions = [client().get_model_version("chargpt", v.version) for v in client().search_model_versions()]
    return {str(version.version): (version.run_id or "", sorted(version.aliases)) for version in versions}


def test_the_first_model_and_better_ones_become_champion(runs: Runs, call: Promote) -> None:
    printed = call("--run", runs["first"])
    assert "the first champion" in printed
    assert registered() == {"1": (runs["first"], ["champion"])}
    Path(CHECKPOINT).write_text("better")
    printed = call()
    assert "| -0.1000 (" in printed
    assert call("--experiment", "wise-owl").count("| yes ") == 6
    assert registered() == {"1": (runs["first"], []), "2": (runs["better"], []), "3": (runs["best"], ["champion"])}
    version = client().get_model_version("chargpt", "2")
    assert {"promotion.verdict": "promoted", "promotion.champion": "1"}.items() <= version.tags.items()
    report = Path(client().download_artifacts(runs["better"], "promotion/report.md", ".")).read_text()
    assert report == printed
    assert printed.strip() in (version.description or "")
    assert "is the champion already" in call("--experiment", "best")
    assert len(registered()) == 3


@pytest.mark.parametrize(
    ("name", "reason"),
    [("as good", "all below -0.0200"), ("copying", "copied windows: 20.0%"), ("elsewhere", "not comparable")],
)
def test_other_models_are_challengers_with_the_reason_and_are_registered_once(
    runs: Runs, call: Promote, name: str, reason: str
) -> None:
    call("--run", runs["first"])
    assert reason in call("--run", runs[name], code=1)
    client().update_model_version(
        "chargpt", "2", f"my notes\n\n{client().get_model_version('chargpt', '2').description}"
    )
    call("--experiment", name, code=1)
    assert registered() == {"1": (runs["first"], ["champion"]), "2": (runs[name], ["challenger"])}
    version = client().get_model_version("chargpt", "2")
    assert (version.tags["promotion.verdict"], reason in version.tags["promotion.reason"]) == ("kept", True)
    assert (version.description or "").startswith("my notes\n\n## Promotion\n")
    assert (version.description or "").count("## Promotion") == 1


def test_a_dry_run_changes_nothing_and_exits_alike(runs: Runs, call: Promote) -> None:
    call("--run", runs["first"], "--dry-run")
    assert registered() == {}
    call("--run", runs["first"])
    before = (registered(), call("--history"))
    assert "nothing was changed" in call("--run", runs["best"], "--dry-run")
    call("--run", runs["as good"], "--dry-run", code=1)
    assert (registered(), call("--history")) == before


def test_rollback_goes_back_step_by_step_and_the_history_tells_all(runs: Runs, call: Promote) -> None:
    for name in ("first", "better", "best"):
        call("--run", runs[name])
    assert runs["better"] in call("--rollback", "--dry-run")
    assert runs["better"] in call("--rollback")
    assert registered()["2"] == (runs["better"], ["champion"])
    assert "rolled back" in call("--run", runs["best"], code=1), "it was rolled back for a reason"
    client().delete_model_version_tag("chargpt", "3", "promotion.rolled_back")
    assert runs["first"] in call("--rollback", "--dry-run"), "not version 3, which came later"
    call("--run", runs["best"])
    assert registered()["3"] == (runs["best"], ["champion"])
    call("--rollback")
    call("--rollback")
    assert registered()["1"] == (runs["first"], ["champion"])
    with pytest.raises(UserError, match="expected an earlier champion"):
        call("--rollback")
    client().set_registered_model_alias("chargpt", "champion", "2")
    call("--run", runs["as good"], code=1)
    lines = call("--history").splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "2", "3", "2", "1", "2"]
    assert [re.split(r"  +", line)[-1] for line in lines] == [
        *["promoted"] * 3,
        *("rolled back to", "promoted", "rolled back to", "rolled back to", "set outside stages.promote"),
    ]
    times = [re.split(r"  +", line)[1:3] for line in lines]
    assert [end for _, end in times] == [*(start for start, _ in times[1:]), "now"]


def test_rollback_skips_a_deleted_version(runs: Runs, call: Promote) -> None:
    for name in ("first", "better", "best"):
        call("--run", runs[name])
    client().delete_model_version("chargpt", "2")
    call("--rollback")
    assert registered()["1"] == (runs["first"], ["champion"])
    assert "(deleted)" in call("--history")


def test_a_changed_checkpoint_is_not_promoted(published: tuple[Path, Runs], runs: Runs, call: Promote) -> None:
    """The one in the LoggedModel, which is what MLflow loads."""
    (model,) = models_of(client(), client().get_run(runs["best"]))
    path = published[0] / "mlruns" / "models" / model.model_id / "artifacts" / "data" / CHECKPOINT
    before = path.read_bytes()
    path.write_bytes(before + b"\0")
    printed = call("--run", runs["best"], code=1)
    path.write_bytes(before)
    assert "checkpoint SHA-256" in printed.splitlines()[-1]
    assert registered()["1"] == (runs["best"], ["challenger"])
    assert client().get_model_version("chargpt", "1").source == model.model_uri


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--run", "0" * 32], "--run|run 0000"),
        (["--run", "../x"], "expected a run of this store"),
        (["--experiment", "nobody"], "--experiment nobody: .* dvc exp apply nobody"),
        ([], "chargpt_nano.pt: expected a checkpoint"),
        (["--run", "x", "--rollback"], "not allowed with argument"),
        (["--rollback"], "expected an earlier champion"),
        (["--champion"], "unrecognized arguments"),
    ],
)
def test_a_users_mistake_names_the_remedy(runs: Runs, words: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        promote.main(words)
    assert registered() == {}


def test_a_run_without_the_table_of_blocks_names_the_remedy(
    published: tuple[Path, Runs], runs: Runs, call: Promote
) -> None:
    (path,) = published[0].glob(f"mlruns/{runs['best']}/artifacts/blocks.csv")
    hidden = path.rename(path.with_name("other.csv"))
    with pytest.raises(UserError, match=r"expected the artifact blocks\.csv.*dvc repro evaluate"):
        call("--run", runs["best"])
    hidden.rename(path)


def test_a_deleted_run_is_not_promoted_and_a_champion_without_a_run_is_named(runs: Runs, call: Promote) -> None:
    client().delete_run(runs["first"])
    with pytest.raises(UserError, match=f"mlflow runs restore --run-id {runs['first']}"):
        call("--run", runs["first"])
    client().create_registered_model("chargpt")
    client().create_model_version("chargpt", "runs:/none/model")
    client().set_registered_model_alias("chargpt", "champion", "1")
    with pytest.raises(UserError, match="version 1 of chargpt: expected the run"):
        call("--run", runs["best"])


def test_promotions_of_a_model_at_the_same_time_make_one_version(runs: Runs, call: Promote) -> None:
    call("--run", runs["first"])
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(promote.main, [["--run", runs["best"]]] * 3)) == [0, 0, 0]
    assert registered() == {"1": (runs["first"], []), "2": (runs["best"], ["champion"])}
    assert call("--history").count("promoted") == 2
