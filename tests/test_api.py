"""The Python API: the same text as the command, loss as in training, no torch at `import gpt`."""

import sys
from pathlib import Path

import pytest
import torch

import gpt
from tests.conftest import RunMain
from tests.support.common import run


@pytest.fixture(scope="module")
def model(trained: Path) -> gpt.LoadedModel:
    return gpt.load(str(trained / "model.pt"))


def test_generate_returns_what_the_command_prints(trained: Path, run_main: RunMain, model: gpt.LoadedModel) -> None:
    options = ["--prompt", "the ", "--max-new-tokens", "60", "--temperature", "1.1", "--top-k", "9", "--min-p", "0.01"]
    options += ["--repetition-penalty", "1.2", "--stop", "zz", "--seed", "5"]
    printed = run_main("generate", "--checkpoint", trained / "model.pt", *options)
    text = model.generate(
        "the ", max_new_tokens=60, temperature=1.1, top_k=9, min_p=0.01, repetition_penalty=1.2, stop=["zz"], seed=5
    )
    assert text.startswith("the ")
    assert printed == text + "\n"


def test_the_chunks_of_stream_join_to_the_text_of_generate(model: gpt.LoadedModel) -> None:
    chunks = list(model.stream("the ", max_new_tokens=40, seed=1))
    assert len(chunks) > 20
    assert "".join(chunks) == model.generate("the ", max_new_tokens=40, seed=1)
    assert model.generate("the ", max_new_tokens=40, seed=2) != "".join(chunks)
    assert next(model.stream()) == ""  # the default prompt


def test_the_loss_of_a_text_shorter_than_the_context(model: gpt.LoadedModel) -> None:
    assert 0 < model.loss("the") < model.loss("eht")


def test_loss_is_the_validation_loss_of_training(model: gpt.LoadedModel, corpus: Path) -> None:
    text = corpus.read_text()
    validation = text[int(len(text) * 0.9) - 1 :]  # the last training token predicts the first of the split
    assert model.loss(validation) == pytest.approx(model.checkpoint.about["val_loss"], abs=1e-5)


def test_loss_predicts_each_token_after_the_first_once(model: gpt.LoadedModel) -> None:
    text = "the quick brown fox jumps over a lazy dog while seven wizards brew"
    block = model.config.block_size
    tokens = torch.tensor([int(token) for token in model.tokenizer.encode(text)])
    expected = []
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, block):
            window, targets = tokens[start : start + block], tokens[start + 1 : start + block + 1]
            logits_TV = model.module(window[None])[0][: len(targets)]
            expected.append(torch.nn.functional.cross_entropy(logits_TV, targets, reduction="none"))
    assert [len(losses) for losses in expected] == [block, block, len(tokens) - 1 - 2 * block]
    assert model.loss(text) == pytest.approx(float(torch.cat(expected).mean()), abs=1e-5)


def test_errors_are_user_errors(model: gpt.LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(gpt.UserError, match=r"none\.pt"):
        gpt.load(tmp_path / "none.pt")
    with pytest.raises(gpt.UserError, match="temperature"):
        model.generate("the ", temperature=-1.0)
    with pytest.raises(gpt.UserError, match="'é'"):
        model.generate("é")
    with pytest.raises(gpt.UserError, match="'é'"):
        model.loss("thé")
    with pytest.raises(gpt.UserError, match="at least 2 tokens, found 1"):
        model.loss("t")


def test_import_loads_no_torch(tmp_path: Path) -> None:
    heavy = "{'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    code = f"import gpt, sys; print(sorted(gpt.__all__), {heavy} or 'none', 'load' in dir(gpt))"
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.stdout == "['LoadedModel', 'UserError', '__version__', 'load'] none True\n"
