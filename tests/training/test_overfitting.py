"""Overfitting is found where the validation loss rises and the training loss falls, or both are far apart."""

import pytest

from gpt.training.history import Record
from gpt.training.overfitting import Evaluation, Overfitting, find_overfitting

Losses = list[tuple[float, float]]  # validation, training
FALLING: Losses = [(2.0, 1.9), (1.5, 1.3), (1.4, 1.2)]


def history(evaluations: Losses) -> list[Record]:
    """Two records per evaluation, at steps 10 and 20, 30 and 40, …; the first has a much higher training loss."""
    records = []
    for number, (val_loss, train_loss) in enumerate(evaluations, 1):
        records.append(Record(20 * number - 10, train_loss + 1, None, 0.1, 1.0, 0.0, 0.0))
        records.append(Record(20 * number, train_loss, val_loss, 0.1, 1.0, 0.0, 0.0))
    return records


@pytest.mark.parametrize(
    ("evaluations", "detected_at"),
    [
        ([], None),
        (FALLING, None),
        ([*FALLING, (1.45, 1.1)], None),  # once is noise
        ([*FALLING, (1.45, 1.1), (1.5, 1.0)], 100),
        ([*FALLING, (1.45, 1.1), (1.5, 1.0), (1.55, 0.9)], 100),
        ([*FALLING, (1.45, 1.1), (1.401, 1.0), (1.45, 0.9)], None),  # not consecutive
        ([*FALLING, (1.413, 1.1), (1.413, 1.0)], None),  # within 1 %
        ([*FALLING, (1.45, 1.195), (1.45, 1.195)], None),
        ([(0.94, 0.61), (1.33, 0.5)], 40),  # once, but by more than noise
        ([(1.2, 1.1), (0.94, 0.21)], 40),  # memorized at the best evaluation
        ([*FALLING, (1.6, 1.5), (1.7, 1.6)], None),  # both rise: the training diverges
        ([*FALLING, (1.45, 1.1), (1.5, 1.0), (1.39, 0.95)], None),  # a new best evaluation
        ([*FALLING, (1.45, 0.9), (1.5, 0.8), (1.39, 1.1)], None),
        ([*FALLING, (1.45, 1.1), (1.5, 1.0), (1.39, 0.95), (1.45, 0.9), (1.45, 0.85)], 160),
    ],
)
def test_detection(evaluations: Losses, detected_at: int | None) -> None:
    found = find_overfitting(history(evaluations))
    assert (found.detected_at if found else None) == detected_at


def test_the_message_names_steps_losses_and_params() -> None:
    found = find_overfitting(history([*FALLING, (1.45, 1.1), (1.5, 1.0), (1.55, 0.9)]))
    assert found == Overfitting(Evaluation(60, 1.4, 1.2), Evaluation(120, 1.55, 0.9), 100)
    parts = ["step 60", "1.400", "1.550 at step 120", "1.200", "0.900"]
    for part in [*parts, "train.max_steps", "model.dropout", "train.weight_decay", "model.n_layer"]:
        assert part in str(found)
    assert "\n" not in str(found)
