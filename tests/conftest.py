"""Fixtures of all tests: a synthetic text, its tokens, and the command line as a user runs it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path

import pytest
import torch

from gpt.__main__ import main
from gpt.data.prepare import tokenize
from gpt.data.token_files import TokenData, load_tokens
from gpt.model.device import CPU_THREADS
from tests.support.common import FAST, made_up_text, only_line, run, tokenize_params, train_line, write_params
from tests.support.workspace import done, empty_store, place, server  # noqa: F401 (pytest finds fixtures here)

torch.set_num_threads(CPU_THREADS)  # as every command does


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    """Restore the environment after each module: the registry, for example, sets the tracking address for MLflow."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


RunGpt = Callable[..., "subprocess.CompletedProcess[str]"]
RunMain = Callable[..., str]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic text of about 20,000 characters."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(made_up_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokens(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The token folder of the synthetic text."""
    folder = tmp_path_factory.mktemp("tokens")
    tokenize(params=tokenize_params(), corpus=corpus, out=folder)
    return folder


@pytest.fixture(scope="session")
def data(tokens: Path) -> TokenData:
    """The tokens of the synthetic text."""
    return load_tokens(tokens)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """A folder with the outputs of a short training in float32."""
    folder = tmp_path_factory.mktemp("trained")
    write_params(folder / "params.yaml", **FAST, train__max_steps=20, model__dropout=0.0)
    with chdir(folder):
        assert call_main(*train_line(tokens)) == 0
    return folder


def call_main(*arguments: str | Path) -> int:
    """Run a command in this process: a new one spends seconds on importing torch. Returns the exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["gpt", *map(str, arguments)])
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def gpt(tmp_path: Path) -> RunGpt:
    """Run `python -m gpt …` in an empty folder as a new process."""

    def invoke(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        return run([sys.executable, "-m", "gpt", *arguments], tmp_path, code=None)

    return invoke


@pytest.fixture
def run_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunMain:
    """Run a command in tmp_path, in this process; returns stdout or, with another exit code than 0, the error line."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str | Path, code: int = 0) -> str:
        capsys.readouterr()
        found = call_main(*arguments)
        output, errors = capsys.readouterr()
        assert found == code, errors
        return only_line(errors) if code else output

    return invoke
