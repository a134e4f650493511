"""What the tests share: a made-up text, small params, and the commands run as a person runs them."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from gpt.device import CPU_THREADS
from gpt.model_params import ModelParams
from gpt.token_files import TokenData, load_tokens
from gpt.tokenize import TokenizeParams, tokenize
from gpt.training import TrainParams
from tests.workspace import done, empty_store, fresh, place, server  # noqa: F401 (pytest finds fixtures here)

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "brew"]

torch.set_num_threads(CPU_THREADS)  # as every command does

RunGpt = Callable[..., "subprocess.CompletedProcess[str]"]


def made_up_text(words: int = 4000, seed: int = 0) -> str:
    """Lines of English words in random order: something a tiny model can learn the spelling of."""
    chance = random.Random(seed)
    return "".join(chance.choice(WORDS) + ("\n" if chance.random() < 0.1 else " ") for _ in range(words))


def small_params(**changes: Any) -> dict[str, Any]:
    """The sections of the smoke preset as plain values; `changes` are given as section__key=value."""
    params: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "presets" / "smoke.yaml").read_text())
    for target, value in changes.items():
        section, key = target.split("__")
        params[section][key] = value
    return params


def model_params(**changes: Any) -> ModelParams:
    """The section `model` of the smoke preset, with changes."""
    return ModelParams.model_validate({**small_params()["model"], **changes})


def train_params(**changes: Any) -> TrainParams:
    """The section `train` of the smoke preset, with changes."""
    return TrainParams.model_validate({**small_params()["train"], **changes})


def tokenize_params(**changes: Any) -> TokenizeParams:
    """The section `tokenize` of the smoke preset, with changes."""
    return TokenizeParams.model_validate({**small_params()["tokenize"], **changes})


def write_params(path: Path, **changes: Any) -> Path:
    """Write a params file of the smoke preset with changes."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False  # dvc's parser in C takes no `[pypi:…]`
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(small_params(**changes), file)
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up text of about 20,000 characters."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(made_up_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokens(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The token folder of the made-up text."""
    folder = tmp_path_factory.mktemp("tokens")
    tokenize(params=tokenize_params(), corpus=corpus, out=folder)
    return folder


@pytest.fixture(scope="session")
def data(tokens: Path) -> TokenData:
    """The tokens of the made-up text."""
    return load_tokens(tokens)


@pytest.fixture
def gpt(tmp_path: Path) -> RunGpt:
    """Run `python -m gpt …` in an empty folder, as a person would."""

    def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "gpt", *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment(),
            text=True,
            capture_output=True,
            check=False,
            timeout=120,
        )

    return run


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, with the project importable and its tools on PATH.

    And without SHELL, as under cron or in a container: what dvc runs commands with then is left between the two.
    """
    tools = str(Path(sys.executable).parent)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if name != "SHELL"}
    return {**inherited, "PYTHONPATH": str(ROOT), "PATH": path, "NO_COLOR": "1", **changes}


def only_line(stderr: str) -> str:
    """The one line that a person's mistake leaves on stderr."""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    return lines[0]
