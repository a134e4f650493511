"""Every kind of tokenizer: nothing of a text is lost, nothing of the validation split is learned, nothing is chance."""

import base64
import hashlib
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

import gpt.evaluation.evaluator
from gpt.__main__ import main
from gpt.core.errors import UserError
from gpt.data.prepare import PIECE_BYTES, TokenizeParams, tokenize
from gpt.data.token_files import load_tokens
from gpt.evaluation.memorization import Copies
from gpt.model.checkpoint import Checkpoint
from gpt.model.gpt import GPT
from gpt.tokenizers import TOKENIZERS, tokenizer_from_json
from gpt.tokenizers.base import Kind, Tokenizer
from gpt.tokenizers.char import CharTokenizer
from gpt.tokenizers.subword import BpeTokenizer, WordPieceTokenizer
from gpt.tokenizers.tiktoken import TiktokenTokenizer
from gpt.tokenizers.word import WordTokenizer
from tests.support.common import ROOT, environment, made_up_text, model_params, tokenize_params, write_params

STAGES: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
TEXT = made_up_text(600).replace("fox", "naïve fox") + "don't 12 ##s, Ġ «🙂»\r\n\0e\u0301te\u0301  \n\n\tend"
ALPHABET = "".join(sorted(set(TEXT)))
BPE = BpeTokenizer.train([TEXT], 300)
RANKS = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(BPE.token_bytes))
TIKTOKEN = TiktokenTokenizer.from_tiktoken(RANKS)
LEARNED = [
    CharTokenizer.from_chunks([TEXT]),
    WordTokenizer.train([TEXT], ALPHABET, 60),
    BPE,
    WordPieceTokenizer.train([TEXT], ALPHABET, 120),
    TIKTOKEN,
]
every_kind = pytest.mark.parametrize("tokenizer", LEARNED, ids=lambda tokenizer: tokenizer.kind)
byte_kinds = pytest.mark.parametrize("tokenizer", [BPE, TIKTOKEN], ids=lambda tokenizer: tokenizer.kind)


def test_there_is_a_class_for_every_kind() -> None:
    assert tuple(TOKENIZERS) == get_args(Kind) == tuple(tokenizer.kind for tokenizer in LEARNED)


# -- text to tokens and back


@every_kind
@given(text=st.one_of(st.text(alphabet=ALPHABET), st.lists(st.sampled_from(TEXT.split(" "))).map(" ".join)))
@example(text="")
@example(text=TEXT)
@example(text="\0\0\r\n\r\n e\u0301\u0301 ## s##s 🙂🙂")
@example(text="x" * 5000 + " " * 5000 + "x" + "\n" * 5000)
def test_nothing_over_the_training_alphabet_is_lost(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint32
    assert tokenizer.decode(tokens) == "".join(tokenizer.stream(tokens)) == text
    assert b"".join(tokenizer.token_bytes[token] for token in tokens) == text.encode()


@byte_kinds
@given(text=st.text())
@example(text="")
@example(text="\0")
@example(text="a\r\nb\n\r")
@example(text="Å\u0327\u0301 or \u1e9b\u0323")
@example(text="👩\u200d👩\u200d👧 𝔘𝔫𝔦 \U0010ffff \ufeff\uffff")
@example(text="<|endoftext|> [UNK] ##")
def test_no_text_is_strange_to_bytes(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=40)
@given(text=st.text(min_size=1), more=st.integers(0, 40), data=st.data())
def test_wordpiece_and_words_learned_from_anything_lose_nothing(text: str, more: int, data: st.DataObject) -> None:
    alphabet = "".join(sorted(set(text)))
    other = data.draw(st.text(alphabet=alphabet))
    learned: list[Tokenizer] = [
        WordTokenizer.train([text] * 2, alphabet, len(alphabet) + more),
        WordPieceTokenizer.train([text] * 2, alphabet, 2 * len(alphabet) + more),
    ]
    for tokenizer in learned:
        assert tokenizer.decode(tokenizer.encode(other)) == other
        assert tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer


@pytest.mark.parametrize("text", ["learn", "learn\ue000s \ue001"])
def test_marks_of_continuation_in_a_text_are_text(text: str) -> None:
    alphabet = "".join(sorted(set(text + "#")))
    tokenizer = WordPieceTokenizer.train([text, "##learn"] * 3, alphabet, 60)
    for written in ("##learn", "learn##", text * 2):
        assert tokenizer.decode(tokenizer.encode(written)) == written


@every_kind
def test_what_cannot_be_encoded_is_listed(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"'\\ud83d', '\\udcff'"):
        tokenizer.encode("a\udcffb\ud83d")
    if tokenizer.alphabet:
        with pytest.raises(UserError, match=r"found 'X', '´', 'ß'; remove them"):
            tokenizer.encode("fox ßXX´")


@given(st.lists(st.integers(0, BPE.vocab_size - 1)))
@example([0xF0, 0x9F, 0x99, ord("a"), 0x82])
@example([0xE2, 0x82])
def test_what_a_model_writes_comes_in_whole_characters(tokens: list[int]) -> None:
    assert "".join(BPE.stream(tokens)) == BPE.decode(tokens)


def test_a_character_comes_as_soon_as_it_is_whole() -> None:
    asked = []

    def tokens() -> Any:
        for byte in "né🙂!".encode():
            asked.append(byte)
            yield byte

    seen = [(piece, len(asked)) for piece in BPE.stream(tokens())]
    assert seen == [("n", 1), ("é", 3), ("🙂", 7), ("!", 8)]


@every_kind
def test_writing_starts_after_a_line_end(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.start_token]) == "\n"
    assert CharTokenizer(" ab").start_token == WordTokenizer(" ab", ()).start_token == 0


