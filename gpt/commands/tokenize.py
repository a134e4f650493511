"""Cut a text into tokens: training and validation split, the tokenizer, and a summary of them."""

from pathlib import Path
from typing import Annotated

import typer

from gpt.core.cli import LOG_FILE, Changes, LogFile, ParamsFile, logging_to, report
from gpt.core.params import read_section
from gpt.data.prepare import TokenizeParams, tokenize


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
        length = (meta.train_characters + meta.val_characters) / (meta.train_tokens + meta.val_tokens)
        report(
            f"{meta.vocab_size:,} symbols; {meta.train_tokens:,} tokens to train on, "
            f"{meta.val_tokens:,} to validate on, {length:.2f} characters a token -> {out}"
        )
