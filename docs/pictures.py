"""Draw the pictures of README and docs: `make pictures`, from the pipeline's outputs and the last benchmark."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gpt.data.token_files import load_tokens
from gpt.evaluation.evaluator import look_at
from gpt.evaluation.plots import pictures
from gpt.model.checkpoint import load_checkpoint
from stages.run_plots import loss, read_table

ROOT = Path(__file__).resolve().parents[1]
TEXT = "To be, o"  # that docs/model.md shows the scores of
COLOURS = {"reference": "#888888", "quick": "#2980b9", "default": "#c0392b"}
NAMES = {"reference": "nanoGPT's recipe", "quick": "presets/quick.yaml", "default": "params.yaml"}


def main() -> None:
    """Draw the losses over the steps, what is to see in the model, and the race against the reference recipe."""
    plots, docs = ROOT / "plots", ROOT / "docs"
    (docs / "loss.png").write_bytes(loss(read_table(plots / "history.csv"), read_table(plots / "validation.csv")))
    model(docs, ROOT / "chargpt_nano.pt")
    races = ROOT / "benchmarks" / "races.json"
    if races.exists():  # `make bench` writes it
        found = json.loads(races.read_text(encoding="utf-8"))["races"]
        race(found).savefig(docs / "speed.png", metadata={"Software": None})


def model(docs: Path, checkpoint: Path) -> None:
    """Draw what is to see in a model, and put what `gpt explain` prints of it into docs/model.md."""
    for name, content in pictures(look_at(load_checkpoint(checkpoint), load_tokens(ROOT / "data" / "tokens"))):
        (docs / f"model-{name}").write_bytes(content)
    words = ["explain", "--checkpoint", str(checkpoint), "--text", TEXT]
    printed = subprocess.run(
        [sys.executable, "-m", "gpt", *words], cwd=ROOT, text=True, capture_output=True, check=True
    )
    page = docs / "model.md"
    before, begin, rest = page.read_text(encoding="utf-8").partition(f'--text "{TEXT}"\n')
    _, end, after = rest.partition("```")
    page.write_text(before + begin + printed.stdout + end + after, encoding="utf-8")


def race(races: list[dict[str, Any]]) -> Figure:
    """Validation loss against seconds of training, one line a run."""
    figure = Figure(figsize=(8, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    named = set()
    for one in races:
        if one["name"] in NAMES:
            seconds, _, losses = zip(*one["points"], strict=True)
            label = None if one["name"] in named else NAMES[one["name"]]
            named.add(one["name"])
            axes.plot(seconds, losses, color=COLOURS[one["name"]], marker="o", markersize=4, linewidth=1, label=label)
    axes.axhline(1.898, color="#888888", linewidth=0.8, linestyle=":")
    axes.annotate(
        "1.898, published", (0, 1.898), xytext=(2, 3), textcoords="offset points", color="#666666", fontsize=8
    )
    axes.set(xlabel="seconds of training on two cores", ylabel="validation loss (nats a character)")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
