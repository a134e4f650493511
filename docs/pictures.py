"""Draw the pictures of the README from the pipeline's own outputs: `python docs/pictures.py` (or `make pictures`)."""

from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Draw the loss over the steps."""
    history = pd.read_csv(ROOT / "plots" / "history.csv")
    validation = pd.read_csv(ROOT / "plots" / "validation.csv")
    figure, axes = plt.subplots(figsize=(8, 3.6), dpi=110, layout="constrained")
    axes.plot(history["step"], history["train_loss"], color="#9db4c8", linewidth=1, label="training")
    axes.plot(validation["step"], validation["val_loss"], color="#c0392b", marker="o", markersize=4, label="validation")
    last = validation.iloc[-1]
    end = (last["step"], last["val_loss"])
    axes.annotate(f"{last['val_loss']:.3f}", end, xytext=(6, 4), textcoords="offset points")
    axes.set(xlabel="step", ylabel="loss (nats a character)", ylim=(1.2, 3.5), xlim=(0, history["step"].max() * 1.07))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(ROOT / "docs" / "loss.png")


if __name__ == "__main__":
    main()
