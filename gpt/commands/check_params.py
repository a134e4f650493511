"""Check all sections of a params file, so that an error in the last one is found before training."""

from pathlib import Path
from typing import Annotated

import typer

from gpt.core.cli import Changes
from gpt.core.errors import UserError
from gpt.core.params import Section, check_section, read_params, suggestion
from gpt.data.prepare import TokenizeParams
from gpt.download.sources import DownloadParams
from gpt.evaluation.evaluator import EvaluateParams
from gpt.generation.text import GenerateParams
from gpt.launch import LaunchParams
from gpt.model.config import ModelConfig
from gpt.training.trainer import TrainParams

SECTIONS: dict[str, type[Section]] = {
    "download": DownloadParams,
    "tokenize": TokenizeParams,
    "model": ModelConfig,
    "train": TrainParams,
    "evaluate": EvaluateParams,
    "generate": GenerateParams,
    "launch": LaunchParams,
}


def command(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Params file to check.")] = Path("params.yaml"),
    changes: Changes = [],  # noqa: B006 (Typer copies it)
) -> None:
    """Check the file and print the result; the first problem is a UserError."""
    params = read_params(path, changes)
    for name in params:
        if name not in SECTIONS:
            raise UserError(f"{path}: {name}: unknown section{suggestion(name, SECTIONS)}")
    for name, section in SECTIONS.items():
        check_section(path, name, section, params)
    print(f"{path}: all {len(SECTIONS)} sections are valid")
