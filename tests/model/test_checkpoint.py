"""Checkpoints: damaged files are refused, and loading runs no code."""

import hashlib
import io
import random
import re
import time
import zipfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.core.errors import UserError
from gpt.core.files import canonical_json
from gpt.model.checkpoint import ADDED_KEYS, FORMAT, TRAILER, Checkpoint, load_checkpoint
from gpt.model.gpt import GPT
from gpt.tokenizers.char import CharTokenizer
from tests.support.common import model_params, peak_memory

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
    return seal(buffer.getvalue())


def seal(content: bytes) -> bytes:
    return content + TRAILER + hashlib.sha256(content).hexdigest().encode() + b"\n"


def with_metadata(text: object, weights: object = None) -> bytes:
    if weights is None:
        weights = GPT(CONFIG, 4).state_dict()
    return sealed({"format": FORMAT, "metadata": text, "weights": weights})


def sealed_checkpoint(
    *, model: dict[str, object] | None = None, tokenizer: dict[str, object] | None = None, weights: object = None
) -> bytes:
    """A checkpoint with a valid trailer and changed metadata or weights."""
    changed = {"model": CONFIG.model_dump() | (model or {}), "tokenizer": TOKENIZER.to_json() | (tokenizer or {})}
    return with_metadata(canonical_json({**changed, "about": {"corpus_sha256": "0"}}), weights)


def test_checkpoints_without_later_keys_are_read(tmp_path: Path) -> None:
    model = {name: value for name, value in CONFIG.model_dump().items() if name not in ADDED_KEYS}
    about = {"corpus_sha256": "0" * 64}
    metadata = {"model": model, "tokenizer": TOKENIZER.to_json(), "about": about}
    (tmp_path / "model.pt").write_bytes(with_metadata(canonical_json(metadata)))
    assert load_checkpoint(tmp_path / "model.pt").model == CONFIG


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
    "no metadata": (sealed({"format": 1}), "metadata as canonical JSON, found none"),
    "no JSON": (sealed({"format": 1, "metadata": "{"}), "metadata as canonical JSON, found none"),
    "a list": (sealed({"format": 1, "metadata": "[]"}), "metadata as canonical JSON, found none"),
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


def deflated(content: bytes) -> bytes:
    """A sealed file as a compressed archive that unpacks to a gigabyte."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            data = source.read(member)
            target.writestr(member.filename, data if member.file_size > 32 else b"\0" * (1 << 30))
    return seal(buffer.getvalue())


def pickled(code: bytes) -> bytes:
    """A sealed archive with this pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + code)
        archive.writestr("archive/version", "3\n")
    return seal(buffer.getvalue())


def with_about(about: object) -> bytes:
    changed = {"model": CONFIG.model_dump(), "tokenizer": TOKENIZER.to_json(), "about": about}
    return with_metadata(canonical_json(changed))


def with_weight(value: object, name: object = "norm.weight") -> bytes:
    return sealed_checkpoint(weights=dict(GPT(CONFIG, 4).state_dict()) | {name: value})


BPE: dict[str, Any] = {"kind": "bpe", "merges": ["a b"]}
WORD: dict[str, Any] = {"kind": "word", "characters": "\nab", "words": ["ab"]}
WORDPIECE: dict[str, Any] = {"kind": "wordpiece", "beginnings": ["a"], "continuations": ["a"]}
TIKTOKEN: dict[str, Any] = {"kind": "tiktoken", "ranks": ["a"]}
WRONG: list[object] = [None, 1, "", [], {}, [[]], [1], [""], ["\ud800"], ["a", "a"], "ba", ["\x00 b"], {"a": "b"}]
KINDS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (TOKENIZER.to_json(), ("vocabulary",)),
    (BPE, ("merges",)),
    (WORD, ("characters", "words")),
    (WORDPIECE, ("beginnings", "continuations")),
    (TIKTOKEN, ("ranks",)),
]
NO_TEXT: list[object] = [None, 7, b"{}", [], {}, torch.zeros(3)]
NO_ORIGIN: list[object] = [None, [], "x", {}, {"corpus_sha256": 7}]
NO_KIND: list[object] = [None, 1, [], {}, "none"]
NO_WEIGHT: list[object] = [None, "x", 1.0, [], {}, b""]
NO_NAME: list[object] = [1, None, "", "\n", ("a",)]
NO_WEIGHTS: list[object] = [[1], "x", 7, torch.zeros(3), {"a": {}}]
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "ngram_rows", "ngram_width", "ngram")
NO_SIZE: list[object] = [0, -1, 1.5, "4", None, True, 10**12, 2**63, 10**400]
NO_JSON = [
    "null",
    "[]",
    "1",
    '"x"',
    "NaN",
    "[" * 99_999,
    "{}",
    '{"about":{},"about":{}}',
    '{"about":' + "9" * 5000 + "}",
]


