"""Tokenizers of this project as tokenizers of the Hugging Face library `tokenizers`, which give the same tokens."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from gpt.core.errors import UserError
from gpt.tokenizers.base import Tokenizer
from gpt.tokenizers.char import CharTokenizer
from gpt.tokenizers.subword import BpeTokenizer, WordPieceTokenizer
from gpt.tokenizers.tiktoken import GPT2_PATTERN, TiktokenTokenizer
from gpt.tokenizers.word import WordTokenizer

if TYPE_CHECKING:
    import tokenizers

UNKNOWN = "<unk>"  # not in the vocabulary, so that an unknown character is an error, as in this project


def make_fast_tokenizer(tokenizer: Tokenizer) -> "tokenizers.Tokenizer":
    """The tokenizer of the library; it encodes and decodes every text in the same way.

    Raises:
        UserError: the library cannot express this tokenizer.
    """
    from tokenizers import decoders  # noqa: PLC0415

    decoder: decoders.Decoder
    match tokenizer:
        case CharTokenizer(vocabulary):
            engine, decoder = _make_word_engine(vocabulary, ()), decoders.Fuse()
        case WordTokenizer(characters, words):
            engine, decoder = _make_word_engine(characters, words), decoders.Fuse()
        case BpeTokenizer():
            engine, decoder = tokenizer._engine, decoders.ByteLevel()
        case TiktokenTokenizer(ranks):
            engine, decoder = _make_rank_engine(ranks), decoders.ByteLevel()
        case WordPieceTokenizer():
            engine = tokenizer._engine
            prefix = engine.model.continuing_subword_prefix  # a character outside the alphabet
            decoder = decoders.Sequence([decoders.Replace(prefix, ""), decoders.Fuse()])
        case _:
            raise UserError(
                f"tokenize.kind: expected a kind of transformers, found {tokenizer.kind}; use --format safetensors"
            )
    engine.decoder = decoder
    return engine


def _make_word_engine(characters: str, words: Sequence[str]) -> "tokenizers.Tokenizer":
    """Words of the vocabulary are tokens; all other ones are split into characters, since there are no merges."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # noqa: PLC0415

    vocabulary = {token: number for number, token in enumerate((*characters, *words))}
    engine = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, ignore_merges=True))
    # The characters of a word by number: what `\w` stands for differs between Python and the library.
    in_word = "".join(rf"\x{{{ord(character):x}}}" for character in characters if re.match(r"\w", character))
    pattern = rf"[{in_word}]+|[\s\S]" if in_word else r"[\s\S]"
    engine.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return engine


def _make_rank_engine(ranks: Sequence[str]) -> "tokenizers.Tokenizer":
    """Byte pair encoding by rank."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # noqa: PLC0415

    vocabulary = {token: rank for rank, token in enumerate(ranks)}
    engine = Tokenizer(models.BPE(vocab=vocabulary, merges=_find_merges(vocabulary)))
    split = pre_tokenizers.Split(Regex(GPT2_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    return engine


def _find_merges(ranks: dict[str, int]) -> list[tuple[str, str]]:
    """The two parts of each token, in the order of the ranks: those left when all merges of lower rank are done.

    The library merges pairs from a list. Tiktoken merges any two neighbours that form a token, lowest rank first. Both
    are equal if each token has two such parts, since a token never forms from other parts then.
    """
    merges = []
    for token, rank in ranks.items():
        parts = list(token)
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            if (lowest := min(pairs)) == rank:
                raise UserError(
                    f"tokenize.ranks: expected tokens of two parts with lower ranks, found {token!r} of {parts} at "
                    f"rank {rank:,}, which transformers cannot express; use --format safetensors"
                )
            first = pairs.index(lowest)
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges
