"""Create the plots of README and docs, and update the output of `gpt explain` in docs/model.md: `make plots`.

Inputs: the outputs of the pipeline, and the files races.json and scale.json that `make bench` writes into benchmarks/.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from gpt.data.token_files import load_tokens
from gpt.evaluation.curves import line_figure
from gpt.evaluation.evaluator import inspect_checkpoint
from gpt.evaluation.plots import png, render_plots
from gpt.model.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TEXT = "To be, o"  # the input of `gpt explain` in docs/model.md
COLORS = {"reference": "#888888", "quick": "#2980b9", "default": "#c0392b", "fast": "#8e44ad", "best": "#27ae60"}
IDEAL = {"training: MB of text": 0, "training: processes": -1}  # exponents of growth; linear for all others
LABELS = {"reference": "nanoGPT's recipe", "default": "params.yaml"} | {
    name: f"presets/{name}.yaml" for name in ("quick", "fast", "best")
}


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
    scale = ROOT / "benchmarks" / "scale.json"
    if scale.exists():
        (docs / "scale.png").write_bytes(png(plot_scale(pd.DataFrame(json.loads(scale.read_text())["points"]))))


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


def plot_scale(points: pd.DataFrame) -> Figure:
    """Time by size for each series, with a dotted line for the exponents in `IDEAL`, and peak memory by text size."""
    figure, empty = line_figure("", "")
    empty.remove()
    figure.set_size_inches(9, 5)
    series = list(dict.fromkeys(points["series"]))
    panels = figure.subplots(2, 3).flat
    for axes, name in zip(panels, series, strict=False):
        found = points[points["series"] == name]
        size, unit = found["size"], (1 if found["seconds"].max() > 10 else 1000)
        axes.plot(size, unit * found["seconds"], color="#c0392b", marker="o", markersize=4, linewidth=1)
        ideal = unit * found["seconds"].iloc[0] * (size / size.iloc[0]) ** IDEAL.get(name, 1)
        axes.plot(size, ideal, color="#888888", linewidth=0.8, linestyle=":")
        axes.set(xlabel=name.partition(": ")[2], ylabel="s" if unit == 1 else "ms per step", xscale="log", yscale="log")
        axes.set_title(name.partition(":")[0], fontsize=9)
    memory = figure.axes[-1]
    for name, color in zip(series, ("#2980b9", "#c0392b"), strict=False):
        found = points[points["series"] == name]
        label = name.partition(":")[0]
        memory.plot(found["size"], found["memory_gb"], color=color, marker="o", markersize=4, linewidth=1, label=label)
    memory.set(xlabel="MB of text", ylabel="GB", xscale="log", ylim=(0, None))
    memory.set_title("peak memory", fontsize=9)
    memory.legend(frameon=False, fontsize=8)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
        label_sizes(axes, sorted({line for part in axes.lines for line in part.get_xdata()}))
    return figure


def label_sizes(axes: Axes, sizes: list[float]) -> None:
    """Label exactly the measured sizes, and every half power of ten, as plain numbers."""
    axes.set_xticks(sizes, [f"{size:,g}" for size in sizes])
    axes.minorticks_off()
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        low, high = axes.get_ylim()
        axes.set_ylim(low / 2, high * 2)  # so that noise does not look like growth
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


if __name__ == "__main__":
    main()
