"""Ablations of the default recipe: short trainings with one change each, over several seeds.

    python -m benchmarks.ablations

All trainings have equal numbers of steps, hence of tokens; `benchmarks.steps` measures time. Two trainings run at a
time, each with one process and one thread, which does not affect the results.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.races import DEFAULT, ROOT, outputs

BASELINE = "baseline"
CHANGES = {
    BASELINE: (),
    "no n-gram embeddings": ("model.ngram=1",),
    "n-grams up to 3": ("model.ngram=3",),
    "AdamW instead of Muon, learning rate 0.005": ("train.optimizer=adamw", "train.learning_rate=0.005"),
    "learned positions": ("model.position=learned",),
    "GELU": ("model.activation=gelu",),
    "no QK norm": ("model.qk_norm=false",),
    "tied embeddings": ("model.tie_embeddings=true",),
    "random windows": ("train.windows=random",),
    "float32": ("train.precision=float32",),
    "cosine schedule": ("train.schedule=cosine",),
    "dropout 0.1": ("model.dropout=0.1",),
    "no weight averaging": ("train.weight_average=0.0",),
    "no positions": ("model.position=none",),
    "ALiBi": ("model.position=alibi",),
    "SwiGLU": ("model.activation=swiglu",),
    "RMSNorm": ("model.norm=rms",),
    "width 128": ("model.n_embd=128",),
    "block size 256, batch size 8": ("model.block_size=256", "train.batch_size=8"),
    "n-grams up to 4": ("model.ngram=4",),
    "n-grams up to 6": ("model.ngram=6",),
    "65,536 n-gram embeddings": ("model.ngram_rows=65536",),
    "n-gram embeddings of model width": ("model.ngram_width=160",),
    "Muon learning rate 0.02": ("train.muon_learning_rate=0.02",),
    "weight decay 0.3": ("train.weight_decay=0.3",),
    "weight decay 3": ("train.weight_decay=3.0",),
    "dropout 0.05": ("model.dropout=0.05",),
    "dropout 0.1, weight decay 0.3": ("model.dropout=0.1", "train.weight_decay=0.3"),
}


def main(
    steps: int = 150,
    seeds: int = 3,
    tokens: Annotated[Path, typer.Option(help="Folder written by the command tokenize.")] = ROOT / "data" / "tokens",
    only: Annotated[
        list[str] | None, typer.Option(help="Run only changes whose name contains this; repeatable.")
    ] = None,
) -> None:
    """Train and print a markdown table: mean loss, range over the seeds, difference from the baseline."""
    short = [f"train.max_steps={steps}", f"train.eval_interval={steps}"]
    parts = only or [""]
    chosen = {name: changes for name, changes in CHANGES.items() if not changes or any(part in name for part in parts)}
    with ThreadPoolExecutor(2) as pool:
        losses = {
            name: [
                pool.submit(final_loss, [*short, *changes, f"train.seed={seed}"], tokens)
                for seed in range(1337, 1337 + seeds)
            ]
            for name, changes in chosen.items()
        }
        print(f"| {steps} steps, {seeds} seeds | loss | range | difference |\n|---|---|---|---|")
        baseline = statistics.mean(each.result() for each in losses[BASELINE])
        for name, futures in losses.items():
            found = [each.result() for each in futures]
            mean = statistics.mean(found)
            print(f"| {name} | {mean:.4f} | {max(found) - min(found):.4f} | {mean - baseline:+.4f} |", flush=True)


def final_loss(changes: list[str], tokens: Path) -> float:
    """The loss on the whole validation split after training in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="chargpt-ablation-") as folder:
        command = [sys.executable, "-m", "gpt", "train", "--params", str(ROOT / DEFAULT), "--tokens", str(tokens)]
        command += [word for change in changes for word in ("-S", change)]
        command += outputs(Path(folder))
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return float(json.loads((Path(folder) / "metrics").read_text())["val/best_loss"])


if __name__ == "__main__":
    typer.run(main)