def hostile_files() -> Iterator[tuple[str, bytes]]:
    """Files with a valid trailer that are no checkpoints, or that would take much time or memory to load."""
    for text in (*NO_JSON, *NO_TEXT):
        yield f"metadata {str(text)[:20]}", with_metadata(text)
    for about in NO_ORIGIN:
        yield f"about {about!r}", with_about(about)
    for key, size in product(SIZES, NO_SIZE):
        yield f"{key} {str(size)[:20]!r} {type(size).__name__}", sealed_checkpoint(model={key: size})
    yield "a thousand layers", sealed_checkpoint(model={"n_layer": 1000})
    yield "wide", sealed_checkpoint(model={"n_embd": 65536, "block_size": 65536})
    yield "large tables", sealed_checkpoint(model={"ngram": 6, "ngram_rows": 1 << 31})
    for kind, names in KINDS:
        for field, value in product(names, WRONG):
            yield f"{kind['kind']} {field} {value!r}", sealed_checkpoint(tokenizer={**kind, field: value})
    for kind_name in NO_KIND:
        yield f"kind {kind_name!r}", sealed_checkpoint(tokenizer={"kind": kind_name})
    yield "another field", sealed_checkpoint(tokenizer={"words": []})
    yield "integer weights", with_weight(torch.zeros(4, dtype=torch.int64))
    yield "complex weights", with_weight(torch.zeros(4, dtype=torch.complex64))
    yield "sparse weights", with_weight(torch.zeros(4).to_sparse())
    yield "meta weights", with_weight(torch.zeros(4, device="meta"))
    yield "a tensor of 10¹² repeated elements", with_weight(torch.zeros(1).expand(10**12))
    yield "NaN", with_weight(torch.full((4,), torch.nan))
    yield "infinite", with_weight(torch.tensor([1.0, 2.0, torch.inf, 4.0]))
    for value in NO_WEIGHT:
        yield f"weight {value!r}", with_weight(value)
    for name in NO_NAME:
        yield f"weight named {name!r}", with_weight(torch.zeros(4), name)
    for value in NO_WEIGHTS:
        yield f"weights {value!r}", sealed_checkpoint(weights=value)
    yield "deflated", deflated(sealed_checkpoint())
    yield "a gigabyte of zeros", pickled(b"c__builtin__\nbytearray\nJ\x00\x00\x00\x40\x85R.")
    yield "a counter", pickled(b"ccollections\nCounter\n)R.")
    yield "no pickle", seal(b"PK")
    yield "no end", pickled(b"}")
    yield "deep nesting", pickled(b"(" * 99_999 + b".")


HOSTILE = dict(hostile_files())


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.pt"
    path.write_bytes(HOSTILE[name])
    began, peak = time.monotonic(), peak_memory()
    with pytest.raises(UserError, match=r"hostile\.pt: ") as refused:
        load_checkpoint(path)
    assert "\n" not in str(refused.value)
    assert time.monotonic() - began < 5
    assert peak_memory() - peak < 1 << 30


def test_the_table_of_hostile_files_starts_from_a_valid_one(tmp_path: Path) -> None:
    (tmp_path / "valid.pt").write_bytes(sealed_checkpoint())
    assert load_checkpoint(tmp_path / "valid.pt").model == CONFIG
