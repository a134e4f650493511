"""The options of the wrapped command: the wrapper reads the same values as the command's own parser."""

from pathlib import Path

import pytest
import typer

from gpt.commands import train
from gpt.core.errors import UserError
from stages.command_line import CommandLine
from tests.support.workspace import Workspace, ended

FORMS = ["-Strain.seed=2", "-S", "train.seed=3", "--set=train.seed=4", "--set", "train.seed=5"]
REQUIRED = ["--params", "p", "--tokens=t", "--checkpoint", "a", "--checkpoint", "c", "--metrics=m"]
OUTPUTS = ["--history", "h", "--validation", "v"]


def test_values_are_those_of_the_commands_parser() -> None:
    app = typer.Typer()
    app.command()(train.command)
    words = [*REQUIRED, *FORMS, *OUTPUTS]
    parsed = typer.main.get_command(app).make_context("train", words[:]).params
    ours = CommandLine(["torchrun", "-m", "gpt", "train", *words])
    assert ours.changes == parsed["changes"] == [f"train.seed={seed}" for seed in (2, 3, 4, 5)]
    for name in ("params", "tokens", "checkpoint", "metrics", "history", "validation"):
        assert ours.path(f"--{name}") == Path(parsed[name])
    assert ours.optional_path("--run-dir") is parsed["run_dir"] is None


def test_options_are_not_abbreviated() -> None:
    assert CommandLine(["gpt", "--se", "train.seed=2", "--param", "x"]).changes == []


@pytest.mark.parametrize("words", [["--params"], ["gpt", "--out", "x"]])
def test_a_missing_value_or_option_is_named(words: list[str]) -> None:
    with pytest.raises(UserError, match="--params"):
        CommandLine(words).path("--params")


def test_every_form_of_an_override_decides_key_and_published_params(place: Workspace) -> None:
    given = ["-Strain.seed=2", "-S", "model.n_layer=3", "--set=train.shards=4", "--set", "tokenize.kind=word"]
    changes = ["train.seed=2", "model.n_layer=3", "train.shards=4", "tokenize.kind=word"]
    assert ended(place.train(*given)) == ""
    (run,) = place.runs()
    params = {"train.seed": "2", "model.n_layer": "3", "train.shards": "4", "tokenize.kind": "word"}
    assert params.items() <= run["params"].items()
    assert run["tags"]["run.key"] == place.key_with(changes) != place.key
