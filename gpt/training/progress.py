"""Train the model; start it through torchrun to use several processes. The checkpoint is the same for any number."""

import sys
import time

from tqdm import tqdm

from gpt.core.cli import log, report
from gpt.training.history import History, Record
from gpt.training.overfitting import find_overfitting


class ProgressReporter:
    """Progress for a person: a bar on a terminal, a line at every evaluation elsewhere; the log holds the lines too."""

    def __init__(self, max_steps: int, step: int, history: History) -> None:
        self._max_steps, self._history = max_steps, history
        self._first_step, self._began = step, time.monotonic()
        self._bar = tqdm(total=max_steps, initial=step, unit="step", file=sys.stdout, disable=None, dynamic_ncols=True)
        self._val_loss = ""

    def __call__(self, record: Record) -> None:
        """Show a record."""
        if record.val_loss is not None:
            self._val_loss = f", val {record.val_loss:.3f}"
            line = (
                f"step {record.step:,}/{self._max_steps:,}: train {record.train_loss:.3f}{self._val_loss}, "
                f"rate {record.learning_rate:.2e}, {record.tokens_per_second:,.0f} tokens/s, "
                f"{self._left(record)} left"
            )
            log.info("%s", line)
            if self._bar.disable:
                print(line, flush=True)
            self._warn(record.step)
        self._bar.set_postfix_str(f"train {record.train_loss:.3f}{self._val_loss}", refresh=False)
        self._bar.update(record.step - self._bar.n)
        if record.step == self._max_steps:
            self._bar.close()

    def _warn(self, step: int) -> None:
        """Say that the run overfits, once from a best evaluation to the next; at the end the closing line says it."""
        found = find_overfitting(self._history.records)
        if found and found.noticed == step < self._max_steps:
            with tqdm.external_write_mode(file=sys.stdout):
                report(str(found))

    def _left(self, record: Record) -> str:
        seconds_a_step = (time.monotonic() - self._began) / (record.step - self._first_step)
        return tqdm.format_interval(seconds_a_step * (self._max_steps - record.step))
