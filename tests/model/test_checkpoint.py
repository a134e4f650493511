"""Checkpoints: damaged files are refused, and loading runs no code."""

import hashlib
import io
import random
import re
from pathlib import Path

import pytest
import torch

from gpt.core.errors import UserError
from gpt.core.files import canonical_json
from gpt.model.checkpoint import FORMAT, TRAILER, Checkpoint, load_checkpoint
from gpt.model.gpt import GPT
from gpt.tokenizers.char import CharTokenizer
from tests.support.common import model_params

CONFIG = model_params(n_layer=1, n_head=1, n_embd=4, block_size=4, dropout=0, position="learned", ngram=1)
TOKENIZER = CharTokenizer("\nabc")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("saved") / "model.pt"
    weights = GPT(CONFIG, TOKENIZER.vocab_size).state_dict()
    Checkpoint(CONFIG, TOKENIZER, weights, {"corpus_sha256": "0" * 64}).save(path)
    return path


def sealed(value: object) -> bytes:
    """A file with a valid trailer and any content."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue() + TRAILER + hashlib.sha256(buffer.getvalue()).hexdigest().encode() + b"\n"


def sealed_checkpoint(
    *, model: dict[str, object] | None = None, tokenizer: dict[str, object] | None = None, weights: object = None
) -> bytes:
    """A checkpoint with a valid trailer and changed metadata or weights."""
    changed = {"model": CONFIG.model_dump() | (model or {}), "tokenizer": TOKENIZER.to_json() | (tokenizer or {})}
    return sealed({"format": FORMAT, "metadata": canonical_json({**changed, "about": {}}), "weights": weights or {}})


def test_loading_restores_everything_and_saving_again_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(saved)
    loaded.save(tmp_path / "other name.bin")
    assert (tmp_path / "other name.bin").read_bytes() == saved.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["other name.bin"]
    assert (loaded.model, loaded.tokenizer, loaded.about) == (CONFIG, TOKENIZER, {"corpus_sha256": "0" * 64})
    tokens_BT = torch.tensor([[0, 1, 2, 3]])
    built = loaded.build()
    torch.manual_seed(0)
    assert torch.equal(built(tokens_BT), GPT(CONFIG, 4).eval()(tokens_BT))
    assert torch.load(saved, weights_only=True)["format"] == FORMAT


def test_truncated_and_corrupted_files_are_refused(saved: Path, tmp_path: Path) -> None:
    content, path, rng = saved.read_bytes(), tmp_path / "damaged.pt", random.Random(0)
    size = len(content)
    damaged = [content[:length] for length in [*rng.sample(range(size), 50), *range(size - 100, size)]]
    for byte in [*rng.sample(range(size), 100), *range(size - 100, size)]:
        damaged.append(content[:byte] + bytes([content[byte] ^ 1 << rng.randrange(8)]) + content[byte + 1 :])
    for found in damaged:
        path.write_bytes(found)
        with pytest.raises(UserError, match=r"damaged\.pt"):
            load_checkpoint(path)


class RunsCode:
    """Creates a file when it is unpickled."""

    def __init__(self, created: Path) -> None:
        self.created = created

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.created,)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    created, path = tmp_path / "created", tmp_path / "malicious.pt"
    path.write_bytes(sealed({"format": FORMAT, "metadata": RunsCode(created)}))
    with pytest.raises(UserError, match=r"malicious\.pt: expected plain tensors"):
        load_checkpoint(path)
    assert not created.exists()
    torch.load(path, weights_only=False)  # shows that the file does run code when loaded carelessly
    assert created.exists()


OTHER_FILES = {
    "empty": (b"", "0 bytes without one"),
    "no trailer": (b"hello" * 100, "500 bytes without one"),
    "no dict": (sealed([1, 2]), "format 1, found none"),
    "other format": (sealed({"format": 2, "metadata": "{}"}), "format 1, found 2"),
    "no metadata": (sealed({"format": 1}), "metadata as JSON, found none"),
    "no JSON": (sealed({"format": 1, "metadata": "{"}), "metadata as JSON, found none"),
    "a list": (sealed({"format": 1, "metadata": "[]"}), "expected a trained model"),
    "no model": (sealed({"format": 1, "metadata": "{}"}), "'model'"),
    "invalid vocabulary": (sealed_checkpoint(tokenizer={"vocabulary": "\na\na"}), "expected a trained model"),
    "invalid configuration": (sealed_checkpoint(model={"n_layer": "two"}), "n_layer"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_files_of_other_content_are_refused(name: str, tmp_path: Path) -> None:
    path, (content, expected) = tmp_path / "other.pt", OTHER_FILES[name]
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load_checkpoint(path)


def test_weights_that_do_not_match_the_configuration_are_listed(saved: Path, tmp_path: Path) -> None:
    weights = dict(load_checkpoint(saved).weights)
    weights["extra"] = weights.pop("norm.weight").double()
    weights["positions.table.weight"] = torch.zeros(5, 4)
    path = tmp_path / "other.pt"
    path.write_bytes(sealed_checkpoint(weights=weights))
    expected = [
        "extra: expected none",
        "norm.weight: expected torch.float32 [4], found none",
        "[4, 4], found torch.float32 [5, 4]",
    ]
    with pytest.raises(UserError, match=".*".join(map(re.escape, expected))):
        load_checkpoint(path)
