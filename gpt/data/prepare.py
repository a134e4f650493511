"""Cut a text into tokens: training and validation split, the tokenizer, and a summary of them."""

import codecs
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from gpt.core.errors import UserError
from gpt.core.files import atomic_write, prepare_output, read_json, sha256_file, write_json
from gpt.core.params import Section
from gpt.data.token_files import Meta, token_dtype
from gpt.download.sources import LIMITS, Digest, Limits, Sources, fetch_first
from gpt.tokenizers import tokenizer_from_json
from gpt.tokenizers.base import Kind, Tokenizer, format_characters
from gpt.tokenizers.char import CharTokenizer
from gpt.tokenizers.subword import BpeTokenizer, WordPieceTokenizer
from gpt.tokenizers.tiktoken import TiktokenTokenizer
from gpt.tokenizers.word import WordTokenizer

PIECE_BYTES = 1 << 18

LINE_END = re.compile(r".*\S\n(?=\S)", re.DOTALL)  # up to the last lone one, where every kind of tokenizer cuts anyway


class TokenizeParams(Section):
    """The section `tokenize`."""

    init_from: str | None = Field(min_length=1)
    kind: Kind
    train_fraction: float = Field(gt=0, lt=1)
    vocab_size: int = Field(ge=2)
    ranks: Sources
    ranks_sha256: Digest


@dataclass(frozen=True)
class Splits:
    """A text in a file, of so many characters; the first ones are for training."""

    corpus: Path
    characters: int
    train_characters: int

    def train(self) -> Iterator[str]:
        """The training text in pieces that can be cut into tokens one by one."""
        return _at_line_ends(_between(_pieces(self.corpus), 0, self.train_characters))

    def val(self) -> Iterator[str]:
        """The validation text, likewise."""
        return _at_line_ends(_between(_pieces(self.corpus), self.train_characters, self.characters))


def tokenize(*, params: TokenizeParams, corpus: Path, out: Path, limits: Limits = LIMITS) -> Meta:
    """Write `train.bin`, `val.bin`, `tokenizer.json` and `meta.json` into the folder `out`.

    The tokenizer learns from the training split alone. The text passes through memory in pieces, once for each thing
    that is learned or written.

    Args:
        limits: what fetching the ranks may cost, where the kind needs any.

    Raises:
        UserError: the corpus is missing, empty, not UTF-8, made of one symbol only, or its validation split holds
            characters that the tokenizer cannot know; the vocabulary is too small; no source gives the ranks.
    """
    prepare_output(out / "meta.json")
    splits = _split(corpus, params.train_fraction)
    tokenizer = _learn(params, splits, limits)
    dtype = token_dtype(tokenizer.vocab_size)
    meta = Meta(
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype,
        train_tokens=_write(tokenizer, splits.train(), out / "train.bin", dtype),
        val_tokens=_write(tokenizer, splits.val(), out / "val.bin", dtype),
        train_characters=splits.train_characters,
        val_characters=splits.characters - splits.train_characters,
        corpus_sha256=sha256_file(corpus),
    )
    write_json(out / "tokenizer.json", tokenizer.to_json())
    write_json(out / "meta.json", meta.model_dump())
    return meta


def _split(corpus: Path, fraction: float) -> Splits:
    """Count the characters and cut the text in two."""
    characters = sum(len(piece) for piece in _pieces(corpus))
    if characters == 0:
        raise UserError(f"{corpus}: expected a text to learn from, found an empty file; put the text there")
    train_characters = int(characters * fraction)
    if not 0 < train_characters < characters:
        raise UserError(
            f"tokenize.train_fraction: expected a part of {characters:,} characters on both sides, found "
            f"{fraction}, which leaves one side empty; choose a longer text"
        )
    return Splits(corpus, characters, train_characters)


