"""The history of a training run: appended live as JSON lines, written at the end as CSV without timings."""

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.core.files import atomic_write, explain_os_errors

# Fields of a Record by the names of their metrics in all files, in DVC and in MLflow.
METRICS = {
    "train/loss": "train_loss",
    "val/loss": "val_loss",
    "train/learning_rate": "learning_rate",
    "train/grad_norm": "grad_norm",
    "train/tokens_per_second": "tokens_per_second",
}
TRAINING = ["step", "train/loss", "train/learning_rate", "train/grad_norm"]  # columns that a re-run repeats bit for bit
VALIDATION = ["step", "val/loss"]


@dataclass(frozen=True)
class Record:
    """Metrics of one step: losses in nats per token, time in seconds since 1970.

    `train_loss` is the mean over the steps since the previous record; `val_loss` is None except at evaluations.
    """

    step: int
    train_loss: float
    val_loss: float | None
    learning_rate: float
    grad_norm: float
    time: float
    tokens_per_second: float


class History:
    """The records of a run, in memory and in a file that other processes follow."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []

    def resume(self, step: int) -> None:
        """Load the records of an earlier process up to a step and delete those after it."""
        self.records = [record for record in read_records(self.path) if record.step <= step]
        with atomic_write(self.path) as file:
            file.write("".join(map(_line, self.records)).encode())

    def append(self, record: Record) -> None:
        """Add a record, visible to readers of the file at once."""
        self.records.append(record)
        with explain_os_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def flush(self) -> None:
        """Flush the records to the disk, so that no resume state is ahead of them."""
        if self.records:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def write_csv(self, training: Path, validation: Path) -> None:
        """Write training and validation metrics as two tables, the same bytes for the same training.

        Two, since evaluations are rarer than records, and DVC plots an empty cell as zero.
        """
        rows = [_by_metric(record) for record in self.records]
        _write_csv(training, TRAINING, rows)
        _write_csv(validation, VALIDATION, [row for row in rows if row["val/loss"] is not None])


def read_records(path: Path) -> list[Record]:
    """Read a history file; an incomplete last line, left by a killed process, is ignored."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [_from_metrics(json.loads(line)) for line in lines if line.endswith("\n")]


def _write_csv(path: Path, columns: list[str], rows: Iterable[Mapping[str, float | None]]) -> None:
    """Write some columns as a table. Without pandas, whose import would delay every rank of a training."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def _line(record: Record) -> str:
    return json.dumps({name: value for name, value in _by_metric(record).items() if value is not None}) + "\n"


def _by_metric(record: Record) -> dict[str, float | None]:
    metrics = {name: getattr(record, field) for name, field in METRICS.items()}
    return {"step": record.step, "time": record.time, **metrics}


def _from_metrics(values: dict[str, Any]) -> Record:
    fields: dict[str, Any] = {field: values.get(name) for name, field in METRICS.items()}
    return Record(step=values["step"], time=values["time"], **fields)
