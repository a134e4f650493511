"""Whoever trains too long on too little hears of it while it happens, once, and again at the end."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest

from gpt.core.cli import logging_to
from gpt.core.errors import StoppedError
from gpt.core.params import check_section
from gpt.data.prepare import tokenize
from gpt.data.token_files import load_tokens
from gpt.evaluation.evaluator import EvaluateParams, evaluate
from gpt.model.checkpoint import load_checkpoint
from gpt.model.config import ModelConfig
from gpt.training.history import Record
from gpt.training.overfitting import Evaluation, Overfitting, find_overfitting
from gpt.training.run import Outputs, train
from gpt.training.run_folder import RunFolder
from gpt.training.trainer import TrainParams
from tests.support.common import made_up_text, small_params, tokenize_params

Pairs = list[tuple[float, float]]
FALLS: Pairs = [(2.0, 1.9), (1.5, 1.3), (1.4, 1.2)]


def records(evaluations: Pairs) -> list[Record]:
    """A history with two records an evaluation, of which the first has a training loss far above the second."""
    found = []
    for number, (val_loss, train_loss) in enumerate(evaluations, 1):
        found.append(Record(20 * number - 10, train_loss + 1, None, 0.1, 1.0, 0.0, 0.0))
        found.append(Record(20 * number, train_loss, val_loss, 0.1, 1.0, 0.0, 0.0))
    return found


@pytest.mark.parametrize(
    ("evaluations", "noticed"),
    [
        ([], None),
        (FALLS, None),
        ([*FALLS, (1.45, 1.1)], None),  # once is chance
        ([*FALLS, (1.45, 1.1), (1.5, 1.0)], 100),
        ([*FALLS, (1.45, 1.1), (1.5, 1.0), (1.55, 0.9)], 100),
        ([*FALLS, (1.45, 1.1), (1.401, 1.0), (1.45, 0.9)], None),  # not in a row
        ([*FALLS, (1.413, 1.1), (1.413, 1.0)], None),  # within 1 %
        ([*FALLS, (1.45, 1.195), (1.45, 1.195)], None),
        ([*FALLS, (1.6, 1.5), (1.7, 1.6)], None),  # both rise: the training went astray
        ([*FALLS, (1.45, 1.1), (1.5, 1.0), (1.39, 0.95)], None),  # better again
        ([*FALLS, (1.45, 0.9), (1.5, 0.8), (1.39, 1.1)], None),
        ([*FALLS, (1.45, 1.1), (1.5, 1.0), (1.39, 0.95), (1.45, 0.9), (1.45, 0.85)], 160),
    ],
)
def test_by_hand(evaluations: Pairs, noticed: int | None) -> None:
    found = find_overfitting(records(evaluations))
    assert (found.noticed if found else None) == noticed


def test_the_line_says_since_when_how_much_and_what_to_do() -> None:
    found = find_overfitting(records([*FALLS, (1.45, 1.1), (1.5, 1.0), (1.55, 0.9)]))
    assert found == Overfitting(Evaluation(60, 1.4, 1.2), Evaluation(120, 1.55, 0.9), 100)
    for part in (
        "since step 60",
        "1.400 up to 1.550 at step 120",
        "1.200 down to 0.900",
        "weights of step 60 are kept",
        "train.max_steps nearer to 60",
        "model.dropout",
        "train.weight_decay",
        "model.n_layer",
    ):
        assert part in str(found)
    assert "\n" not in str(found)


def train_on(text: str, folder: Path, *, steps: int) -> None:
    """Train a tiny model; the log goes to a file in the folder."""
    (folder / "text.txt").write_text(text)
    tokenize(params=tokenize_params(), corpus=folder / "text.txt", out=folder / "tokens")
    changes = {"train__max_steps": steps, "train__eval_interval": 20, "train__shards": 1, "model__block_size": 16}
    params = small_params(**changes, train__save_interval=10, model__dropout=0.0)
    with logging_to([folder / "log"], "train"):
        train(
            params=check_section(Path("test"), "train", TrainParams, params),
            model=check_section(Path("test"), "model", ModelConfig, params),
            data=load_tokens(folder / "tokens"),
            made_of={},
            outputs=Outputs(folder / "model.pt", folder / "train.json", folder / "history.csv", folder / "val.csv"),
            folder=RunFolder(folder / "run"),
            timeout_s=30,
        )


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "overfitting since" in line]


STRANGE = made_up_text(130) + made_up_text(20)[::-1]  # what is learnt at its beginning is no help at its end


def test_a_text_that_is_learnt_by_heart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said once and at the end, on the screen and in the log; continued after a stop, the very same."""
    (tmp_path / "whole").mkdir()
    train_on(STRANGE, tmp_path / "whole", steps=100)
    *before, last, told = capsys.readouterr().out.splitlines()
    assert len(lines("\n".join(before))) == 1
    assert "validation loss" in last
    assert lines(told)
    assert "at step 100" in told
    best = json.loads((tmp_path / "whole" / "train.json").read_text())
    table = pd.read_csv(tmp_path / "whole" / "history.csv", index_col="step")
    assert best["train_loss"] == round(table.loc[best["best_step"], "train_loss"], 4)
    assert len(lines((tmp_path / "whole" / "log").read_text())) == 2

    (tmp_path / "stopped").mkdir()
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr("gpt.train._polite_signals", lambda: stopping_after(step_before(before)))
        train_on(STRANGE, tmp_path / "stopped", steps=100)
    assert lines(capsys.readouterr().out) == []
    train_on(STRANGE, tmp_path / "stopped", steps=100)
    assert lines(capsys.readouterr().out) == [*lines("\n".join(before)), told]
    for name in ("model.pt", "train.json", "history.csv", "val.csv"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def step_before(said: list[str]) -> int:
    """Five steps before the evaluation that showed it, long after the best one."""
    at = next(number for number, line in enumerate(said) if lines(line))
    return int(said[at - 1].split()[1].split("/")[0]) - 5


@contextmanager
def stopping_after(step: int) -> Iterator[object]:
    steps = iter(range(1, 1000))
    yield lambda: next(steps) == step


def test_a_text_long_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_on(made_up_text(2000), tmp_path, steps=60)
    said = capsys.readouterr().out
    assert "validation loss" in said
    assert lines(said) == []


def test_what_was_learnt_by_heart_is_found_in_what_the_model_writes(tmp_path: Path) -> None:
    train_on("abcdefghij\n" * 100, tmp_path, steps=60)
    found = evaluate(
        params=EvaluateParams(batch_size=64, precision="float32", sample_characters=800, seed=1, device="cpu"),
        checkpoint=load_checkpoint(tmp_path / "model.pt"),
        data=load_tokens(tmp_path / "tokens"),
    )
    assert found.metrics["longest_copy"] > 50
    assert found.metrics["copied"] > 0.5
    assert "'abcdefghij\\nabcdefghij" in found.summary[-1]
    assert "validation text: 100.0%" in found.summary[-1]
