"""A checkpoint is whole or refused, and nothing in it is ever run."""

import hashlib
import io
import random
from pathlib import Path

import pytest
import torch

from gpt.core.errors import UserError
from gpt.core.files import canonical_json
from gpt.model.checkpoint import FORMAT, TRAILER, Checkpoint, load_checkpoint
from gpt.model.gpt import GPT
from gpt.tokenizers.char import CharTokenizer
from tests.support.common import model_params

PARAMS = model_params(n_layer=1, n_head=1, n_embd=4, block_size=4, dropout=0, position="learned", ngram=1)
TOKENIZER = CharTokenizer("\nabc")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("saved") / "model.pt"
    weights = GPT(PARAMS, TOKENIZER.vocab_size).state_dict()
    Checkpoint(PARAMS, TOKENIZER, weights, {"corpus_sha256": "0" * 64}).save(path)
    return path


def test_what_was_saved_comes_back(saved: Path) -> None:
    loaded = load_checkpoint(saved)
    assert (loaded.model, loaded.tokenizer, loaded.about) == (PARAMS, TOKENIZER, {"corpus_sha256": "0" * 64})
    tokens_BT = torch.tensor([[0, 1, 2, 3]])
    built = loaded.build()
    torch.manual_seed(0)
    assert torch.equal(built(tokens_BT), GPT(PARAMS, 4).eval()(tokens_BT))


def test_equal_contents_are_equal_bytes_under_any_name(saved: Path, tmp_path: Path) -> None:
    load_checkpoint(saved).save(tmp_path / "other name.bin")
    assert (tmp_path / "other name.bin").read_bytes() == saved.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["other name.bin"]


def test_torch_load_reads_it_as_well(saved: Path) -> None:
    assert torch.load(saved, weights_only=True)["format"] == FORMAT


def test_every_truncation_is_refused(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    path = tmp_path / "cut.pt"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.pt"):
            load_checkpoint(path)


def test_flipped_bits_are_refused(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    chance = random.Random(0)
    path = tmp_path / "flipped.pt"
    for place in [chance.randrange(len(whole) * 8) for _ in range(1000)]:
        broken = bytearray(whole)
        broken[place // 8] ^= 1 << place % 8
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"flipped\.pt"):
            load_checkpoint(path)


class RunsCode:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.proof,)


def sealed(value: object) -> bytes:
    """A value in the outer form of a checkpoint, its digest right."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue() + TRAILER + hashlib.sha256(buffer.getvalue()).hexdigest().encode() + b"\n"


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    proof, path = tmp_path / "proof", tmp_path / "evil.pt"
    path.write_bytes(sealed({"format": FORMAT, "metadata": RunsCode(proof)}))
    with pytest.raises(UserError, match=r"evil\.pt: expected plain tensors"):
        load_checkpoint(path)
    assert not proof.exists()
    torch.load(path, weights_only=False)  # the file is as evil as it looks
    assert proof.exists()


def described(model: dict[str, object], tokenizer: dict[str, object]) -> bytes:
    """A checkpoint that describes itself wrongly."""
    metadata = {"model": PARAMS.model_dump() | model, "tokenizer": TOKENIZER.to_json() | tokenizer, "about": {}}
    return sealed({"format": FORMAT, "metadata": canonical_json(metadata), "weights": {}})


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    for content, expected in [
        (b"", "0 bytes without one"),
        (b"hello" * 100, "500 bytes without one"),
        (sealed([1, 2]), "format 1, found none"),
        (sealed({"format": 2, "metadata": "{}"}), "format 1, found 2"),
        (sealed({"format": 1}), "metadata as JSON, found none"),
        (sealed({"format": 1, "metadata": "{"}), "metadata as JSON, found none"),
        (sealed({"format": 1, "metadata": "[]"}), "expected a trained model"),
        (sealed({"format": 1, "metadata": "{}"}), "expected a trained model, found no valid 'model'"),
        (described({}, {"vocabulary": "\na\na"}), "expected a trained model"),
        (described({"n_layer": "two"}, {}), "n_layer"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=expected):
            load_checkpoint(path)
    with pytest.raises(UserError, match="No such file"):
        load_checkpoint(tmp_path / "none.pt")


def test_weights_that_do_not_fit_are_listed(saved: Path, tmp_path: Path) -> None:
    weights = dict(load_checkpoint(saved).weights)
    weights["extra"] = weights.pop("norm.weight").double()
    weights["positions.table.weight"] = torch.zeros(5, 4)
    metadata = {"model": PARAMS.model_dump(), "tokenizer": TOKENIZER.to_json(), "about": {}}
    path = tmp_path / "other.pt"
    path.write_bytes(sealed({"format": FORMAT, "metadata": canonical_json(metadata), "weights": weights}))
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    for part in (
        "norm.weight is missing",
        "extra is unknown",
        "positions.table.weight: expected torch.float32 [4, 4]",
    ):
        assert part in str(error.value)
