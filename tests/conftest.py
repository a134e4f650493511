"""Fixtures of all tests: a synthetic text, its tokens, and the command line as a user runs it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt.data.prepare import tokenize
from gpt.data.token_files import TokenData, load_tokens
from gpt.model.device import CPU_THREADS
from tests.support.common import made_up_text, run, tokenize_params
from tests.support.workspace import done, empty_store, place, server  # noqa: F401 (pytest finds fixtures here)

torch.set_num_threads(CPU_THREADS)  # as every command does

RunGpt = Callable[..., "subprocess.CompletedProcess[str]"]


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


@pytest.fixture
def gpt(tmp_path: Path) -> RunGpt:
    """Run `python -m gpt …` in an empty folder."""

    def invoke(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        return run([sys.executable, "-m", "gpt", *arguments], tmp_path, code=None)

    return invoke
