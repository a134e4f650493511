"""All kinds of tokenizers: lossless encoding, streaming, and tokenizer.json."""

import base64
import json
import sys
from operator import length_hint
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt.core.errors import UserError
from gpt.tokenizers import TOKENIZERS, tokenizer_from_json
from gpt.tokenizers.base import Kind, Tokenizer
from gpt.tokenizers.char import CharTokenizer
from gpt.tokenizers.subword import MAX_PRE_TOKEN, BpeTokenizer, SubwordTokenizer, WordPieceTokenizer
from gpt.tokenizers.tiktoken import TiktokenTokenizer
from gpt.tokenizers.word import WordTokenizer
from tests.support.common import made_up_text

TEXT = made_up_text(600).replace("fox", "naïve fox") + "don't 12 ##s, Ġ «🙂»\r\n\0e\u0301te\u0301  \n\n\tend"
ALPHABET = "".join(sorted(set(TEXT)))
BPE = BpeTokenizer.train([TEXT], 300)
RANKS = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(BPE.token_bytes))
TIKTOKEN = TiktokenTokenizer.from_tiktoken(RANKS)
TRAINED = [
    CharTokenizer(ALPHABET),
    WordTokenizer.train([TEXT], ALPHABET, 60),
    BPE,
    WordPieceTokenizer.train([TEXT], ALPHABET, 120),
    TIKTOKEN,
]
every_kind = pytest.mark.parametrize("tokenizer", TRAINED, ids=lambda tokenizer: tokenizer.kind)


def test_registry_has_a_class_for_every_kind() -> None:
    assert tuple(TOKENIZERS) == get_args(Kind) == tuple(tokenizer.kind for tokenizer in TRAINED)


# -- encode and decode


