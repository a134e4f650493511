"""Edits of a stage's params and code while it runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stages.stage_inputs import refuse_edited_inputs
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
def test_edited_inputs_are_named_and_refused(
    project: Path, edit: Callable[[], object], names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = refuse_edited_inputs("generate", lambda _: edit() and 0 or 0)(["--params", "params.yaml"])
    err = capsys.readouterr().err
    assert code == (2 if names else 0)
    assert err.startswith(f"stages.generate: {names} changed while the stage ran") if names else not err


def test_without_dvc_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    assert refuse_edited_inputs("generate", lambda _: 7)([]) == 7
