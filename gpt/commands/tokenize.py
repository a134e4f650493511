"""Tokenize a text: split it, train the tokenizer on the training split, and write the token files."""

from pathlib import Path
from typing import Annotated

import typer

from gpt.core.cli import LOG_FILE, Changes, LogFile, ParamsFile, logging_to, report
from gpt.core.params import read_section
from gpt.data.prepare import TokenizeParams, tokenize


def command(
    params: ParamsFile,
    corpus: Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text to tokenize.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Output folder for the token files.")],
    changes: Changes = [],  # noqa: B006 (Typer copies it)
    log_file: LogFile = LOG_FILE,
) -> None:
    """Read the section, tokenize, report the sizes."""
    with logging_to(log_file, "tokenize"):
        meta = tokenize(params=read_section(params, "tokenize", TokenizeParams, changes), corpus=corpus, out=out)
        length = (meta.train_characters + meta.val_characters) / (meta.train_tokens + meta.val_tokens)
        report(
            f"vocabulary of {meta.vocab_size:,} tokens; {meta.train_tokens:,} training tokens, {meta.val_tokens:,} "
            f"validation tokens, {length:.2f} characters per token -> {out}"
        )
