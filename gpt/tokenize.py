"""Cut a text into tokens: training and validation split, the tokenizer, and a summary of them."""

import codecs
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import Field

from gpt.command import LOG_FILE, Changes, LogFile, ParamsFile, logging_to, say
from gpt.errors import UserError
from gpt.files import atomic_write, prepare_output, write_json
from gpt.params import Section, read_section
from gpt.token_files import Meta, token_dtype
from gpt.tokenizer import CharTokenizer

PIECE_BYTES = 1 << 20


class TokenizeParams(Section):
    """The section `tokenize`."""

    kind: Literal["char"]
    train_fraction: float = Field(gt=0, lt=1)


def tokenize(*, params: TokenizeParams, corpus: Path, out: Path) -> Meta:
    """Write `train.bin`, `val.bin`, `tokenizer.json` and `meta.json` into the folder `out`.

    The text passes through memory in pieces, twice: once for the vocabulary, once for the tokens.

    Raises:
        UserError: the corpus is missing, empty, not UTF-8, or made of one symbol only.
    """
    prepare_output(out / "meta.json")
    tokenizer, characters, corpus_sha256 = _survey(corpus)
    train_characters = int(characters * params.train_fraction)
    if not 0 < train_characters < characters:
        raise UserError(
            f"tokenize.train_fraction: expected a part of {characters:,} characters on both sides, found "
            f"{params.train_fraction}, which leaves one side empty; choose a longer text"
        )
    meta = Meta(
        kind=params.kind,
        vocab_size=tokenizer.vocab_size,
        dtype=token_dtype(tokenizer.vocab_size),
        train_tokens=train_characters,
        val_tokens=characters - train_characters,
        train_characters=train_characters,
        val_characters=characters - train_characters,
        corpus_sha256=corpus_sha256,
    )
    _write_splits(tokenizer, _pieces(corpus, hashlib.sha256()), out, meta)
    write_json(out / "tokenizer.json", tokenizer.to_json())
    write_json(out / "meta.json", meta.model_dump())
    return meta


def command(
    params: ParamsFile,
    corpus: Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text to cut into tokens.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for the token files.")],
    changes: Changes = [],  # noqa: B006 (Typer copies it)
    log_file: LogFile = LOG_FILE,
) -> None:
    """Read the section, cut the text, say what came out."""
    with logging_to(log_file, "tokenize"):
        meta = tokenize(params=read_section(params, "tokenize", TokenizeParams, changes), corpus=corpus, out=out)
        say(
            f"{meta.vocab_size} symbols; {meta.train_tokens:,} tokens to train on, "
            f"{meta.val_tokens:,} to validate on -> {out}"
        )


def _survey(corpus: Path) -> tuple[CharTokenizer, int, str]:
    """Go through the text once: the tokenizer of its vocabulary, its length in characters, its SHA-256."""
    digest = hashlib.sha256()
    characters = 0

    def counted() -> Iterator[str]:
        nonlocal characters
        for piece in _pieces(corpus, digest):
            characters += len(piece)
            yield piece

    tokenizer = CharTokenizer.of_text(counted())
    if characters == 0:
        raise UserError(f"{corpus}: expected a text to learn from, found an empty file; put the text there")
    if tokenizer.vocab_size == 1:
        raise UserError(
            f"{corpus}: expected at least two different characters, found {tokenizer.vocabulary!r} {characters:,} "
            "times; there is nothing to learn in it: choose another text"
        )
    return tokenizer, characters, digest.hexdigest()


def _pieces(corpus: Path, digest: "hashlib._Hash") -> Iterator[str]:
    """The text of a file in pieces, line ends untouched; every byte passes through `digest`."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        file = corpus.open("rb")
    except OSError as error:
        raise UserError(f"{corpus}: expected a text file, found: {error.strerror}; run the download stage") from None
    with file:
        while True:
            data = file.read(PIECE_BYTES)
            digest.update(data)
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


def _write_splits(tokenizer: CharTokenizer, pieces: Iterator[str], out: Path, meta: Meta) -> None:
    """Encode the pieces; the first `meta.train_tokens` go to `train.bin`, the rest to `val.bin`."""
    left = meta.train_tokens
    with atomic_write(out / "train.bin") as train, atomic_write(out / "val.bin") as val:
        for piece in pieces:
            tokens = tokenizer.encode(piece).astype(meta.dtype)
            train.write(tokens[:left].tobytes())
            val.write(tokens[left:].tobytes())
            left -= min(left, len(tokens))
