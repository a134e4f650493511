"""Training goes on from a trained model on another text, and refuses a model that does not fit."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt.__main__ import main
from gpt.core.errors import UserError
from gpt.model.checkpoint import load_checkpoint
from gpt.tokenizers.char import CharTokenizer
from gpt.training.fingerprint import run_key
from gpt.training.init_checkpoint import load_init_checkpoint
from tests.e2e.test_own_text import STAGES
from tests.support.common import made_up_text, only_line, write_params

FIRST = ("download", "tokenize", "train")


def run(stage: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """A stage's command as dvc.yaml has it, in this process."""
    words = shlex.split(STAGES[stage]["cmd"])
    monkeypatch.setattr(sys, "argv", ["gpt", *words[words.index("gpt") + 1 :]])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace where a model was trained on a text, and its files put aside."""
    (tmp_path / "corpus.txt").write_text(made_up_text(), encoding="utf-8")
    (tmp_path / "other.txt").write_text(made_up_text(seed=1).replace("fox", "bat").replace("dog", "cat"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "corpus.txt", train__max_steps=60)
    for stage in FIRST:
        assert not run(stage, monkeypatch)
    shutil.copy("chargpt_nano.pt", "base.pt")
    shutil.copy("data/tokens/tokenizer.json", "base.json")
    return tmp_path


def write(folder: Path, source: str, **changes: Any) -> Path:
    own = {"download__sources": [source], "download__sha256": None, "train__eval_interval": 10}
    return write_params(folder / "params.yaml", **{**own, **changes})


def test_it_goes_on_from_trained_weights_on_another_text(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short: dict[str, Any] = {"train__max_steps": 10, "tokenize__init_from": "base.json"}
    losses = []
    for start in (None, "base.pt"):
        write(trained, "other.txt", **short, train__init_from=start)
        for stage in FIRST:
            assert not run(stage, monkeypatch)
        losses.append(json.loads((trained / "metrics" / "train.json").read_text())["val_loss"])
    anew, fine_tuned = losses
    assert fine_tuned < anew - 0.5
    assert load_checkpoint(trained / "chargpt_nano.pt").about["train"]["init_from"] == "base.pt"
    assert load_checkpoint(trained / "chargpt_nano.pt").tokenizer == load_checkpoint(trained / "base.pt").tokenizer


def test_the_start_is_part_of_the_runs_key(trained: Path) -> None:
    params = write(trained, "other.txt", train__init_from="base.pt")
    before = run_key(params, trained / "data" / "tokens")
    (trained / "base.pt").write_bytes((trained / "base.pt").read_bytes() + b" ")
    assert run_key(params, trained / "data" / "tokens") != before
    (trained / "base.pt").unlink()
    with pytest.raises(UserError, match=r"train\.init_from: expected a trained model, found no file base\.pt"):
        run_key(params, trained / "data" / "tokens")


def test_what_does_not_fit_is_named(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load_checkpoint(trained / "base.pt")
    other = base.model.model_copy(update={"n_layer": 9, "position": "alibi", "dropout": 0.5})
    found = rf"base\.pt: n_layer {base.model.n_layer} instead of 9; position '{base.model.position}' instead of 'alibi'"
    with pytest.raises(UserError, match=found + "; set the section model"):
        load_init_checkpoint(Path("base.pt"), other, base.tokenizer)
    with pytest.raises(UserError, match=r"expected the tokenizer of base\.pt"):
        load_init_checkpoint(Path("base.pt"), base.model, CharTokenizer("\nabc"))
    (trained / "strange.txt").write_text(made_up_text() + "Été", encoding="utf-8")
    write(trained, "strange.txt", tokenize__init_from="base.json")
    assert not run("download", monkeypatch)
    capsys.readouterr()
    assert run("tokenize", monkeypatch) == 2
    assert "found 'É', 'é'" in only_line(capsys.readouterr().err)
    write(trained, "other.txt", tokenize__init_from="none.json")
    assert run("tokenize", monkeypatch) == 2
    assert "tokenize.init_from: expected a tokenizer.json, found no file none.json" in only_line(
        capsys.readouterr().err
    )
