"""Helpers of all tests: synthetic texts, small params, and programs run in the environment of a user's shell."""

import os
import random
import resource
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from ruamel.yaml import YAML

from gpt.data.prepare import TokenizeParams
from gpt.data.token_files import TokenData
from gpt.model.baselines import make_model
from gpt.model.config import ModelConfig
from gpt.model.gpt import LanguageModel
from gpt.training.distributed import Group
from gpt.training.trainer import Trainer, TrainParams

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
TRAINED = ("model.pt", "metrics/train.json", "plots/history.csv", "plots/validation.csv")  # outputs of a training
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "brew"]


def made_up_text(words: int = 4000, seed: int = 0) -> str:
    """Lines of English words in random order; a tiny model can learn their spelling."""
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + ("\n" if rng.random() < 0.1 else " ") for _ in range(words))


def read_yaml(path: Path) -> Any:
    """The content of a YAML file as plain values."""
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


# Changes of the smoke preset: bfloat16 and Muon are slow on a CPU without AVX-512.
FAST = {"train__precision": "float32", "train__optimizer": "adamw", "evaluate__precision": "float32"}
STAGES: dict[str, Any] = read_yaml(ROOT / "dvc.yaml")["stages"]


def small_params(**changes: Any) -> dict[str, Any]:
    """The sections of the smoke preset as plain values, with changes given as section__key=value."""
    params: dict[str, Any] = read_yaml(ROOT / "presets" / "smoke.yaml")
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


def strong_model(params: ModelConfig, vocab_size: int) -> LanguageModel:
    """A model with weights so large that scores and logits depend clearly on every token."""
    torch.manual_seed(0)
    model = make_model(params, vocab_size).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return model


def make_trainer(data: TokenData, group: Group, **changes: Any) -> Trainer:
    """A trainer with the smoke preset and changes, in float32 by default."""
    params = small_params(**{"train__precision": "float32", **changes})
    torch.manual_seed(0)
    model = make_model(ModelConfig.model_validate(params["model"]), data.meta.vocab_size)
    return Trainer(TrainParams.model_validate(params["train"]), model, data, group)


def train_line(tokens: str | Path, *more: str) -> list[str]:
    """The arguments of `gpt train` with the outputs of `TRAINED`, and more of them."""
    options = zip(("--checkpoint", "--metrics", "--history", "--validation"), TRAINED, strict=True)
    outputs = [word for option in options for word in option]
    return ["train", "--params", "params.yaml", "--tokens", str(tokens), *outputs, *more]


def stage_line(stage: str, *more: str) -> list[str]:
    """The arguments of the gpt command of a stage in dvc.yaml, and more of them."""
    words = shlex.split(STAGES[stage]["cmd"])
    return [*words[words.index("gpt") + 1 :], *more]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with a git identity, the project importable and the environment's tools on PATH.

    SHELL is unset, as under cron or in a container: dvc then runs commands with /bin/sh, which stays their parent.
    """
    tools = str(Path(sys.executable).parent)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if name != "SHELL"}
    user = {f"GIT_{role}_{key}": "t@example.com" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    return {**inherited, **user, "PYTHONPATH": str(ROOT), "PATH": path, "NO_COLOR": "1", **changes}


def run(
    command: Sequence[str | Path], folder: Path, *, code: int | None = 0, env: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a program in a folder and check its exit code; None accepts every code."""
    done = subprocess.run(
        command, cwd=folder, env=env or environment(), text=True, capture_output=True, check=False, timeout=600
    )
    assert code in (None, done.returncode), f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def only_line(stderr: str) -> str:
    """The single line on stderr that reports a user error."""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    return lines[0]


def wait_for(condition: Callable[[], T], seconds: float = 60, pause: float = 0.05) -> T:
    """Poll until the condition returns a true value, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"timed out after {seconds} s"
        time.sleep(pause)
    return value


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes; macOS reports bytes, Linux KiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def contents(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The bytes of some files in a folder; empty for a missing file."""
    return {name: path.read_bytes() if (path := folder / name).exists() else b"" for name in names}
