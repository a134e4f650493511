"""Create the plots of README and docs, and update the output of `gpt explain` in docs/model.md: `make plots`.

Inputs: the outputs of the pipeline, and benchmarks/races.json if `make bench` has written it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gpt.data.token_files import load_tokens
from gpt.evaluation.evaluator import inspect_checkpoint
from gpt.evaluation.plots import png, render_plots
from gpt.model.checkpoint import load_checkpoint
from stages.run_plots import loss, read_table

ROOT = Path(__file__).resolve().parents[1]
TEXT = "To be, o"  # the input of `gpt explain` in docs/model.md
COLORS = {"reference": "#888888", "quick": "#2980b9", "default": "#c0392b"}
LABELS = {"reference": "nanoGPT's recipe", "quick": "presets/quick.yaml", "default": "params.yaml"}


def main() -> None:
    """Write all plots."""
    plots, docs = ROOT / "plots", ROOT / "docs"
    (docs / "loss.png").write_bytes(loss(read_table(plots / "history.csv"), read_table(plots / "validation.csv")))
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


def plot_races(races: list[dict[str, Any]]) -> Figure:
    """Validation loss by seconds of training, one line for each run."""
    figure = Figure(figsize=(8, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
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
    axes.set(xlabel="seconds of training on two cores", ylabel="validation loss (nats per character)")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
