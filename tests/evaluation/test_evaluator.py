"""The metrics and tables of an evaluation, for known models and for tokens of several kinds."""

import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML

import gpt.evaluation.evaluator
from gpt.__main__ import main
from gpt.data.prepare import tokenize
from gpt.data.token_files import TokenData, load_tokens
from gpt.evaluation.evaluator import EvaluateParams, evaluate
from gpt.evaluation.memorization import Copies
from gpt.model.checkpoint import Checkpoint
from gpt.model.gpt import GPT
from tests.support.common import ROOT, made_up_text, model_params, tokenize_params, write_params

STAGES: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = EvaluateParams(batch_size=64, precision="float32", sample_characters=240, seed=1, device="cpu")


def test_metrics_of_a_model_with_uniform_predictions(data: TokenData) -> None:
    model = model_params(n_layer=1, n_head=1, n_embd=8, block_size=16, dropout=0)
    size = data.meta.vocab_size
    weights = {name: torch.zeros_like(weight) for name, weight in GPT(model, size).state_dict().items()}
    checkpoint = Checkpoint(model, data.tokenizer, weights, {})
    found = evaluate(params=PARAMS, checkpoint=checkpoint, data=data)
    assert found.metrics["bits_per_char"] == pytest.approx(math.log2(size))
    assert found.positions["predictions"].sum() == found.calibration["predictions"].sum() == len(data.val)
    assert found.calibration["probability"].tolist() == pytest.approx([1 / size])
    assert found.metrics["copied"] == 0.0
    assert 1 <= found.metrics["longest_copy"] < 8
    bigram, unigram, uniform = map(float, re.findall(r"(?:bigram|unigram|uniform) ([\d.]+)", found.summary[0]))
    assert bigram < unigram < uniform == pytest.approx(math.log(size), abs=1e-3)
    again = evaluate(params=PARAMS, checkpoint=checkpoint, data=data)
    assert (again.metrics, again.summary) == (found.metrics, found.summary)
    other = PARAMS.model_copy(update={"seed": 2})
    assert evaluate(params=other, checkpoint=checkpoint, data=data).summary[-1] != found.summary[-1]


@pytest.mark.parametrize("size", [256, 300])  # tokens shorter than a character, and longer
def test_memorization_is_measured_in_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    text = made_up_text(2000).replace("o", "🙂")
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    tokenize(params=tokenize_params(kind="bpe", vocab_size=size), corpus=tmp_path / "text.txt", out=tmp_path)
    data = load_tokens(tmp_path)
    calls = []

    def find_copies(texts: list[str], corpus: str) -> Copies:
        calls.append((texts, corpus))
        return Copies(0, "")

    monkeypatch.setattr(gpt.evaluation.evaluator, "find_copies", find_copies)
    model = model_params(n_layer=1, n_head=1, n_embd=8, block_size=16, ngram=1)
    torch.manual_seed(0)
    checkpoint = Checkpoint(model, data.tokenizer, GPT(model, data.meta.vocab_size).state_dict(), {})
    evaluate(params=PARAMS.model_copy(update={"sample_characters": 800}), checkpoint=checkpoint, data=data)
    (samples, corpus), (real_texts, _) = calls
    middle = int(len(text) * 0.9)
    assert corpus == text[:middle]
    assert [len(sample) for sample in samples] == [100] * 8
    assert "\ufffd" in "".join(samples)  # an untrained model generates invalid UTF-8
    assert real_texts == [text[middle + start :][:100] for start in range(0, 800, 100)]


def test_bits_per_character_of_tokens_of_several_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All stages with BPE; bits per character do not depend on the tokenizer, and the prompt is encoded with it."""
    text = made_up_text(4000).replace("fox", "naïve fox")
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8")
    changes: dict[str, Any] = {
        "download__sources": ["corpus.txt"],
        "download__sha256": None,
        "tokenize__kind": "bpe",
        "tokenize__vocab_size": 300,
        "train__max_steps": 30,
        "generate__prompts": ["the naïve"],
        "generate__max_new_tokens": 30,
    }
    write_params(tmp_path / "params.yaml", **changes)
    monkeypatch.chdir(tmp_path)
    for stage in STAGES.values():
        arguments = shlex.split(stage["cmd"])
        monkeypatch.setattr(sys, "argv", ["gpt", *arguments[arguments.index("gpt") + 1 :]])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, capsys.readouterr().err
    meta = json.loads((tmp_path / "data/tokens/meta.json").read_text())
    assert (meta["kind"], meta["vocab_size"]) == ("bpe", 300)
    assert meta["val_tokens"] < 0.6 * meta["val_characters"]
    table = pd.read_csv(tmp_path / "plots/positions.csv")
    assert table["predictions"].sum() == meta["val_tokens"]
    bits = (table["loss"] * table["predictions"]).sum() / math.log(2) / (len(text) - int(len(text) * 0.9))
    metrics = json.loads((tmp_path / "metrics/evaluate.json").read_text())
    assert metrics["bits_per_char"] == pytest.approx(bits, abs=1e-4)
    assert metrics["bits_per_char"] < math.log2(len(set(text))) - 1  # of uniform predictions of characters
    sample = (tmp_path / "generation_out.txt").read_text(encoding="utf-8").rpartition("=" * 80 + "\n")[2]
    assert sample.startswith("the naïve")
    assert len(sample) > 9 + 30 + 1
