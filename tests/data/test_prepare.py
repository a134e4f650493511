"""Text becomes tokens and comes back, in order, whatever its size; what is no text is refused."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.core.errors import UserError
from gpt.data.prepare import tokenize
from gpt.data.token_files import load_tokens
from gpt.tokenizers import tokenizer_from_json
from gpt.tokenizers.char import CharTokenizer
from gpt.tokenizers.word import WordTokenizer
from tests.conftest import RunGpt
from tests.support.common import made_up_text, only_line, tokenize_params, write_params

PARAMS = tokenize_params()


@given(st.text(min_size=1), st.data())
def test_decode_undoes_encode(alphabet: str, data: st.DataObject) -> None:
    tokenizer = CharTokenizer.from_chunks([alphabet])
    text = data.draw(st.text(alphabet=sorted(set(alphabet))))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer_from_json(tokenizer.to_json()) == tokenizer


def test_unknown_characters_are_listed() -> None:
    with pytest.raises(UserError, match=r"found 'x', 'é', '\\udcff'"):
        CharTokenizer("abc").encode("axbé\udcff")


def test_frequent_words_are_tokens_and_rare_ones_fall_into_characters() -> None:
    text = "the fox, the dog;\nthe fox ran"
    alphabet = "".join(sorted(set(text)))
    tokenizer = WordTokenizer.train([text[:17], text[17:]], alphabet, 100)
    assert tokenizer.words == ("the", "fox")  # the more frequent first; `dog` and `ran` occur once
    cut = [tokenizer.decode([token]) for token in tokenizer.encode("a fox, the dog")]
    assert cut == ["a", " ", "fox", ",", " ", "the", " ", "d", "o", "g"]
    assert WordTokenizer.train([text], alphabet, len(alphabet) + 1).words == ("the",)
    assert WordTokenizer.train(["b_é b_é a2 a2"], " 2_abé", 7).words == ("a2",)  # of equally frequent ones the first


def test_the_splits_are_the_text_in_order(tmp_path: Path) -> None:
    text = "é\r\n🙂" + made_up_text(300_000) + "é\r\n🙂"  # several pieces; line ends and wide characters survive
    (tmp_path / "text.txt").write_text(text, encoding="utf-8", newline="")
    meta = tokenize(params=PARAMS, corpus=tmp_path / "text.txt", out=tmp_path / "tokens")
    data = load_tokens(tmp_path / "tokens")
    assert len(text.encode()) > 1 << 20
    assert data.tokenizer.decode(data.train) + data.tokenizer.decode(data.val) == text
    assert len(data.train) == int(len(text) * 0.9) == meta.train_characters
    assert data.train.dtype == np.dtype("<u2")
    assert meta.vocab_size == len(set(text))


def test_memory_stays_flat_as_the_corpus_grows(tmp_path: Path) -> None:
    peaks = []
    for pieces in (4, 16):
        (tmp_path / "text.txt").write_bytes(b"some text of many lines\n" * (pieces << 20 >> 5))
        tracemalloc.start()
        tokenize(params=PARAMS, corpus=tmp_path / "text.txt", out=tmp_path / "tokens")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


REFUSED = {
    "empty": (b"", ["empty file"]),
    "not UTF-8": (b"abc\n" * 300_000 + b"\xff", ["expected UTF-8", "byte 1,200,000", "0xff"]),
    "cut in a character": ("aé".encode()[:-1], ["expected UTF-8", "byte 1"]),
    "one symbol": (b"aaaa", ["two different characters", "'a' 3 times in the training split"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_to_learn_from_is_refused(tmp_path: Path, name: str) -> None:
    content, expected = REFUSED[name]
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(UserError) as error:
        tokenize(params=PARAMS, corpus=tmp_path / "text.txt", out=tmp_path / "tokens")
    for part in [str(tmp_path / "text.txt"), *expected]:
        assert part in str(error.value)
    assert not list((tmp_path / "tokens").iterdir())


@pytest.mark.parametrize("kind", ["char", "word", "wordpiece"])
def test_characters_that_training_never_shows_are_refused_with_what_to_set(tmp_path: Path, kind: str) -> None:
    (tmp_path / "text.txt").write_bytes(b"once upon a time\n" * 9 + "the Zoë then\n".encode())
    with pytest.raises(UserError) as error:
        tokenize(params=tokenize_params(kind=kind), corpus=tmp_path / "text.txt", out=tmp_path / "tokens")
    assert str(error.value) == (
        f"{tmp_path / 'text.txt'}: expected only the 12 characters of the training split in the validation split, "
        "found 'Z', 'h', 'ë'; set another tokenize.train_fraction (now 0.9), or tokenize.kind bpe, which takes any "
        "text, or leave them out"
    )
    assert not list((tmp_path / "tokens").iterdir())
    for remedy in ({"kind": "bpe"}, {"kind": kind, "train_fraction": 0.97}):
        tokenize(params=tokenize_params(**remedy), corpus=tmp_path / "text.txt", out=tmp_path / "tokens")


def test_tokens_take_two_bytes_or_four(tmp_path: Path) -> None:
    for size, expected in ((1 << 16, "<u2"), ((1 << 16) + 1, "<u4")):
        text = "".join(map(chr, range(1 << 16, (1 << 16) + size)))
        (tmp_path / "text.txt").write_text(text + text[::-1], encoding="utf-8")
        meta = tokenize(params=PARAMS, corpus=tmp_path / "text.txt", out=tmp_path / "tokens")
        data = load_tokens(tmp_path / "tokens")
        assert (meta.vocab_size, meta.dtype, data.train.dtype) == (size, expected, np.dtype(expected))
        assert data.tokenizer.decode(data.train) + data.tokenizer.decode(data.val) == text + text[::-1]


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_truncated_token_file_is_refused(tmp_path: Path, corpus: Path, name: str) -> None:
    tokenize(params=PARAMS, corpus=corpus, out=tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{name}: expected [\d,]+ bytes .* found [\d,]+; tokenize again"):
        load_tokens(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=f"{name}: .* found 0"):
        load_tokens(tmp_path)


def test_the_command(gpt: RunGpt, tmp_path: Path, corpus: Path) -> None:
    params = write_params(tmp_path / "params.yaml")
    done = gpt("tokenize", "--params", params, "--corpus", corpus, "--out", "a b/tokens")
    assert done.returncode == 0, done.stderr
    assert "tokens to train on" in done.stdout
    assert "tokenize: started" in (tmp_path / "gpt_nano.log").read_text()
    done = gpt("tokenize", "--params", params, "--corpus", "none.txt", "--out", "tokens")
    assert done.returncode == 2
    assert "none.txt" in only_line(done.stderr)
