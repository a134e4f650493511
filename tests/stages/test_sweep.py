"""The spaces of a sweep."""

from pathlib import Path

import optuna
import pytest

from gpt.core.errors import UserError
from stages import sweep
from tests.support.common import write_params


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("space", "distribution"),
    [
        ("choice(gelu, relu2)", optuna.distributions.CategoricalDistribution(["gelu", "relu2"])),
        ("range(2,9,3)", optuna.distributions.IntDistribution(2, 8, step=3)),
        ("interval(0.1, 1e3)", optuna.distributions.FloatDistribution(0.1, 1000)),
        ("tag(log, interval(1e-4,0.1))", optuna.distributions.FloatDistribution(1e-4, 0.1, log=True)),
        ("0.5", optuna.distributions.CategoricalDistribution(["0.5"])),
    ],
)
def test_a_space_is_what_trials_choose_from(space: str, distribution: optuna.distributions.BaseDistribution) -> None:
    trial = optuna.create_study().ask()
    sweep.parse_space("train.learning_rate", space)(trial)
    assert trial.distributions == {"train.learning_rate": distribution}


@pytest.mark.parametrize(
    ("key", "space", "message"),
    [
        ("train.learning_rat", "interval(1,2)", "did you mean 'learning_rate'"),
        ("train.learning_rate", "interval(1)", "expected a space such as"),
        ("train.seed", "range(a,b)", "expected a space such as"),
        ("train.learning_rate", "tag(log,interval(1,2)", "expected a space such as"),
    ],
)
def test_a_wrong_space_is_a_user_error(key: str, space: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep.main(["search", "-S", f"{key}={space}"])
