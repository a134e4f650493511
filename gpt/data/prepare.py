"""Tokenize a corpus: split it, train the tokenizer on the training split, and write the token folder."""

import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from gpt.core.cli import report
from gpt.core.errors import UserError
from gpt.core.files import atomic_write, prepare_output, read_json, sha256_file, write_json
from gpt.core.params import Digest, InitSection
from gpt.data.token_files import Meta
from gpt.download.sources import Sources, fetch_first
from gpt.tokenizers import tokenizer_from_json
from gpt.tokenizers.base import Kind, Tokenizer, format_characters
from gpt.tokenizers.char import CharTokenizer, code_points
from gpt.tokenizers.subword import BpeTokenizer, WordPieceTokenizer
from gpt.tokenizers.tiktoken import TiktokenTokenizer
from gpt.tokenizers.word import WordTokenizer

CHUNK_CHARACTERS = 1 << 18
SMALL_CHUNK_CHARACTERS = 1 << 15  # the allocator reuses arrays of this size; larger ones cost page faults

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
    """A text file whose first `train_characters` characters are the training split.

    Args:
        first: the index of the first occurrence of each distinct character.
    """

    path: Path
    characters: int
    train_characters: int
    first: dict[str, int]

    def alphabet(self) -> str:
        """The distinct characters of the training split, sorted."""
        return "".join(sorted(character for character, index in self.first.items() if index < self.train_characters))

    def splits(self, chunk_characters: int) -> tuple[Iterator[str], Iterator[str]]:
        """Both splits in chunks that can be encoded independently.

        The file is read once: the validation split is what the training split, which comes first, leaves.
        """
        chunks = _read_chunks(self.path, chunk_characters, self.train_characters)
        return _split_at_line_ends(_up_to(self.train_characters, chunks)), _split_at_line_ends(chunks)


def tokenize(*, params: TokenizeParams, corpus: Path, out: Path) -> Meta:
    """Write `train.bin`, `val.bin`, `tokenizer.json` and `meta.json` into the folder `out`.

    The tokenizer is trained on the training split only. The text is read in chunks, two to four times: to find its
    characters, to learn subwords or words, to encode it, and for its SHA-256.

    Raises:
        UserError: the corpus is missing, empty, not UTF-8 or consists of one distinct character; its validation split
            contains characters that the tokenizer cannot encode; the vocabulary is too small; no source has the ranks.
    """
    prepare_output(out / "meta.json")
    text = _open_corpus(corpus, params.train_fraction)
    pretrained = params.init_file("tokenize", "copy tokenizer.json from data/tokens, which this stage overwrites")
    tokenizer = tokenizer_from_json(read_json(pretrained)) if pretrained else _train_tokenizer(params, text)
    train, val = text.splits(SMALL_CHUNK_CHARACTERS if tokenizer.kind == "char" else CHUNK_CHARACTERS)
    dtype: Literal["<u2", "<u4"] = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    meta = Meta(
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype,
        train_tokens=_write_tokens(tokenizer, train, out / "train.bin", dtype),
        val_tokens=_write_tokens(tokenizer, val, out / "val.bin", dtype),
        train_characters=text.train_characters,
        val_characters=text.characters - text.train_characters,
        corpus_sha256=sha256_file(corpus),
    )
    write_json(out / "tokenizer.json", tokenizer.to_json())
    write_json(out / "meta.json", meta.model_dump())
    return meta


def _open_corpus(path: Path, train_fraction: float) -> Corpus:
    """Count the characters, find the distinct ones and compute where the validation split starts."""
    characters, first = 0, dict[str, int]()
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)  # by code point
    for chunk in _read_chunks(path, SMALL_CHUNK_CHARACTERS):
        points = code_points(chunk)
        if not seen.take(points, mode="clip").all():  # rare: the loop over characters is a hundred times slower
            for index, character in enumerate(chunk, characters):
                first.setdefault(character, index)
            seen[points] = True
        characters += len(chunk)
    if "\r" in first:
        report(f"{path} has carriage returns, which the model learns; to remove them: sed -i 's/\\r$//' FILE")
    if characters == 0:
        raise UserError(f"{path}: expected a training text, found an empty file; put a text there")
    train_characters = int(characters * train_fraction)
    if not 0 < train_characters < characters:
        raise UserError(
            f"tokenize.train_fraction: expected two splits that are not empty, found {train_fraction} of "
            f"{characters:,} characters; use a longer text"
        )
    return Corpus(path, characters, train_characters, first)


def _train_tokenizer(params: TokenizeParams, corpus: Corpus) -> Tokenizer:
    """Train the tokenizer on the training split, and check that it can encode the validation split."""
    alphabet = corpus.alphabet()
    if len(alphabet) == 1:
        raise UserError(
            f"{corpus.path}: expected at least two different characters in the training split, found "
            f"{alphabet!r} {corpus.train_characters:,} times; use another text"
        )
    train, _ = corpus.splits(CHUNK_CHARACTERS)
    if params.kind == "bpe":
        return BpeTokenizer.train(train, params.vocab_size)
    if params.kind == "tiktoken":
        ranks = io.BytesIO()
        fetch_first("tokenize.ranks", params.ranks, params.ranks_sha256, ranks)
        return TiktokenTokenizer.from_tiktoken(ranks.getvalue())
    if unknown := corpus.first.keys() - set(alphabet):
        raise UserError(
            f"{corpus.path}: expected only the {len(alphabet)} characters of the training split in the "
            f"validation split, found {format_characters(unknown)}; the model cannot be scored on characters it never "
            f"saw: change tokenize.train_fraction (now {params.train_fraction}), set tokenize.kind to bpe, which "
            "encodes any text, or remove them"
        )
    if params.kind == "word":
        return WordTokenizer.train(train, alphabet, params.vocab_size)
    if params.kind == "wordpiece":
        return WordPieceTokenizer.train(train, alphabet, params.vocab_size)
    return CharTokenizer(alphabet)


def _read_chunks(path: Path, size: int, boundary: int = 0) -> Iterator[str]:
    """Read a UTF-8 file in chunks of `size` characters, without newline conversion; one is split at `boundary`.

    A byte order mark is no part of the text.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: expected a text file, found: {error.strerror}; run the download stage") from None
    position = 0
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n") as text:
        try:
            while chunk := text.read(size):
                middle = max(boundary - position, 0)
                yield from filter(None, (chunk[:middle], chunk[middle:]))
                position += len(chunk)
        except UnicodeDecodeError as error:
            byte = file.tell() - len(error.object) + error.start  # in the file; error.start is in what was read
            raise UserError(
                f"{path}: expected UTF-8, found {error.reason} at byte {byte:,} ({error.object[error.start]:#04x}); "
                "convert it, for example with iconv -t utf-8"
            ) from None


def _up_to(characters: int, chunks: Iterator[str]) -> Iterator[str]:
    """The chunks that contain the first characters."""
    while characters > 0 and (chunk := next(chunks, "")):
        yield chunk
        characters -= len(chunk)


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
        for tokens in tokenizer.encode_chunks(chunks):
            file.write(tokens.astype(dtype).tobytes())
            count += len(tokens)
    return count