# -- tokenizer.json


def test_the_libraries_are_imported_only_where_they_are_used() -> None:
    code = "import sys, gpt.tokenize; print(*sorted({'tokenizers', 'tiktoken'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), text=True, capture_output=True, check=True)
    assert done.stdout == "\n"


@every_kind
def test_a_tokenizer_comes_back_and_decodes_without_its_library(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokenizer.encode(TEXT)
    for library in ("tokenizers", "tiktoken"):
        monkeypatch.setitem(sys.modules, library, None)
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again == tokenizer
    assert again.vocab_size == tokenizer.vocab_size > tokens.max()
    assert again.decode(tokens) == TEXT


SINGLE = [token.decode("latin-1") for token in BPE.token_bytes[:256]]
DAMAGED: list[Any] = [
    None,
    [],
    {"kind": "morse"},
    {"kind": ["char"]},
    {"kind": "char"},
    {"kind": "char", "vocabulary": "ba"},
    {"kind": "char", "vocabulary": "\ud800"},
    {"kind": "word", "characters": "ab", "words": "ab"},
    {"kind": "word", "characters": "ab", "words": ["ab", "ab"]},
    {"kind": "word", "characters": "ab", "words": ["a"]},
    {"kind": "word", "characters": "ab", "words": ["abc"]},
    {"kind": "word", "characters": "", "words": ["abc"]},
    {"kind": "bpe"},
    {"kind": "bpe", "merges": [["a", "b"]]},
    {"kind": "bpe", "merges": ["ab"]},
    {"kind": "bpe", "merges": ["ab c"]},
    {"kind": "bpe", "merges": ["a b", "a b"]},
    {"kind": "bpe", "merges": ["a b c"]},
    {"kind": "wordpiece", "beginnings": ["a"]},
    {"kind": "wordpiece", "beginnings": [], "continuations": []},
    {"kind": "wordpiece", "beginnings": ["a"], "continuations": ["b"]},
    {"kind": "wordpiece", "beginnings": ["a", "ab"], "continuations": ["a"]},
    {"kind": "wordpiece", "beginnings": ["a", "a"], "continuations": ["a"]},
    {"kind": "tiktoken", "ranks": SINGLE},
    {"kind": "tiktoken", "ranks": list(TIKTOKEN.ranks[:255])},
    {"kind": "tiktoken", "ranks": [*TIKTOKEN.ranks, "🙂"]},
    {"kind": "tiktoken", "ranks": [*TIKTOKEN.ranks, 3]},
]


@pytest.mark.parametrize("value", DAMAGED, ids=lambda value: json.dumps(value)[:50])
def test_a_damaged_tokenizer_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="tokenize again") as error:
        tokenizer_from_json(value)
    assert "\n" not in str(error.value)


# -- the command's function


def made(folder: Path, text: str, **changes: Any) -> Path:
    """A token folder of a text."""
    (folder / "text.txt").write_text(text, encoding="utf-8", newline="")
    tokenize(params=params(folder, **changes), corpus=folder / "text.txt", out=folder / "tokens")
    return folder / "tokens"