@every_kind
@given(text=st.one_of(st.text(alphabet=ALPHABET), st.lists(st.sampled_from(TEXT.split(" "))).map(" ".join)))
@example(text="")
@example(text=TEXT)
@example(text="\0\0\r\n\r\n e\u0301\u0301 ## s##s 🙂🙂")
@example(text="x" * 5000 + " " * 5000 + "x" + "\n" * 5000)
def test_round_trip_over_the_training_alphabet(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint32
    assert tokenizer.decode(tokens) == "".join(tokenizer.stream(tokens)) == text
    assert b"".join(tokenizer.token_bytes[token] for token in tokens) == text.encode()


@pytest.mark.parametrize("tokenizer", [BPE, TIKTOKEN], ids=lambda tokenizer: tokenizer.kind)
@given(text=st.text())
@example(text="\0")
@example(text="a\r\nb\n\r")
@example(text="Å\u0327\u0301 or \u1e9b\u0323")
@example(text="👩\u200d👩\u200d👧 𝔘𝔫𝔦 \U0010ffff \ufeff\uffff")
@example(text="<|endoftext|> [UNK] ##")
def test_byte_level_kinds_round_trip_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


# Characters and sequences at which the library's patterns behave differently.
EDGES = [
    *"aZ 5_-!'\n\t\x0b\x1c\x1f\x7f\x85\xa0²éßΩǅ漢٣Ⅷ½\u0301\u1680\u180e\u2028\u200b\u3000\ufeff🙂𝔘",
    "'s",
    "'ll",
    "'S",
]
PARTS = EDGES + [part * count for part in ("b", "é", " ", "\n", "!", "'", "5", " c") for count in (63, 64, 65, 130)]
OF_PARTS = TEXT + "".join(left + right for left in EDGES for right in EDGES)
TRAINED_ON_PARTS = [
    BpeTokenizer.train([OF_PARTS] * 2, 1500),
    WordPieceTokenizer.train([OF_PARTS] * 2, "".join(sorted(set(OF_PARTS))), 1500),
]


@pytest.mark.parametrize("tokenizer", TRAINED_ON_PARTS, ids=lambda tokenizer: tokenizer.kind)
@given(chunks=st.lists(st.lists(st.sampled_from(PARTS), max_size=30).map("".join), max_size=3))
@example(chunks=["don't stop!'s 'll\xe9's 'sé x's", "é's naïve-naive na\u0301 ï a!é", "a" * 64 + "é", "!" * 64 + "'s"])
@example(chunks=["a \n b\n\n c \n", "  \n", " ", "\x1c \x1c  a", "!\x1c!", "!!\x1c a", "!« it's", "a\u3000 b \u3000c"])
def test_encode_chunks_equals_encode(tokenizer: Tokenizer, chunks: list[str]) -> None:
    """The library encodes the distinct pieces of a chunk in one case, the whole chunk in the other."""
    for chunk, tokens in zip(chunks, tokenizer.encode_chunks(chunks), strict=True):
        assert tokens.dtype == np.uint32
        assert np.array_equal(tokens, tokenizer.encode(chunk)), chunk


def test_encode_chunks_forgets_pieces_and_lists_unknown_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.tokenizers.subword.MAX_KNOWN", 20)
    chunks = [TEXT, TEXT[::-1], "", TEXT]
    for tokenizer in TRAINED:
        assert list(map(list, tokenizer.encode_chunks(chunks))) == [list(tokenizer.encode(chunk)) for chunk in chunks]
        if tokenizer.alphabet:
            with pytest.raises(UserError, match="found 'X', '´', 'ß';"):
                list(tokenizer.encode_chunks(["fox", "fox ßXX´"]))


@pytest.mark.parametrize("text", ["ACGT" * 500, "漢字" * 1000, "é" * 2000, "1" * 2000, "!" * 2000, " " * 2000])
def test_pre_tokens_are_short_in_text_without_words(text: str) -> None:
    """Learning and encoding take quadratic time in the length of a pre-token, linear time in their number."""
    alphabet = "".join(sorted(set(text)))
    for tokenizer in (BPE, WordPieceTokenizer.train([text], alphabet, 2 * len(alphabet))):
        assert isinstance(tokenizer, SubwordTokenizer)
        spans = [span for _, span in tokenizer._engine.pre_tokenizer.pre_tokenize_str(text)]
        assert sum(end - start for start, end in spans) == len(text)
        assert max(end - start for start, end in spans) <= MAX_PRE_TOKEN


@settings(max_examples=40)
@given(text=st.text(min_size=1), more=st.integers(0, 40), data=st.data())
def test_kinds_with_an_alphabet_can_be_trained_on_any_text(text: str, more: int, data: st.DataObject) -> None:
    alphabet = "".join(sorted(set(text)))
    other = data.draw(st.text(alphabet=alphabet))
    for tokenizer in (
        CharTokenizer(alphabet),
        WordTokenizer.train([text] * 2, alphabet, len(alphabet) + more),
        WordPieceTokenizer.train([text] * 2, alphabet, 2 * len(alphabet) + more),
    ):
        assert tokenizer.decode(tokenizer.encode(other)) == other
        assert tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json()))) == tokenizer


@pytest.mark.parametrize("text", ["learn", "learn\ue000s \ue001"])
def test_wordpiece_encodes_continuation_prefixes_as_text(text: str) -> None:
    alphabet = "".join(sorted(set(text + "#")))
    tokenizer = WordPieceTokenizer.train([text, "##learn"] * 3, alphabet, 60)
    for encoded in ("##learn", "learn##", text * 2):
        assert tokenizer.decode(tokenizer.encode(encoded)) == encoded


