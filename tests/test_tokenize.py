"""Text becomes tokens and comes back, in order, whatever its size; what is no text is refused."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.errors import UserError
from gpt.token_files import load_tokens
from gpt.tokenize import tokenize
from gpt.tokenizer import CharTokenizer, tokenizer_from_json
from tests.conftest import RunGpt, made_up_text, only_line, tokenize_params, write_params

PARAMS = tokenize_params()


@given(st.text(min_size=1), st.data())
def test_decode_undoes_encode(alphabet: str, data: st.DataObject) -> None:
    tokenizer = CharTokenizer.of_text([alphabet])
    text = data.draw(st.text(alphabet=sorted(set(alphabet))))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer_from_json(tokenizer.to_json()) == tokenizer


def test_unknown_characters_are_listed() -> None:
    with pytest.raises(UserError, match=r"found 'x', 'é'"):
        CharTokenizer("abc").encode("axbé")


def test_the_splits_are_the_text_in_order(tmp_path: Path) -> None:
    text = made_up_text(300_000) + "é\r\n🙂"  # more than one piece; line ends and wide characters survive
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
    "one symbol": (b"aaaa", ["two different characters", "'a' 4 times"]),
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
