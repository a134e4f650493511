"""The command line of a wrapper: values of options as the command's own parser reads them, and edits while it runs."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import typer

from gpt.commands import train
from gpt.core.errors import UserError
from stages.execution.command_line import CommandLine, run_checked
from tests.support.common import write_params
from tests.support.workspace import Workspace, ended

FORMS = ["-Strain.seed=2", "-S", "train.seed=3", "--set=train.seed=4", "--set", "train.seed=5"]
REQUIRED = ["--params", "p", "--tokens=t", "--checkpoint", "a", "--checkpoint", "c", "--metrics=m"]
OUTPUTS = ["--history", "h", "--validation", "v"]
DVC_YAML = """\
stages:
  train: {cmd: x, outs: [weights]}
  generate: {cmd: x, deps: [weights, code, main.py], params: [generate], outs: [text]}
"""


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


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a dvc.yaml, as a stage sees it under dvc."""
    monkeypatch.setenv("DVC_STAGE", "generate")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    (tmp_path / "code").mkdir()
    for name in ("code/a.py", "main.py", "weights"):
        (tmp_path / name).touch()
    write_params(tmp_path / "params.yaml")
    return tmp_path


@pytest.mark.parametrize(
    ("edit", "names"),
    [
        (lambda: write_params(Path("params.yaml"), generate__seed=2, train__seed=2), "generate.seed"),
        (lambda: write_params(Path("params.yaml"), train__seed=2), ""),
        (lambda: Path("code/a.py").write_text("pass"), "code/a.py"),
        (lambda: Path("code/new.py").touch(), "code/new.py"),
        (lambda: Path("main.py").unlink(), "main.py"),
        (lambda: Path("weights").write_text("of another stage"), ""),
    ],
)
@pytest.mark.usefixtures("project")
def test_edited_inputs_are_named_and_refused(edit: Callable[[], object], names: str) -> None:
    def main(_words: object) -> int:
        edit()
        return 0

    refused = pytest.raises(UserError, match=f"{names} changed while the stage ran") if names else nullcontext()
    with refused:
        assert run_checked(main, ["--params", "params.yaml"]) == 0


def test_the_exit_code_of_the_command_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    assert run_checked(lambda _: 7, []) == 7
