"""Overfitting, read from a run's history: the validation loss rises while the training loss goes on falling."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpt.training.history import Record

MARGIN = 0.01  # share by which a loss has to move to count: more than chance moves it between two evaluations
PATIENCE = 2  # evaluations in a row that have to show it


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found: losses in nats a token.

    `train_loss` is the mean over the later half of the records since the evaluation before: over enough steps to be
    steady, and without those before the model had come near to where it is now.
    """

    step: int
    val_loss: float
    train_loss: float


@dataclass(frozen=True)
class Overfitting:
    """Since the best evaluation the model has only learnt its training text by heart."""

    best: Evaluation
    last: Evaluation
    noticed: int  # step of the evaluation that first showed it

    def __str__(self) -> str:
        best, last = self.best, self.last
        return (
            f"overfitting since step {best.step:,}: the validation loss went from {best.val_loss:.3f} up to "
            f"{last.val_loss:.3f} at step {last.step:,}, the training loss from {best.train_loss:.3f} down to "
            f"{last.train_loss:.3f}; the weights of step {best.step:,} are kept. Set train.max_steps nearer to "
            f"{best.step:,}, raise model.dropout or train.weight_decay, shrink the model (model.n_layer, "
            "model.n_embd), or take more text"
        )


def find_overfitting(records: Sequence[Record]) -> Overfitting | None:
    """Tell whether a run has been overfitting since its best evaluation.

    It has when, after the best, `PATIENCE` evaluations in a row had a validation loss higher than the best one and a
    training loss lower than the one then, both by `MARGIN`.
    """
    evaluations = list(_evaluations(records))
    if not evaluations:
        return None
    best = min(evaluations, key=lambda evaluation: evaluation.val_loss)
    in_a_row = 0
    for one in evaluations[evaluations.index(best) + 1 :]:
        worse = one.val_loss > best.val_loss * (1 + MARGIN) and one.train_loss < best.train_loss * (1 - MARGIN)
        in_a_row = in_a_row + 1 if worse else 0
        if in_a_row == PATIENCE:
            return Overfitting(best, evaluations[-1], one.step)
    return None


def _evaluations(records: Sequence[Record]) -> Iterator[Evaluation]:
    since: list[float] = []
    for record in records:
        since.append(record.train_loss)
        if record.val_loss is not None:
            recent = since[len(since) // 2 :]
            yield Evaluation(record.step, record.val_loss, sum(recent) / len(recent))
            since = []
