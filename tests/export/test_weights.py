"""The export as safetensors: everything that was trained is in the files, and can be loaded without a checkpoint."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gpt.core.files import read_json
from gpt.export.weights import safetensors_export
from gpt.model.baselines import make_model
from gpt.model.checkpoint import Checkpoint
from gpt.model.config import ModelConfig
from gpt.tokenizers import tokenizer_from_json
from gpt.tokenizers.char import CharTokenizer
from tests.conftest import RunMain
from tests.support.common import contents, model_params, strong_model

FILES = ("model.safetensors", "config.json", "tokenizer.json")


def load_exported(folder: Path) -> Checkpoint:
    """What a reader of the files does."""
    config = ModelConfig.model_validate(read_json(folder / "config.json"))
    tokenizer = tokenizer_from_json(read_json(folder / "tokenizer.json"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        about = json.loads(file.metadata()["about"])
    return Checkpoint(config, tokenizer, load_file(folder / "model.safetensors"), about)


def test_round_trip_by_the_command(run_main: RunMain, trained: Path, tmp_path: Path) -> None:
    line = ["export", "--checkpoint", trained / "model.pt", "--format", "safetensors", "--out"]
    assert run_main(*line, "out/a").splitlines() == [f"-> {Path('out/a', name)}" for name in FILES]
    assert {path.name for path in (tmp_path / "out" / "a").iterdir()} == set(FILES)
    found = load_exported(tmp_path / "out" / "a")
    replace(found, weights=found.build().state_dict()).save(tmp_path / "again.pt")
    assert (tmp_path / "again.pt").read_bytes() == (trained / "model.pt").read_bytes()
    run_main(*line, "b")
    assert contents(tmp_path / "b", FILES) == contents(tmp_path / "out" / "a", FILES)


@pytest.mark.parametrize("kind", ["bigram", "average", "head", "gpt"])
def test_every_kind_of_model_computes_the_same_logits(kind: str, tmp_path: Path) -> None:
    config = model_params(kind=kind, tie_embeddings=True)
    tokenizer = CharTokenizer("abc")
    model = strong_model(config, tokenizer.vocab_size)
    safetensors_export(Checkpoint(config, tokenizer, model.state_dict(), {"corpus_sha256": "0"})).save(tmp_path)
    found = load_exported(tmp_path)
    loaded = make_model(found.model, found.tokenizer.vocab_size).eval()
    loaded.load_state_dict(dict(found.weights))
    tokens_BT = torch.randint(3, (4, config.block_size))
    assert torch.equal(loaded(tokens_BT), model(tokens_BT))


def test_a_folder_that_cannot_be_written_is_refused(run_main: RunMain, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    line = ["export", "--checkpoint", trained / "model.pt", "--format", "safetensors", "--out", "out"]
    assert "expected a writable path" in run_main(*line, code=2)


def test_a_missing_package_is_named_with_the_remedy(
    run_main: RunMain, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    line = ["export", "--checkpoint", trained / "model.pt", "--format", "safetensors", "--out", "out"]
    assert "pip install 'chargpt[export]'" in run_main(*line, code=2)
    assert not (tmp_path / "out").exists()
