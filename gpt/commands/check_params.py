"""Check a whole params file, so that a typo in the last section does not surface after training."""

from pathlib import Path
from typing import Annotated

import typer

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


def check_params(path: Path) -> dict[str, Section]:
    """Read every section of a params file strictly.

    Raises:
        UserError: the first thing in the file that is not as it should be.
    """
    params = read_params(path)
    for name in params:
        if name not in SECTIONS:
            raise UserError(f"{path}: {name}: unknown section{suggestion(name, SECTIONS)}")
    return {name: check_section(path, name, section, params) for name, section in SECTIONS.items()}


def command(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Params file to check.")] = Path("params.yaml"),
) -> None:
    """Check and say so."""
    check_params(path)
    print(f"{path}: all {len(SECTIONS)} sections are valid")
