"""Tokenizing a corpus: splits, chunks, reproducible training of the tokenizer, and texts that are refused."""

import base64
import hashlib
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt.core.errors import UserError
from gpt.data.prepare import CHUNK_CHARACTERS, tokenize
from gpt.data.token_files import load_tokens
from gpt.tokenizers import TOKENIZERS
from gpt.tokenizers.subword import BpeTokenizer
from gpt.tokenizers.tiktoken import TiktokenTokenizer
from tests.conftest import RunMain
from tests.support.common import environment, made_up_text, tokenize_params, write_params

TOKENS = BpeTokenizer.train([made_up_text(600)], 300).token_bytes
RANKS = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(TOKENS))


def tokenized(folder: Path, text: str | bytes, **changes: Any) -> Path:
    """The token folder of a text; tiktoken's ranks are read from a local file."""
    corpus = folder / "text.txt"
    corpus.write_bytes(text.encode() if isinstance(text, str) else text)
    (folder / "ranks.txt").write_bytes(RANKS)
    ranks = {"ranks": [str(folder / "ranks.txt")], "ranks_sha256": hashlib.sha256(RANKS).hexdigest()}
    params = tokenize_params(**{"vocab_size": 300, **ranks, **changes})
    tokenize(params=params, corpus=corpus, out=folder / "tokens")
    return folder / "tokens"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_of_a_corpus_equal_those_of_its_splits_encoded_at_once(tmp_path: Path, kind: str) -> None:
    text = "é\r\n🙂" + made_up_text(60_000) + "é\r\n🙂"
    # Line ends of several kinds: some can be part of a token with their neighbours, most cannot.
    for old, new in {"\n": "\n\n", "dog\n\n": "dog\n", "fox\n\n": "fox\n\n\n", "jumps ": "jumps  \n naïve "}.items():
        text = text.replace(old, new)
    assert len(text) > 1.1 * CHUNK_CHARACTERS
    data = load_tokens(tokenized(tmp_path, text, kind=kind, vocab_size=600))
    middle = int(len(text) * 0.9)
    assert (data.meta.train_characters, data.meta.val_characters) == (middle, len(text) - middle)
    for split, part in ((data.train, text[:middle]), (data.val, text[middle:])):
        assert np.array_equal(split, data.tokenizer.encode(part))
        assert data.tokenizer.decode(split) == part


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizer_does_not_depend_on_the_validation_split(tmp_path: Path, kind: str) -> None:
    train = made_up_text(900)
    ends = ("zzzz zz the zzzz ", "over the lazy dog")
    first, second = ((tokenized(tmp_path, train + end * 6, kind=kind) / "tokenizer.json").read_bytes() for end in ends)
    assert first == second


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks = []
    for size in (4, 16):
        text = b"some text of many lines\n" * (size << 20 >> 5)
        tracemalloc.start()
        tokenized(tmp_path, text)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_files_do_not_depend_on_threads_or_hash_seed(tmp_path: Path) -> None:
    """In a text with many equally frequent pairs, so that ties have to be broken in a fixed order."""
    generator = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyzéèü")
    words = ["".join(generator.choice(letters, size)) for size in generator.integers(2, 9, 2000)]
    (tmp_path / "text.txt").write_text("\n".join(" ".join(generator.choice(words, 9)) for _ in range(1000)))
    write_params(tmp_path / "params.yaml", tokenize__vocab_size=330)
    one = environment(TOKENIZERS_PARALLELISM="false", PYTHONHASHSEED="1")
    five = environment(RAYON_NUM_THREADS="5", PYTHONHASHSEED="2")
    line = [sys.executable, "-m", "gpt", "tokenize", "--params", "params.yaml", "--corpus", "text.txt"]
    running = [
        subprocess.Popen([*line, "-S", f"tokenize.kind={kind}", "--out", f"{name}/{kind}"], cwd=tmp_path, env=env)
        for kind in ("word", "bpe", "wordpiece")
        for name, env in (("one", one), ("five", five))
    ]
    assert [process.wait(100) for process in running] == [0] * 6
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")]
    assert len(files) == 3 * 4
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "five" / file).read_bytes(), file


# -- texts and parameters that are refused


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"", "an empty file"),
        (b"abc\n" * 300_000 + b"\xff", r"invalid start byte at byte 1,200,000 \(0xff\)"),
        ("aé".encode()[:-1], "unexpected end of data at byte 1"),
        (b"aaaa", "'a' 3 times"),
    ],
)
def test_texts_without_training_data_are_refused(tmp_path: Path, text: bytes, found: str) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}/text\.txt: expected .* found {found}"):
        tokenized(tmp_path, text)
    assert not list((tmp_path / "tokens").iterdir())


