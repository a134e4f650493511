"""The promotion gate with real small models: a change of the seed is noise, a longer training is an improvement."""

import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from mlflow import MlflowClient

from gpt.data.prepare import tokenize
from tests.support.common import FAST, environment, run, stage_line, tokenize_params, write_params
from tests.support.project import store

pytestmark = pytest.mark.proof
PAIRS = [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10)]
SMALL = {**FAST, "model__n_embd": 64, "model__block_size": 64, "train__max_steps": 150, "train__eval_interval": 150}
LONGER = {"train__max_steps": 450, "train__seed": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose store has runs of small models of Python's documentation: 10 seeds, and a longer training."""
    folder = tmp_path_factory.mktemp("models")
    text = re.sub(r"(\W)\1+", r"\1", "\n".join(topics.values()))  # without tables, which a model would copy
    (folder / "text.txt").write_text(text.encode("ascii", "replace").decode())
    tokenize(params=tokenize_params(), corpus=folder / "text.txt", out=folder / "data" / "tokens")
    models = {"longer": LONGER, **{f"seed-{seed}": {"train__seed": seed} for pair in PAIRS for seed in pair}}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: make_model(folder, name, models[name]), models))
    return folder


def make_model(root: Path, name: str, changes: dict[str, int]) -> None:
    """Train and evaluate a model as DVC does for an experiment with --temp: in a folder of its own."""
    folder = root / name
    folder.mkdir()
    (folder / "data").symlink_to(root / "data")
    write_params(folder / "params.yaml", **{**SMALL, **changes})
    lines = [
        f"python -m stages.{stage} python -m gpt {shlex.join(stage_line(stage))}" for stage in ("train", "evaluate")
    ]
    env = environment(DVC_ROOT=str(root), DVC_EXP_NAME=name, OMP_NUM_THREADS="1")
    run(["sh", "-c", " && ".join(lines)], folder, env=env)


def promote(models: Path, name: str) -> tuple[int, str]:
    """Exit code and output of the promotion of an experiment's model."""
    done = run([sys.executable, "-m", "stages.promote", "--experiment", name], models, code=None)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_change_of_the_seed_is_not_promoted(models: Path) -> None:
    """Neither by the command, nor by the test of the difference alone."""
    promoted, significant = 0, 0
    for first, second in PAIRS:
        assert promote(models, f"seed-{first}")[0] == 0
        code, report = promote(models, f"seed-{second}")
        promoted += code == 0
        (row,) = [line for line in report.splitlines() if line.startswith("| difference")]
        significant += row.split("|")[-2].strip() == "yes"
        store(models).delete_registered_model("chargpt")
    assert promoted == 0
    assert significant <= 1


def test_a_longer_training_is_promoted(models: Path) -> None:
    assert promote(models, "seed-1")[0] == 0
    code, report = promote(models, "longer")
    assert code == 0, report
    client: MlflowClient = store(models)
    champion = client.get_model_version_by_alias("chargpt", "champion")
    assert client.get_run(champion.run_id or "").data.tags["dvc.exp_name"] == "longer"
