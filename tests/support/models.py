"""Trained and evaluated models in a store, published from run folders, without a training."""

import json
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gpt.core.files import sha256_file
from stages.runs.publish import publish_run
from stages.runs.run_record import Record, save
from stages.tracking.store import Store

CHECKPOINT = "chargpt_nano.pt"
METRICS = {"val/calibration_error": 0.02, "val/longest_copy": 12, "val/copied_windows": 0.0}


def blocks(bits: float, *, noise: float = 0.0, seed: int = 0, sizes: int = 1000) -> pd.DataFrame:
    """The table blocks.csv of a model with this loss in bits per character, which varies by `noise` between blocks."""
    own = np.random.default_rng(seed).normal(0, noise, 100)
    nats = (bits + own - own.mean()) * np.log(2) * sizes
    return pd.DataFrame({"block": range(1, 101), "characters": sizes, "nats": nats.round(4)})


def publish_model(store: Store, name: str, table: pd.DataFrame, **changes: Any) -> str:
    """Write chargpt_nano.pt, whose content is the name, and a run folder, and publish it; returns the run's ID.

    Args:
        table: blocks.csv.
        changes: params, corpus (its SHA-256), metrics of the evaluation, tags.
    """
    (store.root / CHECKPOINT).write_text(name)
    sha256, metrics = sha256_file(store.root / CHECKPOINT), {**METRICS, **changes.get("metrics", {})}
    folder = store.root / ".runs" / sha256  # as good as a real key
    times: dict[str, Any] = {"began": 1, "ended": 2, "name": name}
    tags = {"run.key": folder.name, "checkpoint.sha256": sha256, **changes.get("tags", {})}
    trained = {
        "checkpoint": sha256,
        "checkpoint_file": CHECKPOINT,
        "params": changes.get("params", {"train.seed": name}),
    }
    dataset = {"corpus_sha256": changes.get("corpus", "c" * 64)}
    save(folder, Record(stage="train", tags=tags, dataset=dataset, **trained, **times), {})
    metrics["val/bits_per_char"] = float(table["nats"].sum() / np.log(2) / table["characters"].sum())
    files: dict[str, Path | str] = {"evaluate.json": json.dumps(metrics), "blocks.csv": table.to_csv(index=False)}
    save(folder, Record(stage="evaluate", metrics=metrics, **times), files)
    with chdir(store.root):
        publish_run(store, folder)
    run = store.find("run.key", folder.name)
    assert run
    return run.id
