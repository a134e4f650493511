"""What all tests share: made-up texts, small params, and the environment of a user's shell."""

import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML

from gpt.data.prepare import TokenizeParams
from gpt.model.config import ModelConfig
from gpt.training.trainer import TrainParams

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "brew"]


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


def model_params(**changes: Any) -> ModelConfig:
    """The section `model` of the smoke preset, with changes."""
    return ModelConfig.model_validate({**small_params()["model"], **changes})


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


def wait_for(what: Callable[[], T], seconds: float = 60, pause: float = 0.05) -> T:
    """The first result that is not empty."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"timed out after {seconds} s"
        time.sleep(pause)
    return found


def contents(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The bytes of some files; nothing for one that is missing."""
    return {name: path.read_bytes() if (path := folder / name).exists() else b"" for name in names}
