"""A training run as a whole: fine-tuning from an init checkpoint, and the report of overfitting."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gpt.commands.check_params import command as check_params
from gpt.core.cli import logging_to
from gpt.core.errors import StoppedError, UserError
from gpt.core.files import sha256_file
from gpt.core.params import check_section, read_params
from gpt.data.prepare import tokenize
from gpt.data.token_files import load_tokens
from gpt.evaluation.evaluator import EvaluateParams, evaluate
from gpt.model.checkpoint import load_checkpoint
from gpt.model.config import ModelConfig
from gpt.tokenizers.char import CharTokenizer
from gpt.training.fingerprint import run_key
from gpt.training.run import Outputs, load_init_checkpoint, train
from gpt.training.run_folder import RunFolder
from gpt.training.trainer import TrainParams
from tests.conftest import RunMain
from tests.support.common import contents, made_up_text, small_params, stage_line, tokenize_params, write_params


def write(folder: Path, source: str, **changes: Any) -> Path:
    common = {"download__sources": [source], "download__sha256": None, "train__eval_interval": 10}
    return write_params(folder / "params.yaml", **{**common, **changes})


def start_from(folder: Path, source: str, files: dict[str, str], **changes: Any) -> Path:
    """Write params whose sections start from these files of the folder, with their digests."""
    init = {f"{section}__init_from": name for section, name in files.items()}
    init |= {f"{section}__init_sha256": sha256_file(folder / name) for section, name in files.items()}
    return write(folder, source, **init, **changes)


@pytest.fixture
def workspace(tmp_path: Path, trained: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a trained model, `base.pt`, its tokenizer, `base.json`, and another text."""
    (tmp_path / "other.txt").write_text(made_up_text(seed=1).replace("fox", "bat").replace("dog", "cat"))
    shutil.copy(trained / "model.pt", tmp_path / "base.pt")
    shutil.copy(tokens / "tokenizer.json", tmp_path / "base.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_fine_tuning_starts_from_the_init_checkpoint(workspace: Path, run_main: RunMain) -> None:
    losses = []
    for fine_tune in (False, True):
        changes = {"train__max_steps": 5, "train__precision": "float32", "model__dropout": 0.0}
        files = {"tokenize": "base.json"} | ({"train": "base.pt"} if fine_tune else {})
        start_from(workspace, "other.txt", files, **changes)
        for stage in ("download", "tokenize", "train"):
            run_main(*stage_line(stage))
        losses.append(json.loads((workspace / "metrics" / "train.json").read_text())["val/best_loss"])
    from_scratch, fine_tuned = losses
    assert fine_tuned < from_scratch - 0.5
    checkpoint = load_checkpoint(workspace / "chargpt_nano.pt")
    assert checkpoint.about["train"]["init_from"] == "base.pt"
    assert checkpoint.tokenizer == load_checkpoint(workspace / "base.pt").tokenizer


def test_an_init_file_is_pinned_by_its_sha256(workspace: Path, run_main: RunMain) -> None:
    digest = sha256_file(workspace / "base.pt")
    params = write(workspace, "other.txt", train__init_from="base.pt")
    with pytest.raises(UserError, match=rf"train\.init_sha256: .* null; set it to {digest}"):
        check_params(params)
    start_from(workspace, "other.txt", {"tokenize": "base.json", "train": "base.pt"})
    for stage in ("download", "tokenize"):
        run_main(*stage_line(stage))
    key = run_key(read_params(params), workspace / "data" / "tokens")
    changed = (workspace / "base.pt").read_bytes() + b" "
    (workspace / "base.pt").write_bytes(changed)
    new = hashlib.sha256(changed).hexdigest()
    assert re.search(
        rf"train\.init_from: .*{digest}.*-S train\.init_sha256={new}", run_main(*stage_line("train"), code=2)
    )
    start_from(workspace, "other.txt", {"tokenize": "base.json", "train": "base.pt"})
    assert run_key(read_params(params), workspace / "data" / "tokens") != key
    (workspace / "base.json").write_text("{}")
    assert re.search(r"tokenize\.init_from: .*base\.json", run_main(*stage_line("tokenize"), code=2))
    (workspace / "base.json").unlink()
    assert re.search(r"tokenize\.init_from: .*base\.json", run_main(*stage_line("tokenize"), code=2))
    (workspace / "base.pt").unlink()
    assert re.search(r"train\.init_from: .*base\.pt .*absolute path", run_main(*stage_line("train"), code=2))


def test_an_init_checkpoint_of_another_architecture_or_tokenizer_is_refused(workspace: Path, run_main: RunMain) -> None:
    base = load_checkpoint(workspace / "base.pt")
    other = base.model.model_copy(update={"n_layer": 9, "position": "alibi", "dropout": 0.5})
    found = rf"base\.pt: n_layer {base.model.n_layer} instead of 9; position '{base.model.position}' instead of 'alibi'"
    with pytest.raises(UserError, match=found):
        load_init_checkpoint(Path("base.pt"), other, base.tokenizer)
    with pytest.raises(UserError, match=r"train\.init_from: .* tokenizer of base\.pt"):
        load_init_checkpoint(Path("base.pt"), base.model, CharTokenizer("\nabc"))
    (workspace / "accents.txt").write_text(made_up_text() + "Été", encoding="utf-8")
    start_from(workspace, "accents.txt", {"tokenize": "base.json"})
    run_main(*stage_line("download"))
    assert "'É', 'é'" in run_main(*stage_line("tokenize"), code=2)


# Overfitting.


def train_on(text: str, folder: Path, *, steps: int) -> None:
    """Train a tiny model; the log goes to a file in the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(text)
    tokenize(params=tokenize_params(), corpus=folder / "text.txt", out=folder / "tokens")
    changes = {"train__max_steps": steps, "train__eval_interval": 20, "train__shards": 1, "train__optimizer": "adamw"}
    changes |= {"train__precision": "float32", "model__n_layer": 1, "model__block_size": 16, "model__dropout": 0.0}
    params = small_params(**changes, train__save_interval=10)
    with logging_to([folder / "log"], "train"):
        train(
            params=check_section(Path("test"), "train", TrainParams, params),
            model=check_section(Path("test"), "model", ModelConfig, params),
            data=load_tokens(folder / "tokens"),
            digests={},
            outputs=Outputs(folder / "model.pt", folder / "train.json", folder / "history.csv", folder / "val.csv"),
            folder=RunFolder(folder / "run"),
            timeout_s=30,
        )


def warnings_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if "overfitting since" in line]


UNEVEN = made_up_text(130) + made_up_text(20)[::-1]  # its end, the validation split, is unlike its beginning


@contextmanager
def stop_after(step: int) -> Iterator[Callable[[], bool]]:
    steps = iter(range(1, 1000))
    yield lambda: next(steps) == step


def test_overfitting_is_reported_when_detected_and_at_the_end_also_after_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_on(UNEVEN, tmp_path / "whole", steps=80)
    output = capsys.readouterr().out
    warning, last_warning = warnings_in(output)
    assert output.splitlines()[-1] == last_warning
    assert "at step 80" in last_warning
    metrics = json.loads((tmp_path / "whole" / "train.json").read_text())
    table = pd.read_csv(tmp_path / "whole" / "history.csv", index_col="step")
    assert metrics["train/loss_at_best_step"] == round(table.loc[metrics["val/best_step"], "train/loss"], 4)
    assert len(warnings_in((tmp_path / "whole" / "log").read_text())) == 2

    detected_at = int(re.findall(r"step (\d+)/", output.partition(warning)[0])[-1])
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr("gpt.training.run._stop_on_signals", lambda: stop_after(detected_at - 5))
        train_on(UNEVEN, tmp_path / "stopped", steps=80)
    assert warnings_in(capsys.readouterr().out) == []
    train_on(UNEVEN, tmp_path / "stopped", steps=80)
    assert warnings_in(capsys.readouterr().out) == [warning, last_warning]
    names = ("model.pt", "train.json", "history.csv", "val.csv")
    assert contents(tmp_path / "stopped", names) == contents(tmp_path / "whole", names)


def test_copies_of_the_training_text_are_found_in_the_samples(tmp_path: Path) -> None:
    train_on("abcdefghij\n" * 100, tmp_path, steps=60)
    found = evaluate(
        params=EvaluateParams(batch_size=64, precision="float32", sample_characters=800, seed=1, device="cpu"),
        checkpoint=load_checkpoint(tmp_path / "model.pt"),
        data=load_tokens(tmp_path / "tokens"),
    )
    assert found.metrics["val/longest_copy"] > 50
    assert found.metrics["val/copied_windows"] > 0.5
    assert "'abcdefghij\\nabcdefghij" in found.summary[-1]
    assert "validation text: 100.0%" in found.summary[-1]
