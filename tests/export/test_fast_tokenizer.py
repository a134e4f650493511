"""The exported tokenizers of the library `tokenizers` give the tokens and the texts of the project's own."""

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt.core.errors import UserError
from gpt.export.fast_tokenizer import make_fast_tokenizer
from gpt.tokenizers.base import Tokenizer
from gpt.tokenizers.char import CharTokenizer
from gpt.tokenizers.subword import BYTE_TO_CHARACTER
from gpt.tokenizers.tiktoken import TiktokenTokenizer
from gpt.tokenizers.word import WordTokenizer
from tests.tokenizers.test_tokenizers import ALPHABET, TEXT, TRAINED, every_kind

# As read from the exported file.
FAST: dict[str, tokenizers.Tokenizer] = {
    one.kind: tokenizers.Tokenizer.from_str(make_fast_tokenizer(one).to_str()) for one in TRAINED
}
BYTES = list(BYTE_TO_CHARACTER.values())


@every_kind
@settings(deadline=None)
@given(text=st.one_of(st.text(alphabet=ALPHABET), st.lists(st.sampled_from(TEXT.split(" "))).map(" ".join)))
@example(text=TEXT)
@example(text="\0\0\r\n\r\n e\u0301\u0301 ## s##s 🙂🙂 foxfox naïvefox 's n't")
@example(text="x" * 5000 + " " * 5000 + "x" + "\n" * 5000)
def test_tokens_and_text_are_equal(tokenizer: Tokenizer, text: str) -> None:
    fast, tokens = FAST[tokenizer.kind], tokenizer.encode(text).tolist()
    assert fast.encode(text).ids == tokens
    assert fast.decode(tokens) == text


@pytest.mark.parametrize("kind", ["bpe", "tiktoken"])
@settings(deadline=None)
@given(text=st.text())
def test_byte_level_kinds_are_equal_for_any_text(kind: str, text: str) -> None:
    own = next(one for one in TRAINED if one.kind == kind)
    assert FAST[kind].encode(text).ids == own.encode(text).tolist()


@settings(deadline=None)
@given(text=st.text(min_size=1))
@example(text="fox\u0301 x²y fox‿fox ⅷⅷ")
def test_words_are_equal_for_any_alphabet(text: str) -> None:
    """Python and the library do not count the same marks and numbers as parts of words."""
    alphabet = "".join(sorted(set(text)))
    for own in (CharTokenizer(alphabet), WordTokenizer.train([text] * 2, alphabet, len(alphabet) + 9)):
        fast, sample = make_fast_tokenizer(own), text + text[::-1]
        assert fast.encode(sample).ids == own.encode(sample).tolist()
        assert fast.decode(own.encode(sample).tolist()) == sample


@every_kind
@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, min(one.vocab_size for one in TRAINED) - 1)))
def test_any_tokens_are_decoded_equally(tokenizer: Tokenizer, tokens: list[int]) -> None:
    """A model may generate any sequence of tokens, also an invalid or an unusual one."""
    assert FAST[tokenizer.kind].decode(tokens) == tokenizer.decode(tokens)


@pytest.mark.parametrize("kind", ["char", "word", "wordpiece"])
def test_an_unknown_character_is_an_error_and_not_omitted(kind: str) -> None:
    for text in ("foß", "ß", "a ßß b"):
        with pytest.raises(Exception, match=r"(?i)unk"):
            FAST[kind].encode(text)


@settings(deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=12),
    swap=st.tuples(st.integers(0, 99), st.integers(0, 99)),
    text=st.text(alphabet="abc ", max_size=40),
)
def test_ranks_are_equal_or_refused(pairs: list[tuple[int, int]], swap: tuple[int, int], text: str) -> None:
    """Tiktoken merges any two neighbours that form a token, the library only pairs from its list."""
    tokens = ["a", "b", "c"]
    for left, right in pairs:
        tokens.append(tokens[left % len(tokens)] + tokens[right % len(tokens)])
    merged = list(dict.fromkeys(tokens[3:]))
    if merged:  # a token may have a lower rank than its parts
        first, second = (index % len(merged) for index in swap)
        merged[first], merged[second] = merged[second], merged[first]
    own = TiktokenTokenizer((*BYTES, *merged))
    try:
        fast = make_fast_tokenizer(own)
    except UserError as error:
        assert "tokenize.ranks" in str(error)
    else:
        assert fast.encode(text).ids == own.encode(text).tolist()


def test_ranks_without_merges_are_refused() -> None:
    with pytest.raises(UserError, match=r"found 'abc' of \['a', 'b', 'c'\] at rank 256"):
        make_fast_tokenizer(TiktokenTokenizer((*BYTES, "abc")))
