"""The Python API: the same text as the command, loss as in training, no torch at `import gpt`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpt
from gpt.model.config import ModelConfig
from tests.conftest import RunGpt
from tests.support.common import environment, write_params


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_params(folder / "params.yaml", train__max_steps=20, train__precision="float32")
    line = ["train", "--params", "params.yaml", "--tokens", tokens, "--checkpoint", "model.pt", "--metrics", "m.json"]
    line += ["--history", "history.csv", "--validation", "validation.csv"]
    command = [sys.executable, "-m", "gpt", *map(str, line)]
    subprocess.run(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, check=True)
    return folder / "model.pt"


@pytest.fixture
def run_gpt(request: pytest.FixtureRequest) -> RunGpt:
    """The fixture `gpt`, whose name is that of the package here."""
    run: RunGpt = request.getfixturevalue("gpt")
    return run


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> gpt.LoadedModel:
    return gpt.load(checkpoint)


def test_generate_returns_what_the_command_prints(run_gpt: RunGpt, checkpoint: Path, model: gpt.LoadedModel) -> None:
    options = ["--prompt", "the ", "--max-new-tokens", "60", "--temperature", "1.1", "--top-k", "9", "--min-p", "0.01"]
    options += ["--repetition-penalty", "1.2", "--stop", "zz", "--seed", "5"]
    done = run_gpt("generate", "--checkpoint", checkpoint, *options)
    assert done.returncode == 0, done.stderr
    text = model.generate(
        "the ", max_new_tokens=60, temperature=1.1, top_k=9, min_p=0.01, repetition_penalty=1.2, stop=["zz"], seed=5
    )
    assert text.startswith("the ")
    assert done.stdout == text + "\n"


def test_the_chunks_of_stream_join_to_the_text_of_generate(model: gpt.LoadedModel) -> None:
    chunks = list(model.stream("the ", max_new_tokens=40, seed=1))
    assert len(chunks) > 20
    assert "".join(chunks) == model.generate("the ", max_new_tokens=40, seed=1)
    assert model.generate("the ", max_new_tokens=40, seed=2) != "".join(chunks)
    assert len(model.generate()) == 500  # the default of max_new_tokens


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


def test_config_and_tokenizer(checkpoint: Path) -> None:
    model = gpt.load(str(checkpoint))
    assert isinstance(model.config, ModelConfig)
    assert model.tokenizer.decode(model.tokenizer.encode("fox")) == "fox"


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


def test_import_is_lazy_and_needs_no_installation(tmp_path: Path) -> None:
    code = "import gpt, sys; print(gpt.__version__, sorted(gpt.__all__), 'torch' in sys.modules, 'load' in dir(gpt))"
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=tmp_path, env=environment(), text=True, capture_output=True, check=True)
    assert done.stdout.split(maxsplit=1)[1] == "['LoadedModel', 'UserError', '__version__', 'load'] False True\n"
