"""A stage that reads a checkpoint: run its command, then publish what it wrote on the run of that checkpoint."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.core.files import sha256_file
from stages import child, run_record
from stages.command_line import CommandLine
from stages.publish import (
    Plots,
    Publisher,
    logged_params,
    prepare_plots,
    provenance,
    publish_run,
    rendered,
)
from stages.run_record import Record

if TYPE_CHECKING:
    from stages.mlflow_store import Store


def run_and_publish(
    stage: str,
    command: CommandLine,
    *,
    files: Sequence[Path],
    metrics: Callable[[], Mapping[str, float]] = dict,
    plots: Plots | None = None,
) -> int:
    """Run the command, then publish its files, metrics and plots.

    Args:
        files: the artifacts that the command writes.
        metrics: reads the metrics that the command wrote.
        plots: renders plots of what the command wrote.

    Returns:
        The command's exit code.

    """
    root, began = run_record.main_workspace(), time.time()
    run_record.drop_states(root)
    checkpoint = command.path("--checkpoint")
    sha256 = sha256_file(checkpoint) if checkpoint.is_file() else ""
    params = logged_params(command, stage)  # before the command runs: the file may be edited meanwhile
    run = run_record.run_of_checkpoint(root, sha256)
    publisher = Publisher(stage, root)
    with tempfile.TemporaryDirectory() as temporary:
        folder = run or Path(temporary)  # no run folder: of a checkpoint from elsewhere
        log = folder / "logs" / f"{stage}.log"

        def on_poll() -> None:
            publisher.attempt()
            if plots:
                prepare_plots()

        code = child.run(command.with_logs(root, log), stage=stage, about=sha256, on_poll=on_poll)
        if code:
            return code
        with publisher.tolerating_errors("its results"):
            name, _ = provenance()
            record = Record(
                stage=stage,
                name=name or sha256[:7],
                began=began,
                ended=time.time(),
                tags={**params, "checkpoint.sha256": sha256},
                metrics=dict(metrics()),
            )
            artifacts = {path.name: path for path in files} | {f"logs/{log.name}": log}
            run_record.save(folder, record, {**artifacts, **(rendered(stage, plots) if plots else {})})
            publisher.attempt(lambda store: _publish(store, folder, record, known=bool(run)), last=True)
    return code


def _publish(store: "Store", folder: Path, record: Record, *, known: bool) -> None:
    """Publish on the run of this run folder or, for a checkpoint without one, on the run with its SHA-256."""
    sha256 = record.tags["checkpoint.sha256"]
    if not known:
        run = store.find("checkpoint.sha256", sha256)
        if not run:
            run = store.find_or_create("checkpoint.sha256", sha256, record)
            run.finish(record)
        run.publish(folder, record)
    elif run := store.find("run.key", folder.name):
        run.publish(folder, record)
        run.describe(folder)
    else:
        publish_run(store, folder)
