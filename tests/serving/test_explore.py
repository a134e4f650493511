"""What the page asks for, against the model itself."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import gpt
from gpt.evaluation.interpretability import ngram_lookups
from gpt.generation.sampling import SamplingParams, next_token_probabilities
from gpt.model.checkpoint import Checkpoint
from gpt.tokenizers.char import CharTokenizer
from tests.support.common import model_params, strong_model
from tests.support.serving import Client, serving

TEXT = "the lazy "


@pytest.fixture(scope="module")
def server(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A trained model, and one of each kind and position scheme that the page shows differently."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), CharTokenizer("".join(sorted(set(TEXT))))
    paths = []
    for name, changes in {
        "alibi": {"position": "alibi"},
        "relative": {"position": "relative"},
        "bigram": {"kind": "bigram"},
        "average": {"kind": "average"},
    }.items():
        config = model_params(n_layer=2, n_head=2, n_embd=16, block_size=8, dropout=0, **changes)
        weights = strong_model(config, tokenizer.vocab_size).state_dict()
        paths.append(folder / f"{name}.pt")
        Checkpoint(config, tokenizer, weights, {"corpus_sha256": "0" * 64}).save(paths[-1])
    with serving(trained / "model.pt", *paths) as client:
        yield client


@torch.inference_mode()
def test_the_next_tokens_are_those_before_and_after_the_settings(server: Client, trained: Path) -> None:
    model = gpt.load(trained / "model.pt")
    tokens = [int(token) for token in model.tokenizer.encode(TEXT)]
    logits_1V = model.module(torch.tensor([tokens]))[:, -1]
    seen_1V = torch.zeros_like(logits_1V, dtype=torch.bool)
    seen_1V[0, tokens] = True
    params = SamplingParams(temperature=0.5, top_k=4, repetition_penalty=1.5)
    after_V = next_token_probabilities(logits_1V, seen_1V, params)[0]
    found = server.post("/explore/next", text=TEXT, temperature=0.5, top_k=4, repetition_penalty=1.5).json()["tokens"]
    assert len(found) == model.tokenizer.vocab_size
    assert [each["before"] for each in found] == sorted((each["before"] for each in found), reverse=True)
    for each in found:
        (token,) = model.tokenizer.encode(each["text"])
        assert each["before"] == pytest.approx(float(logits_1V.softmax(-1)[0, token]), abs=1e-6)
        assert each["after"] == pytest.approx(float(after_V[token]), abs=1e-6)
    assert sum(each["after"] > 0 for each in found) == 4


def test_the_inside_of_a_head_is_shown(server: Client, trained: Path) -> None:
    found = server.post("/explore/inside", text=TEXT, layer=1, head=2).json()
    assert found["tokens"] == list("the␣lazy␣")
    weights, masked = np.array(found["attention"]["weights"]), found["attention"]["masked"]
    assert weights.shape == (9, 9)
    assert np.allclose(weights.sum(1), 1, atol=1e-3)
    assert [value is None for value in masked[0]] == [False] + [True] * 8
    other = server.post("/explore/inside", text=TEXT, layer=1, head=1).json()
    assert not np.allclose(other["attention"]["weights"], weights)
    model = gpt.load(trained / "model.pt")
    lookups = ngram_lookups(model.module, [int(token) for token in model.tokenizer.encode(TEXT)])
    assert [each["row"] for each in found["ngrams"]] == [lookup.row for lookup in lookups]
    last = [each for each in found["ngrams"] if each["position"] == 9]
    assert [each["text"] for each in last] == ["zy␣"[-n:] if n < 4 else "lazy␣"[-n:] for n in range(2, 2 + len(last))]
    assert last


@pytest.mark.parametrize(
    ("model", "attention", "rows", "columns"),
    [
        ("alibi", True, ["head 1", "head 2"], "distance"),
        ("relative", True, ["layer 1", "layer 2"], "distance"),
        ("average", True, None, None),
        ("bigram", False, None, None),
    ],
)
def test_every_kind_of_model_can_be_shown(
    server: Client, model: str, attention: bool, rows: list[str] | None, columns: str | None
) -> None:
    found = server.post("/explore/inside", model=model, text=TEXT).json()
    assert len(found["tokens"]) == 8  # the end that fits into the context
    assert bool(found["attention"]) == attention
    assert (found["positions"] and found["positions"]["rows"]) == rows
    assert (found["positions"] and found["positions"]["columns"]) == columns


def test_what_the_model_does_not_have_is_refused(server: Client) -> None:
    assert server.error("/explore/inside", text=TEXT, layer=9)[0] == 400
    assert server.error("/explore/inside", text="é")[0] == 400
    assert server.error("/explore/next", text="é")[1]["param"] == "text"
    assert server.error("/explore/next", text=TEXT, model="none")[0] == 404