@pytest.mark.parametrize("kind", ["char", "word", "wordpiece"])
def test_unknown_characters_in_the_validation_split_are_refused_with_remedies(tmp_path: Path, kind: str) -> None:
    text = "once upon a time\n" * 9 + "the Zoë then\n"
    with pytest.raises(UserError) as error:
        tokenized(tmp_path, text, kind=kind)
    for part in (f"{tmp_path / 'text.txt'}:", "'Z', 'h', 'ë'", "tokenize.train_fraction (now 0.9)", "tokenize.kind"):
        assert part in str(error.value)
    assert not list((tmp_path / "tokens").iterdir())
    for remedy in ({"kind": "bpe"}, {"kind": kind, "train_fraction": 0.97}):
        tokenized(tmp_path, text, **remedy)


@pytest.mark.parametrize(("kind", "least"), [("word", 28), ("bpe", 256), ("wordpiece", 56)])
def test_vocab_size_has_a_minimum(tmp_path: Path, kind: str, least: int) -> None:
    text = made_up_text(900)
    with pytest.raises(UserError, match=rf"tokenize.vocab_size: expected at least {least} .+ found {least - 1};"):
        tokenized(tmp_path, text, kind=kind, vocab_size=least - 1)
    assert not list((tmp_path / "tokens").iterdir())
    for size in (least, least + 5):
        assert load_tokens(tokenized(tmp_path, text, kind=kind, vocab_size=size)).meta.vocab_size == size


# -- tiktoken's ranks


def test_ranks_are_fetched_only_for_tiktoken(tmp_path: Path) -> None:
    text, missing = made_up_text(900), str(tmp_path / "nothing.txt")
    for kind in TOKENIZERS.keys() - {"tiktoken"}:
        tokenized(tmp_path, text, kind=kind, ranks=[missing])
    data = load_tokens(tokenized(tmp_path, text, kind="tiktoken"))
    assert data.tokenizer == TiktokenTokenizer.from_tiktoken(RANKS)
    for path in (tmp_path / "tokens").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=rf"tokenize\.ranks: .*{missing}"):
        tokenized(tmp_path, text, kind="tiktoken", ranks=[missing])
    with pytest.raises(UserError, match=r"tokenize\.ranks: .*SHA-256 0000"):
        tokenized(tmp_path, text, kind="tiktoken", ranks_sha256="0" * 64)
    assert not list((tmp_path / "tokens").iterdir())


@pytest.mark.proof
def test_the_pinned_ranks_are_those_of_gpt2(run_main: RunMain, tmp_path: Path) -> None:
    """The numbers of tokens of tiny Shakespeare are those in nanoGPT's readme."""
    write_params(tmp_path / "params.yaml", tokenize__kind="tiktoken")
    run_main("download", "--params", "params.yaml", "--out", "text.txt")
    run_main("tokenize", "--params", "params.yaml", "--corpus", "text.txt", "--out", "tokens")
    data = load_tokens(tmp_path / "tokens")
    assert (len(data.train), len(data.val), data.meta.vocab_size) == (301_966, 36_059, 50_256)
    assert data.tokenizer.encode("hello world").tolist() == [31373, 995]


# -- the token folder


def test_token_ids_take_two_or_four_bytes(tmp_path: Path) -> None:
    for size, expected in ((1 << 16, "<u2"), ((1 << 16) + 1, "<u4")):
        text = "".join(map(chr, range(1 << 16, (1 << 16) + size)))
        data = load_tokens(tokenized(tmp_path, text + text[::-1]))
        assert (data.meta.vocab_size, data.meta.dtype, data.train.dtype) == (size, expected, np.dtype(expected))
        assert data.tokenizer.decode(data.train) + data.tokenizer.decode(data.val) == text + text[::-1]


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_truncated_token_files_are_refused(tmp_path: Path, name: str) -> None:
    path = tokenized(tmp_path, made_up_text(900)) / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=f"{name}: expected .* found "):
        load_tokens(path.parent)
    path.unlink()
    with pytest.raises(UserError, match=f"{name}: .* found (0|no file)"):
        load_tokens(path.parent)


def test_a_byte_order_mark_is_no_part_of_the_text_and_carriage_returns_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = made_up_text(900)
    data = load_tokens(tokenized(tmp_path, "\ufeff" + text))
    assert data.tokenizer.decode([*data.train, *data.val]) == text
    assert "carriage returns" not in capsys.readouterr().out
    data = load_tokens(tokenized(tmp_path, text.replace("\n", "\r\n")))
    assert data.tokenizer.decode([*data.train, *data.val]) == text.replace("\n", "\r\n")
    assert capsys.readouterr().out.count("carriage returns") == 1


def test_bpe_learns_in_linear_time_from_a_text_without_spaces(tmp_path: Path) -> None:
    """One piece of 80,000 characters took a minute."""
    rng = random.Random(1)
    text = "".join(chr(0x4E00 + min(int(rng.expovariate(0.02)), 999)) for _ in range(80_000))
    began = time.process_time()
    data = load_tokens(tokenized(tmp_path, text, kind="bpe", vocab_size=2000))
    assert time.process_time() - began < 20
    assert data.tokenizer.decode([*data.train, *data.val]) == text
