"""Create the plots of README and docs, and update the output of `gpt explain` in docs/model.md: `make plots`.

Inputs: the outputs of the pipeline, and benchmarks/races.json if `make bench` has written it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from gpt.data.token_files import load_tokens
from gpt.evaluation.curves import line_figure
from gpt.evaluation.evaluator import inspect_checkpoint
from gpt.evaluation.plots import png, render_plots
from gpt.model.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TEXT = "To be, o"  # the input of `gpt explain` in docs/model.md
COLORS = {"reference": "#888888", "quick": "#2980b9", "default": "#c0392b"}
LABELS = {"reference": "nanoGPT's recipe", "quick": "presets/quick.yaml", "default": "params.yaml"}


def main() -> None:
    """Write all plots."""
    plots, docs = ROOT / "plots", ROOT / "docs"
    (docs / "loss.png").write_bytes(
        plot_loss(pd.read_csv(plots / "history.csv"), pd.read_csv(plots / "validation.csv"))
    )
    write_model_plots(docs, ROOT / "chargpt_nano.pt")
    races = ROOT / "benchmarks" / "races.json"
    if races.exists():
        figure = plot_races(json.loads(races.read_text(encoding="utf-8"))["races"])
        (docs / "speed.png").write_bytes(png(figure))


def write_model_plots(docs: Path, checkpoint: Path) -> None:
    """Write the plots of a model, and the printed scores of one head into docs/model.md."""
    tokens = load_tokens(ROOT / "data" / "tokens")
    for name, content in render_plots(inspect_checkpoint(load_checkpoint(checkpoint), tokens)):
        (docs / f"model-{name}").write_bytes(content)
    command = [sys.executable, "-m", "gpt", "explain", "--checkpoint", str(checkpoint), "--text", TEXT]
    printed = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    page = docs / "model.md"
    before, begin, rest = page.read_text(encoding="utf-8").partition(f'--text "{TEXT}"\n')
    _, end, after = rest.partition("```")
    page.write_text(before + begin + printed + end + after, encoding="utf-8")


def plot_loss(training: pd.DataFrame, validation: pd.DataFrame) -> bytes:
    """Training and validation loss by step; the last validation loss is annotated."""
    figure, axes = line_figure("step", "loss (nats per token)")
    axes.plot(training["step"], training["train/loss"], color="#9db4c8", linewidth=1, label="training")
    axes.plot(validation["step"], validation["val/loss"], color="#c0392b", marker="o", markersize=4, label="validation")
    step, loss = validation.iloc[-1][["step", "val/loss"]]
    axes.annotate(f"{loss:.3f}", (step, loss), xytext=(6, 4), textcoords="offset points")
    axes.set_xlim(0, step * 1.07)
    axes.legend(frameon=False)
    return png(figure)


def plot_races(races: list[dict[str, Any]]) -> Figure:
    """Validation loss by seconds of training, one line for each run."""
    figure, axes = line_figure("seconds of training on two cores", "validation loss (nats per character)")
    labelled = set[str]()
    for race in races:
        name = race["name"]
        if name in LABELS:
            seconds, _, losses = zip(*race["points"], strict=True)
            label = None if name in labelled else LABELS[name]
            labelled.add(name)
            axes.plot(seconds, losses, color=COLORS[name], marker="o", markersize=4, linewidth=1, label=label)
    axes.axhline(1.898, color="#888888", linewidth=0.8, linestyle=":")
    axes.annotate(
        "1.898, nanoGPT's code", (0, 1.898), xytext=(2, 3), textcoords="offset points", color="#666666", fontsize=8
    )
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
