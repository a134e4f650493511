"""Time and loss of complete trainings: our recipes and nanoGPT's, alternating on the same cores.

    python -m benchmarks.races

Every training but one runs the command `train` under torchrun with two processes of one thread. The training time is
that of the optimizer steps and their data, from the history; the time of the whole process includes evaluations.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import typer

from gpt.core.params import read_params
from gpt.training.history import Record, read_records

ROOT = Path(__file__).resolve().parents[1]
REFERENCE, QUICK, DEFAULT = "presets/nanogpt-cpu.yaml", "presets/quick.yaml", "params.yaml"
RECIPES = {"quick": QUICK, "fast": "presets/fast.yaml", "default": DEFAULT, "best": "presets/best.yaml"}
ONE_PROCESS = "quick, one process"  # without torchrun, whose start takes longer than this training
SLOWER = 1.05  # relative increase of the time per step, against the reference, that is reported


@dataclass(frozen=True)
class Race:
    """One training; its points are (seconds of training, step, validation loss)."""

    name: str
    whole_s: float
    training_s: float
    steps: int
    val_loss: float
    points: list[tuple[float, int, float]]


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Number of trainings of each recipe, with seeds from 1337 on.")] = 3,
    references: Annotated[int, typer.Option(min=1, help="Number of trainings of the reference.")] = 2,
    tokens: Annotated[Path, typer.Option(help="Folder written by the command tokenize.")] = ROOT / "data" / "tokens",
    out: Annotated[Path, typer.Option(help="File for the results; compared with its old content.")] = ROOT
    / "benchmarks"
    / "races.json",
) -> None:
    """Train, print a table and what became slower than in the last results, and write the results."""
    races: list[Race] = []
    for seed in range(1337, 1337 + seeds):
        if seed < 1337 + references:
            races.append(run("reference", REFERENCE, tokens, seed=seed))
        races += [run(name, recipe, tokens, seed=seed) for name, recipe in RECIPES.items()]
        races.append(run(ONE_PROCESS, QUICK, tokens, processes=1, seed=seed))
    names = list(dict.fromkeys(race.name for race in races))
    found = {name: summary([race for race in races if race.name == name]) for name in names}
    before = json.loads(out.read_text(encoding="utf-8"))["recipes"] if out.exists() else {}
    print("\n".join([*table(found), *slower(before, found)]))
    out.write_text(json.dumps({"recipes": found, "races": [asdict(race) for race in races]}, indent=1) + "\n")


def run(name: str, recipe: str, tokens: Path, *, processes: int = 2, **changes: int) -> Race:
    """Train once, in a temporary folder."""
    settings = [word for key, value in changes.items() for word in ("-S", f"train.{key}={value}")]
    params = read_params(ROOT / recipe, settings[1::2])
    batch = params["train"]["batch_size"] * params["model"]["block_size"]
    with tempfile.TemporaryDirectory(prefix="chargpt-race-") as folder:
        start = ["torchrun", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else [sys.executable]
        command = [*start, "-m", "gpt", "train", "--params", str(ROOT / recipe), "--tokens", str(tokens), *settings]
        command += outputs(Path(folder))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        variables = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
        began = time.monotonic()
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=variables)
        whole = time.monotonic() - began
        records = read_records(Path(folder) / "run-dir" / "history.jsonl")
        loss = json.loads((Path(folder) / "metrics").read_text())["val/best_loss"]
    points = list(timed(records, batch))
    race = Race(name, whole, points[-1][0], records[-1].step, loss, points)
    print(f"{name}: {race.training_s:.1f} s of training, {whole:.1f} s in total, loss {loss:.4f}", flush=True)
    return race


def outputs(folder: Path) -> list[str]:
    """The options that put all files of a training into one folder, each named after its option."""
    names = ("checkpoint", "metrics", "history", "validation", "run-dir", "log-file")
    return [word for name in names for word in (f"--{name}", str(folder / name))]


def timed(records: Iterable[Record], batch: int) -> Iterable[tuple[float, int, float]]:
    """Each evaluation as (seconds of training, step, validation loss); `batch` is the number of tokens per step."""
    kept = list(records)
    before = [0, *(record.step for record in kept)]
    spent = [
        (record.step - last) * batch / record.tokens_per_second for record, last in zip(kept, before, strict=False)
    ]
    for seconds, record in zip(accumulate(spent), kept, strict=True):
        if record.val_loss is not None:
            yield round(seconds, 3), record.step, record.val_loss


def summary(races: list[Race]) -> dict[str, Any]:
    """Median, minimum and maximum of the times; mean, minimum and maximum of the losses."""
    losses = [race.val_loss for race in races]
    return {
        "steps": races[0].steps,
        "training_s": spread([race.training_s for race in races]),
        "whole_s": spread([race.whole_s for race in races]),
        "ms_a_step": spread([1000 * race.training_s / race.steps for race in races]),
        "val_loss": {"mean": statistics.mean(losses), "least": min(losses), "greatest": max(losses)},
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def table(found: dict[str, Any]) -> list[str]:
    """The lines of a markdown table; times also relative to the reference."""
    lines = ["| recipe | steps | ms per step | training | whole process | loss |", "|---|---|---|---|---|---|"]
    reference = found["reference"]
    for name, recipe in found.items():
        times = (
            f"{recipe[key]['median']:.1f} s ({reference[key]['median'] / recipe[key]['median']:.2f} times faster)"
            for key in ("training_s", "whole_s")
        )
        step, loss = recipe["ms_a_step"], recipe["val_loss"]
        lines.append(
            f"| {name} | {recipe['steps']:,} | {step['median']:.1f} ({step['least']:.1f} to {step['greatest']:.1f}) | "
            f"{' | '.join(times)} | {loss['mean']:.4f} ({loss['least']:.4f} to {loss['greatest']:.4f}) |"
        )
    return lines


def slower(before: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The recipes whose time per step, relative to the reference of the same run, has increased."""
    lines = []
    for name in found.keys() & before.keys() - {"reference"}:
        now, then = (
            each[name]["ms_a_step"]["median"] / each["reference"]["ms_a_step"]["median"] for each in (found, before)
        )
        if now > SLOWER * then:
            lines.append(f"slower: a step of {name} takes {now:.2f} times the reference's, before {then:.2f} times")
    return lines or ["no recipe became slower than in the last results"]


if __name__ == "__main__":
    typer.run(main)
