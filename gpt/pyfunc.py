"""The loader of the MLflow model: MLflow's flavor `python_function` imports this module. It works without MLflow."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from gpt.api import LoadedModel, load


class TextGenerator:
    """Continues texts with a trained model."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model

    def predict(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> list[str]:
        """Return each prompt with its continuation, as `gpt generate` prints them.

        Args:
            model_input: the prompts, in the first column.
            params: sampling settings; those that are missing or None have the defaults of `gpt generate`.
        """
        sampling: dict[str, Any] = {name: value for name, value in (params or {}).items() if value is not None}
        return [self._model.generate(prompt, **sampling) for prompt in model_input.iloc[:, 0]]


def _load_pyfunc(path: str) -> TextGenerator:
    """Load the model from its checkpoint; the name is MLflow's."""
    return TextGenerator(load(Path(path)))