def _learn(params: TokenizeParams, splits: Splits, limits: Limits) -> Tokenizer:
    """Make the tokenizer from the training split, or the ranks, and prove that it knows the validation split.

    One that was made before is taken as it is; what it does not know, its `encode` names.
    """
    if params.init_from:
        return _load_tokenizer(Path(params.init_from))
    characters = CharTokenizer.from_chunks(splits.train())
    if characters.vocab_size == 1:
        raise UserError(
            f"{splits.corpus}: expected at least two different characters, found {characters.vocabulary!r} "
            f"{splits.train_characters:,} times in the training split; there is nothing to learn in it: choose another "
            "text"
        )
    if params.kind == "bpe":
        return BpeTokenizer.train(splits.train(), params.vocab_size)
    if params.kind == "tiktoken":
        ranks = io.BytesIO()
        fetch_first("tokenize.ranks", params.ranks, params.ranks_sha256, ranks, to="the ranks", limits=limits)
        return TiktokenTokenizer.from_tiktoken(ranks.getvalue())
    _check_validation(splits, characters, params.train_fraction)
    if params.kind == "word":
        return WordTokenizer.train(splits.train(), characters.vocabulary, params.vocab_size)
    if params.kind == "wordpiece":
        return WordPieceTokenizer.train(splits.train(), characters.vocabulary, params.vocab_size)
    return characters


def _load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of an earlier training, for more training on another text."""
    if not path.is_file():
        raise UserError(
            f"tokenize.init_from: expected a tokenizer.json, found no file {path}; copy one out of data/tokens first, "
            "whose content this stage replaces, or set it to null"
        )
    return tokenizer_from_json(read_json(path))


def _check_validation(splits: Splits, known: CharTokenizer, fraction: float) -> None:
    """Refuse a validation text with characters that the training text never shows."""
    unknown = set(CharTokenizer.from_chunks(splits.val()).vocabulary) - set(known.vocabulary)
    if unknown:
        raise UserError(
            f"{splits.corpus}: expected only the {known.vocab_size} characters of the training split in the validation "
            f"split, found {format_characters(unknown)}; set another tokenize.train_fraction (now {fraction}), or "
            "tokenize.kind bpe, which takes any text, or leave them out"
        )


def _pieces(corpus: Path) -> Iterator[str]:
    """The text of a file in pieces, line ends untouched."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        file = corpus.open("rb")
    except OSError as error:
        raise UserError(f"{corpus}: expected a text file, found: {error.strerror}; run the download stage") from None
    with file:
        while True:
            data = file.read(PIECE_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at = offset - pending + error.start
                raise UserError(
                    f"{corpus}: expected UTF-8, found {error.reason} at byte {at:,} "
                    f"({error.object[error.start]:#04x}); convert it, for example with iconv -t utf-8"
                ) from None
            if not data:
                return
            offset += len(data)


def _between(pieces: Iterator[str], first: int, end: int) -> Iterator[str]:
    """The characters `first` to `end`, the latter not included, of a text in pieces."""
    at = 0
    for piece in pieces:
        yield piece[max(first - at, 0) : max(end - at, 0)]
        at += len(piece)
        if at >= end:
            return


def _at_line_ends(pieces: Iterator[str]) -> Iterator[str]:
    """The same text cut behind lone line ends, so that each piece has the tokens that it has in the whole text.

    Where none comes for long the cut is anywhere: memory stays bounded.
    """
    rest = ""
    for piece in pieces:
        rest += piece
        found = LINE_END.match(rest)
        cut = found.end() if found else len(rest)
        yield rest[:cut]
        rest = rest[cut:]
    yield rest


def _write(tokenizer: Tokenizer, pieces: Iterator[str], path: Path, dtype: str) -> int:
    """Encode the pieces into a file; returns the number of tokens."""
    written = 0
    with atomic_write(path) as file:
        for piece in pieces:
            tokens = tokenizer.encode(piece)
            file.write(tokens.astype(dtype).tobytes())
            written += len(tokens)
    return written