def params(folder: Path, **changes: Any) -> TokenizeParams:
    """The section, with our own ranks in a file."""
    (folder / "ranks.txt").write_bytes(RANKS)
    pinned = {"ranks": [str(folder / "ranks.txt")], "ranks_sha256": hashlib.sha256(RANKS).hexdigest()}
    return tokenize_params(**{"vocab_size": 300, **pinned, **changes})


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_pieces_of_a_long_text_have_the_tokens_of_the_whole(tmp_path: Path, kind: str) -> None:
    ends = {"\n": "\n\n", "dog\n\n": "dog\n", "fox\n\n": "fox\n\n\n", "jumps ": "jumps  \n naïve "}
    text = made_up_text(60_000)
    for end, other in ends.items():  # so that two line ends may be one token, and most are none
        text = text.replace(end, other)
    assert len(text) > 1.1 * PIECE_BYTES
    data = load_tokens(made(tmp_path, text, kind=kind, vocab_size=600))
    middle = int(len(text) * 0.9)
    assert (data.meta.train_characters, data.meta.val_characters) == (middle, len(text) - middle)
    for split, part in ((data.train, text[:middle]), (data.val, text[middle:])):
        assert np.array_equal(split, data.tokenizer.encode(part))
        assert data.tokenizer.decode(split) == part


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_nothing_is_learned_from_the_validation_split(tmp_path: Path, kind: str) -> None:
    train = made_up_text(900)
    learned = []
    for end in ("zzzz zz the zzzz ", "over the lazy dog"):
        learned.append((made(tmp_path, train + end * 6, kind=kind) / "tokenizer.json").read_bytes())
    assert learned[0] == learned[1]


AGAIN = """\
import sys
from pathlib import Path
from gpt.params import read_section
from gpt.tokenize import TokenizeParams, tokenize
for kind in ("word", "bpe", "wordpiece"):
    params = read_section(Path("params.yaml"), "tokenize", TokenizeParams, [f"tokenize.kind={kind}"])
    tokenize(params=params, corpus=Path("text.txt"), out=Path(sys.argv[1]) / kind)
"""


def test_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    """Many pairs are equally frequent, so that any order by chance would show."""
    chance = np.random.default_rng(0)
    words = [
        "".join(chance.choice(list("abcdefghijklmnopqrstuvwxyzéèü"), size)) for size in chance.integers(2, 9, 2000)
    ]
    (tmp_path / "text.txt").write_text("\n".join(" ".join(chance.choice(words, 9)) for _ in range(3000)))
    write_params(tmp_path / "params.yaml", tokenize__vocab_size=330)
    threads: list[dict[str, str]] = [
        {"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "1"},
        {"RAYON_NUM_THREADS": "2", "PYTHONHASHSEED": "2"},
        {"RAYON_NUM_THREADS": "5", "PYTHONHASHSEED": "3"},
    ]
    running = [
        subprocess.Popen([sys.executable, "-c", AGAIN, str(turn)], cwd=tmp_path, env=environment(**each))
        for turn, each in enumerate(threads)
    ]
    assert [process.wait(100) for process in running] == [0, 0, 0]
    first = {path.relative_to(tmp_path / "0"): path.read_bytes() for path in (tmp_path / "0").rglob("*.*")}
    assert len(first) == 3 * 4
    for turn in ("1", "2"):
        for name, content in first.items():
            assert (tmp_path / turn / name).read_bytes() == content, (turn, name)


@pytest.mark.parametrize(("kind", "least"), [("word", 28), ("bpe", 256), ("wordpiece", 56)])
def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path, kind: str, least: int) -> None:
    text = made_up_text(900)
    with pytest.raises(UserError, match=rf"tokenize.vocab_size: expected at least {least} \(.+\), found {least - 1};"):
        made(tmp_path, text, kind=kind, vocab_size=least - 1)
    assert not list((tmp_path / "tokens").iterdir())
    assert load_tokens(made(tmp_path, text, kind=kind, vocab_size=least)).meta.vocab_size == least
    assert load_tokens(made(tmp_path, text, kind=kind, vocab_size=least + 5)).meta.vocab_size == least + 5


# -- GPT-2's ranks


def test_ranks_are_fetched_for_tiktoken_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(tmp_path / "nothing.txt")
    for kind in TOKENIZERS.keys() - {"tiktoken"}:
        made(tmp_path, made_up_text(900), kind=kind, ranks=[nowhere])
    assert not capsys.readouterr().out
    data = load_tokens(made(tmp_path, made_up_text(900), kind="tiktoken"))
    assert data.tokenizer == TIKTOKEN
    for path in (tmp_path / "tokens").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=rf"tokenize\.ranks: expected one of 1 .* {nowhere}: there is no such file"):
        made(tmp_path, made_up_text(900), kind="tiktoken", ranks=[nowhere])
    with pytest.raises(UserError, match=r"tokenize\.ranks: expected one of 1 .*: expected SHA-256 0000"):
        made(tmp_path, made_up_text(900), kind="tiktoken", ranks_sha256="0" * 64)
    assert not list((tmp_path / "tokens").iterdir())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"#version: 0.2\n\xc4\xa0 t\n",
        RANKS.replace(b" 7\n", b" 8\n"),
        RANKS.replace(b" 7\n", b"\n"),
        RANKS + b"ISE= 300\nISE= 301\n",
        RANKS + b"ISE= 400\n",
        RANKS[RANKS.index(b"\n") + 1 :],
        RANKS + b"not base64 300",
    ],
)
def test_ranks_of_another_form_are_refused(content: bytes) -> None:
    with pytest.raises(UserError, match=r"^tokenize\.ranks: expected lines of base64 and rank"):
        TiktokenTokenizer.from_tiktoken(content)


@pytest.mark.proof
def test_the_pinned_ranks_are_those_of_gpt2(tmp_path: Path) -> None:
    """From the package index. The counts of tiny Shakespeare are those that nanoGPT's readme states."""
    write_params(tmp_path / "params.yaml", tokenize__kind="tiktoken")
    for words in (["download", "--out", "text.txt"], ["tokenize", "--corpus", "text.txt", "--out", "tokens"]):
        line = [sys.executable, "-m", "gpt", *words, "--params", "params.yaml"]
        subprocess.run(line, cwd=tmp_path, env=environment(), check=True, timeout=300)
    data = load_tokens(tmp_path / "tokens")
    assert (len(data.train), len(data.val), data.meta.vocab_size) == (301_966, 36_059, 50_256)
    assert data.tokenizer.encode("hello world").tolist() == [31373, 995]


# -- what the other commands make of it


@pytest.mark.parametrize("size", [256, 300])  # tokens are shorter than characters, and longer
def test_figures_about_copies_count_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    text = made_up_text(2000).replace("o", "🙂")
    data = load_tokens(made(tmp_path, text, kind="bpe", vocab_size=size))
    searched = []

    def find_copies(texts: list[str], corpus: str) -> Copies:
        searched.append((texts, corpus))
        return Copies(0, "")

    monkeypatch.setattr(gpt.evaluation.evaluator, "find_copies", find_copies)
    settings = gpt.evaluation.evaluator.EvaluateParams(
        batch_size=64, precision="float32", sample_characters=800, seed=1, device="cpu"
    )
    model = model_params(n_layer=1, n_head=1, n_embd=8, block_size=16, ngram=1)
    torch.manual_seed(0)
    checkpoint = Checkpoint(model, data.tokenizer, GPT(model, data.meta.vocab_size).state_dict(), {})
    gpt.evaluation.evaluator.evaluate(params=settings, checkpoint=checkpoint, data=data)
    (written, corpus), (real, _) = searched
    middle = int(len(text) * 0.9)
    assert corpus == text[:middle]
    assert [len(each) for each in written] == [100] * 8
    assert "\ufffd" in "".join(written)  # it has learned nothing, so what it writes is hardly UTF-8
    assert real == [text[middle + start :][:100] for start in range(0, 800, 100)]


@pytest.mark.parametrize(("kind", "size"), [("word", 42), ("bpe", 300)])
def test_other_tokens_go_all_the_way_and_bits_are_of_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, size: int
) -> None:
    text = made_up_text(4000).replace("fox", "naïve fox")
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8")
    changes: dict[str, Any] = {
        "download__sources": ["corpus.txt"],
        "download__sha256": None,
        "generate__prompts": ["the naïve"],
    }
    changes |= {"tokenize__kind": kind, "tokenize__vocab_size": size, "train__max_steps": 30}
    write_params(tmp_path / "params.yaml", **changes, generate__max_new_tokens=30)
    monkeypatch.chdir(tmp_path)
    for stage in STAGES:
        words = shlex.split(STAGES[stage]["cmd"])
        monkeypatch.setattr(sys, "argv", ["gpt", *words[words.index("gpt") + 1 :]])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, capsys.readouterr().err
    meta = json.loads((tmp_path / "data/tokens/meta.json").read_text())
    assert (meta["kind"], meta["vocab_size"]) == (kind, size)
    assert meta["val_tokens"] < 0.6 * meta["val_characters"]
    places = pd.read_csv(tmp_path / "plots/positions.csv")
    assert places["predictions"].sum() == meta["val_tokens"]
    bits = (places["loss"] * places["predictions"]).sum() / math.log(2) / (len(text) - int(len(text) * 0.9))
    figures = json.loads((tmp_path / "metrics/evaluate.json").read_text())
    assert figures["bits_per_char"] == pytest.approx(bits, abs=1e-4)
    assert figures["bits_per_char"] < math.log2(len(set(text))) - 1, "better than guessing characters"
    written = (tmp_path / "generation_out.txt").read_text(encoding="utf-8").rpartition("=" * 80 + "\n")[2]
    assert written.startswith("the naïve")
    assert len(written) > 9 + 30 + 1
