"""Export a checkpoint for other programs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from gpt.export.huggingface import huggingface_export
from gpt.export.weights import safetensors_export
from gpt.model.checkpoint import load_checkpoint

EXPORTS = {"safetensors": safetensors_export, "huggingface": huggingface_export}


def command(
    checkpoint: Annotated[Path, typer.Option(metavar="FILE", help="Trained model.")],
    target: Annotated[
        Literal["safetensors", "huggingface"],
        typer.Option(
            "--format",
            help="safetensors: weights, with config.json and tokenizer.json of this project; huggingface: a model for "
            "the library transformers, if it has the architecture of GPT-2 or Llama.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Output: the files; existing ones are replaced.")],
) -> None:
    """Convert the checkpoint, then write the files."""
    for path in EXPORTS[target](load_checkpoint(checkpoint)).save(out):
        print(f"-> {path}")
