"""The metrics and tables of an evaluation, for known models and for tokens of several kinds."""

import math
import re
from pathlib import Path

import pytest
import torch

import gpt.evaluation.evaluator
from gpt.data.prepare import tokenize
from gpt.data.token_files import TokenData, load_tokens
from gpt.evaluation.evaluator import EvaluateParams, evaluate
from gpt.evaluation.memorization import Copies
from gpt.model.checkpoint import Checkpoint
from gpt.model.gpt import GPT
from tests.support.common import made_up_text, model_params, tokenize_params

PARAMS = EvaluateParams(batch_size=64, precision="float32", sample_characters=240, seed=1, device="cpu")


def test_metrics_of_a_model_with_uniform_predictions(data: TokenData) -> None:
    model = model_params(n_layer=1, n_head=1, n_embd=8, block_size=16, dropout=0)
    size = data.meta.vocab_size
    weights = {name: torch.zeros_like(weight) for name, weight in GPT(model, size).state_dict().items()}
    checkpoint = Checkpoint(model, data.tokenizer, weights, {})
    found = evaluate(params=PARAMS, checkpoint=checkpoint, data=data)
    assert found.metrics["val/bits_per_char"] == pytest.approx(math.log2(size))
    assert found.positions["predictions"].sum() == found.calibration["predictions"].sum() == len(data.val)
    assert found.calibration["probability"].tolist() == pytest.approx([1 / size])
    assert found.blocks["nats"].tolist() == pytest.approx(
        (found.blocks["characters"] * math.log(size)).tolist(), abs=1e-3
    )
    assert found.metrics["val/copied_windows"] == 0.0
    assert 1 <= found.metrics["val/longest_copy"] < 8
    bigram, unigram, uniform = map(float, re.findall(r"(?:bigram|unigram|uniform) ([\d.]+)", found.summary[0]))
    assert bigram < unigram < uniform == pytest.approx(math.log(size), abs=1e-3)
    again = evaluate(params=PARAMS, checkpoint=checkpoint, data=data)
    assert (again.metrics, again.summary) == (found.metrics, found.summary)
    other = PARAMS.model_copy(update={"seed": 2})
    assert evaluate(params=other, checkpoint=checkpoint, data=data).summary[-1] != found.summary[-1]


@pytest.mark.parametrize("size", [256, 300])  # tokens shorter than a character, and longer
def test_bits_and_memorization_are_measured_in_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
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
    found = evaluate(params=PARAMS.model_copy(update={"sample_characters": 800}), checkpoint=checkpoint, data=data)
    (samples, corpus), (real_texts, _) = calls
    middle = int(len(text) * 0.9)
    table = found.positions
    bits = (table["loss"] * table["predictions"]).sum() / math.log(2) / (len(text) - middle)
    assert table["predictions"].sum() == len(data.val) != len(text) - middle
    assert found.metrics["val/bits_per_char"] == pytest.approx(bits, abs=1e-4)
    assert found.blocks["nats"].sum() == pytest.approx(bits * math.log(2) * (len(text) - middle), abs=0.01)
    assert corpus == text[:middle]
    assert [len(sample) for sample in samples] == [100] * 8
    assert "\ufffd" in "".join(samples)  # an untrained model generates invalid UTF-8
    assert real_texts == [text[middle + start :][:100] for start in range(0, 800, 100)]


def test_overfitting_is_reported(data: TokenData, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_params(n_layer=1, n_head=1, n_embd=8, block_size=16, ngram=1)
    checkpoint = Checkpoint(model, data.tokenizer, GPT(model, data.meta.vocab_size).state_dict(), {})
    assert "overfitting" not in evaluate(params=PARAMS, checkpoint=checkpoint, data=data).summary[-1]
    monkeypatch.setattr(gpt.evaluation.evaluator, "token_losses", lambda *_: [torch.full((2, 16), 0.2)])
    assert (
        "overfitting: the loss on the training text is 0.200"
        in (evaluate(params=PARAMS, checkpoint=checkpoint, data=data).summary[-1])
    )
