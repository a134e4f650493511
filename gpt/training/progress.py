"""Progress of a training run for the user: a bar on a terminal, elsewhere a line per evaluation, as in the log."""

import sys
import time

from tqdm import tqdm

from gpt.core.cli import log, report
from gpt.training.history import History, Record
from gpt.training.overfitting import find_overfitting


class ProgressReporter:
    """Shows each record as it comes, if `show`; training starts after `step`."""

    def __init__(self, max_steps: int, step: int, history: History, *, show: bool) -> None:
        self._max_steps, self._history = max_steps, history
        self._first_step, self._started = step, time.monotonic()
        disable = None if show else True  # None: where stdout is no terminal
        self._bar = tqdm(
            total=max_steps, initial=step, unit="step", file=sys.stdout, disable=disable, dynamic_ncols=True
        )
        self._val_loss = ""

    def __call__(self, record: Record) -> None:
        """Show a record."""
        if record.val_loss is not None:
            self._val_loss = f", val {record.val_loss:.3f}"
            line = (
                f"step {record.step:,}/{self._max_steps:,}: train {record.train_loss:.3f}{self._val_loss}, "
                f"rate {record.learning_rate:.2e}, {record.tokens_per_second:,.0f} tokens/s, "
                f"{self._time_left(record)} left"
            )
            log.info("%s", line)
            if self._bar.disable:
                print(line, flush=True)
            self._warn_of_overfitting(record.step)
        self._bar.set_postfix_str(f"train {record.train_loss:.3f}{self._val_loss}", refresh=False)
        self._bar.update(record.step - self._bar.n)
        if record.step == self._max_steps:
            self._bar.close()

    def _warn_of_overfitting(self, step: int) -> None:
        """Warn once per best evaluation; at the last step the final report does."""
        found = find_overfitting(self._history.records)
        if found and found.detected_at == step < self._max_steps:
            with tqdm.external_write_mode(file=sys.stdout):
                report(str(found))

    def _time_left(self, record: Record) -> str:
        seconds_per_step = (time.monotonic() - self._started) / (record.step - self._first_step)
        return tqdm.format_interval(seconds_per_step * (self._max_steps - record.step))
