"""Detects overfitting in a run's history: the validation loss rises while the training loss still falls, or both are
far apart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpt.data.loss import OVERFITTING_GAP
from gpt.training.history import Record

MARGIN = 0.01  # relative change of a loss that counts: more than noise between two evaluations
PATIENCE = 2  # consecutive evaluations that must show it
CERTAIN_MARGIN = 0.1  # relative change that one evaluation suffices for: a short run has no more


@dataclass(frozen=True)
class Evaluation:
    """The losses at one evaluation, in nats per token.

    `train_loss` is the mean over the later half of the records since the previous evaluation: enough steps to be
    steady, without those of a much younger model.
    """

    step: int
    val_loss: float
    train_loss: float


@dataclass(frozen=True)
class Overfitting:
    """A run has overfitted since its best evaluation, or by then; the step `detected_at` was the first to show it."""

    best: Evaluation
    last: Evaluation
    detected_at: int

    def __str__(self) -> str:
        best, last = self.best, self.last
        text = (
            f"overfitting: the validation loss {best.val_loss:.3f} is far above the training loss {best.train_loss:.3f}"
        )
        if last.val_loss > best.val_loss:
            text = (
                f"overfitting since step {best.step:,}: the validation loss rose from {best.val_loss:.3f} to "
                f"{last.val_loss:.3f} at step {last.step:,}, the training loss fell from {best.train_loss:.3f} to "
                f"{last.train_loss:.3f}; the weights of step {best.step:,} are kept"
            )
        return (
            f"{text}. Set train.max_steps nearer to {best.step:,}, raise model.dropout or train.weight_decay, "
            "reduce model.n_layer or model.n_embd, or use more text"
        )


def find_overfitting(records: Sequence[Record]) -> Overfitting | None:
    """Return whether a run has been overfitting since its best evaluation.

    That is so if, after the best one, `PATIENCE` consecutive evaluations had a higher validation loss and a lower
    training loss than the best, both by `MARGIN`, or one had by `CERTAIN_MARGIN`; or if the best evaluation's
    validation loss is more than `OVERFITTING_GAP` times its training loss.
    """
    evaluations = list(_evaluations(records))
    if not evaluations:
        return None
    best = min(evaluations, key=lambda evaluation: evaluation.val_loss)
    consecutive = 0
    for later in evaluations[evaluations.index(best) + 1 :]:
        consecutive = consecutive + 1 if _is_worse(later, best, MARGIN) else 0
        if consecutive == PATIENCE or _is_worse(later, best, CERTAIN_MARGIN):
            return Overfitting(best, evaluations[-1], later.step)
    if best.val_loss > OVERFITTING_GAP * best.train_loss:
        return Overfitting(best, evaluations[-1], best.step)
    return None


def _is_worse(later: Evaluation, best: Evaluation, margin: float) -> bool:
    """Whether the validation loss has risen and the training loss fallen, both by this relative margin."""
    return later.val_loss > best.val_loss * (1 + margin) and later.train_loss < best.train_loss * (1 - margin)


def _evaluations(records: Sequence[Record]) -> Iterator[Evaluation]:
    losses: list[float] = []  # since the previous evaluation
    for record in records:
        losses.append(record.train_loss)
        if record.val_loss is not None:
            recent = losses[len(losses) // 2 :]
            yield Evaluation(record.step, record.val_loss, sum(recent) / len(recent))
            losses = []
