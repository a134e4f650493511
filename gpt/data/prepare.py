"""Tokenize a corpus: split it, train the tokenizer on the training split, and write the token folder."""

import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from gpt.core.cli import report
from gpt.core.errors import UserError
from gpt.core.files import atomic_write, prepare_output, read_json, sha256_file, write_json
from gpt.core.params import Digest, InitSection
from gpt.data.token_files import Meta
from gpt.download.sources import Sources, fetch_first
from gpt.tokenizers import tokenizer_from_json
from gpt.tokenizers.base import Kind, Tokenizer, format_characters
from gpt.tokenizers.char import CharTokenizer
from gpt.tokenizers.subword import BpeTokenizer, WordPieceTokenizer
from gpt.tokenizers.tiktoken import TiktokenTokenizer
from gpt.tokenizers.word import WordTokenizer

CHUNK_CHARACTERS = 1 << 18

# Up to the last single line feed between two characters that are no whitespace: no tokenizer has a token across it.
UP_TO_LINE_END = re.compile(r".*\S\n(?=\S)", re.DOTALL)


class TokenizeParams(InitSection):
    """The section `tokenize`."""

    kind: Kind
    train_fraction: float = Field(gt=0, lt=1)
    vocab_size: int = Field(ge=2, le=1 << 20)  # the subword trainers allocate memory for all of it
    ranks: Sources
    ranks_sha256: Digest


@dataclass(frozen=True)
class Corpus:
    """A text file whose first `train_characters` characters are the training split."""

    path: Path
    characters: int
    train_characters: int

    def train(self) -> Iterator[str]:
        """The training split in chunks that can be encoded independently."""
        return _split_at_line_ends(_read_chunks(self.path, 0, self.train_characters))

    def val(self) -> Iterator[str]:
        """The validation split, likewise."""
        return _split_at_line_ends(_read_chunks(self.path, self.train_characters, self.characters))


def tokenize(*, params: TokenizeParams, corpus: Path, out: Path) -> Meta:
    """Write `train.bin`, `val.bin`, `tokenizer.json` and `meta.json` into the folder `out`.

    The tokenizer is trained on the training split only. The text is read in chunks, once for each step that needs it.

    Raises:
        UserError: the corpus is missing, empty, not UTF-8 or consists of one distinct character; its validation split
            contains characters that the tokenizer cannot encode; the vocabulary is too small; no source has the ranks.
    """
    prepare_output(out / "meta.json")
    text = _open_corpus(corpus, params.train_fraction)
    pretrained = params.init_file("tokenize", "copy tokenizer.json from data/tokens, which this stage overwrites")
    tokenizer = tokenizer_from_json(read_json(pretrained)) if pretrained else _train_tokenizer(params, text)
    dtype: Literal["<u2", "<u4"] = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    meta = Meta(
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype,
        train_tokens=_write_tokens(tokenizer, text.train(), out / "train.bin", dtype),
        val_tokens=_write_tokens(tokenizer, text.val(), out / "val.bin", dtype),
        train_characters=text.train_characters,
        val_characters=text.characters - text.train_characters,
        corpus_sha256=sha256_file(corpus),
    )
    write_json(out / "tokenizer.json", tokenizer.to_json())
    write_json(out / "meta.json", meta.model_dump())
    return meta


def _open_corpus(path: Path, train_fraction: float) -> Corpus:
    """Count the characters and compute where the validation split starts."""
    characters = 0
    line_ends = False
    for chunk in _read_chunks(path):
        characters += len(chunk)
        line_ends = line_ends or "\r" in chunk
    if line_ends:
        report(f"{path} has carriage returns, which the model learns; to remove them: sed -i 's/\\r$//' FILE")
    if characters == 0:
        raise UserError(f"{path}: expected a training text, found an empty file; put a text there")
    train_characters = int(characters * train_fraction)
    if not 0 < train_characters < characters:
        raise UserError(
            f"tokenize.train_fraction: expected two splits that are not empty, found {train_fraction} of "
            f"{characters:,} characters; use a longer text"
        )
    return Corpus(path, characters, train_characters)


def _train_tokenizer(params: TokenizeParams, corpus: Corpus) -> Tokenizer:
    """Train the tokenizer on the training split, and check that it can encode the validation split."""
    characters = CharTokenizer.from_chunks(corpus.train())
    if characters.vocab_size == 1:
        raise UserError(
            f"{corpus.path}: expected at least two different characters in the training split, found "
            f"{characters.vocabulary!r} {corpus.train_characters:,} times; use another text"
        )
    if params.kind == "bpe":
        return BpeTokenizer.train(corpus.train(), params.vocab_size)
    if params.kind == "tiktoken":
        ranks = io.BytesIO()
        fetch_first("tokenize.ranks", params.ranks, params.ranks_sha256, ranks)
        return TiktokenTokenizer.from_tiktoken(ranks.getvalue())
    if unknown := set(CharTokenizer.from_chunks(corpus.val()).vocabulary) - set(characters.vocabulary):
        raise UserError(
            f"{corpus.path}: expected only the {characters.vocab_size} characters of the training split in the "
            f"validation split, found {format_characters(unknown)}; the model cannot be scored on characters it never "
            f"saw: change tokenize.train_fraction (now {params.train_fraction}), set tokenize.kind to bpe, which "
            "encodes any text, or remove them"
        )
    if params.kind == "word":
        return WordTokenizer.train(corpus.train(), characters.vocabulary, params.vocab_size)
    if params.kind == "wordpiece":
        return WordPieceTokenizer.train(corpus.train(), characters.vocabulary, params.vocab_size)
    return characters


def _read_chunks(path: Path, start: int = 0, end: int = sys.maxsize) -> Iterator[str]:
    """Read the characters `start` to `end` (exclusive) of a UTF-8 file in chunks, without newline conversion.

    A byte order mark is no part of the text.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: expected a text file, found: {error.strerror}; run the download stage") from None
    position = 0
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        try:
            while position < end and (chunk := text.read(CHUNK_CHARACTERS)):
                yield chunk[max(start - position, 0) : end - position]
                position += len(chunk)
        except UnicodeDecodeError as error:
            byte = file.tell() - len(error.object) + error.start  # in the file; error.start is in what was read
            raise UserError(
                f"{path}: expected UTF-8, found {error.reason} at byte {byte:,} ({error.object[error.start]:#04x}); "
                "convert it, for example with iconv -t utf-8"
            ) from None


def _split_at_line_ends(chunks: Iterator[str]) -> Iterator[str]:
    """Move the chunk boundaries to line ends, so that each chunk has the same tokens as in the whole text.

    A chunk without such a line end is passed on as it is: memory stays bounded.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        match = UP_TO_LINE_END.match(rest)
        end = match.end() if match else len(rest)
        yield rest[:end]
        rest = rest[end:]
    yield rest


def _write_tokens(tokenizer: Tokenizer, chunks: Iterator[str], path: Path, dtype: str) -> int:
    """Encode the chunks into a file; return the number of tokens."""
    count = 0
    with atomic_write(path) as file:
        for chunk in chunks:
            tokens = tokenizer.encode(chunk)
            file.write(tokens.astype(dtype).tobytes())
            count += len(tokens)
    return count
