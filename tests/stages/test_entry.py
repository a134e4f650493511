"""Edits of a stage's params and code while it runs."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from gpt.core.errors import UserError
from stages.entry import run_checked
from tests.support.common import write_params

DVC_YAML = """\
stages:
  train: {cmd: x, outs: [weights]}
  generate: {cmd: x, deps: [weights, code, main.py], params: [generate], outs: [text]}
"""


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