def test_word_tokenizer_splits_rare_words_into_characters() -> None:
    text = "the fox, the dog;\nthe fox ran"
    alphabet = "".join(sorted(set(text)))
    tokenizer = WordTokenizer.train([text[:17], text[17:]], alphabet, 100)
    assert tokenizer.words == ("the", "fox")  # by descending frequency; `dog` and `ran` occur once
    tokens = [tokenizer.decode([token]) for token in tokenizer.encode("a fox, the dog")]
    assert tokens == ["a", " ", "fox", ",", " ", "the", " ", "d", "o", "g"]
    assert WordTokenizer.train([text], alphabet, len(alphabet) + 1).words == ("the",)
    assert WordTokenizer.train(["b_é b_é a2 a2"], " 2_abé", 7).words == ("a2",)  # equal frequencies: sorted


@every_kind
def test_encode_lists_unknown_characters(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"'\\ud83d', '\\udcff'"):
        tokenizer.encode("a\udcffb\ud83d")
    if tokenizer.alphabet:
        with pytest.raises(UserError, match=r"found 'X', '´', 'ß';"):
            tokenizer.encode("fox ßXX´")


@given(st.lists(st.integers(0, BPE.vocab_size - 1)))
@example([0xF0, 0x9F, 0x99, ord("a"), 0x82])
@example([0xE2, 0x82])
def test_stream_equals_decode_for_invalid_utf8(tokens: list[int]) -> None:
    assert "".join(BPE.stream(tokens)) == BPE.decode(tokens)


def test_stream_yields_a_character_with_its_last_byte() -> None:
    tokens = iter("né🙂!".encode())
    chunks = [(chunk, length_hint(tokens)) for chunk in BPE.stream(tokens)]
    assert chunks == [("n", 7), ("é", 5), ("🙂", 1), ("!", 0)]


@every_kind
def test_start_token_is_the_line_feed_or_token_0(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.start_token]) == "\n"
    assert CharTokenizer(" ab").start_token == WordTokenizer(" ab", ()).start_token == 0


# -- tokenizer.json


@every_kind
def test_loaded_tokenizer_is_equal_and_decodes_without_its_library(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokenizer.encode(TEXT)
    for library in ("tokenizers", "tiktoken"):
        monkeypatch.setitem(sys.modules, library, None)
    loaded = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert loaded == tokenizer
    assert loaded.vocab_size == tokenizer.vocab_size > tokens.max()
    assert loaded.decode(tokens) == TEXT


MERGES: list[Any] = [None, [["a", "b"]], ["ab"], ["ab c"], ["a b", "a b"], ["a b c"]]
WORDS: list[Any] = [("ab", "ab"), ("ab", ["ab", "ab"]), ("ab", ["a"]), ("ab", ["abc"]), ("", ["abc"])]
PIECES: list[Any] = [(["a"], None), ([], []), (["a"], ["b"]), (["a", "ab"], ["a"]), (["a", "a"], ["a"])]
INVALID: list[Any] = [
    None,
    [],
    {"kind": "morse"},
    {"kind": ["char"]},
    *({"kind": "char", "vocabulary": vocabulary} for vocabulary in (None, "", "ba", "\ud800", ["a", "b"])),
    *({"kind": "word", "characters": characters, "words": words} for characters, words in WORDS),
    *({"kind": "bpe", "merges": merges} for merges in MERGES),
    *({"kind": "wordpiece", "beginnings": first, "continuations": later} for first, later in PIECES),
    *({"kind": "tiktoken", "ranks": [*TIKTOKEN.ranks[:255], *more]} for more in ([], ["\x00"])),
    *({"kind": "tiktoken", "ranks": [*TIKTOKEN.ranks, more]} for more in ("🙂", 3, "a")),
]


@pytest.mark.parametrize("value", INVALID, ids=lambda value: json.dumps(value)[:50])
def test_invalid_tokenizer_json_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="tokenize again") as error:
        tokenizer_from_json(value)
    assert "\n" not in str(error.value)


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
def test_invalid_ranks_are_refused(content: bytes) -> None:
    with pytest.raises(UserError, match=r"^tokenize\.ranks: "):
        TiktokenTokenizer.from_tiktoken(content)
