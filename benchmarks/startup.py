"""Start-up time of the commands, and the time of the five stages beside the training loop.

    python -m benchmarks.startup

All candidates alternate; the first round, in which Python compiles modules, does not count. The stages run as
`dvc repro --force` with 60 training steps in a temporary clone of this repository, without uncommitted changes. The
training loop is the optimizer steps with their data, as in `benchmarks.races`; its evaluation counts as beside it.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.races import ROOT, spread, timed
from gpt.core.params import read_params
from gpt.training.history import read_records

STEPS = 60
GENERATE = ("--max-new-tokens", "1", "--prompt", "ROMEO:", "--log-file", os.devnull)
NOT_OF_USERS = ("PYTHONDONTWRITEBYTECODE", "PYTHONSAFEPATH")  # the first makes Python compile all modules every time


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each candidate.")] = 5,
    checkpoint: Annotated[Path, typer.Option(help="Model for the generation.")] = ROOT / "chargpt_nano.pt",
) -> None:
    """Measure and print a table."""
    with tempfile.TemporaryDirectory(prefix="chargpt-startup-") as temporary:
        clone = Path(temporary) / "chargpt"
        _clone(clone)
        generate = ["-m", "gpt", "generate", "--checkpoint", str(checkpoint.absolute()), *GENERATE]
        candidates: dict[str, Callable[[], float]] = {
            "`import torch`": lambda: _run(clone, sys.executable, "-c", "import torch"),
            "`python -m gpt --help`": lambda: _run(clone, sys.executable, "-m", "gpt", "--help"),
            "`python -m gpt generate`, one token": lambda: _run(clone, sys.executable, *generate),
            "five stages beside the training loop": lambda: _run(clone, "dvc", "repro", "--force") - _loop(clone),
        }
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for number in range(rounds + 1):
            for name, measure in candidates.items():
                found = measure()
                if number:
                    seconds[name].append(found)
    print("| what | seconds: median | minimum | maximum |\n|---|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in spread(values).values()) + " |")


def _clone(folder: Path) -> None:
    """Clone this repository, with fewer training steps."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    params = folder / "params.yaml"
    text, changes = re.subn(r"(?m)^  max_steps: \d+", f"  max_steps: {STEPS}", params.read_text(encoding="utf-8"))
    assert changes == 1, "params.yaml: expected one key max_steps"
    params.write_text(text, encoding="utf-8")


def _run(folder: Path, *words: str) -> float:
    """Run a command to its end, in the environment that users have; returns the seconds."""
    environment = {name: value for name, value in os.environ.items() if name not in NOT_OF_USERS}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    began = time.monotonic()
    subprocess.run(words, check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def _loop(folder: Path) -> float:
    """Seconds of the training loop that ran last."""
    params = read_params(folder / "params.yaml")
    batch = params["train"]["batch_size"] * params["model"]["block_size"]
    (history,) = (folder / ".runs").glob("*/history.jsonl")
    return list(timed(read_records(history), batch))[-1][0]


if __name__ == "__main__":
    typer.run(main)
