"""Exported folders: weights in the format safetensors, beside JSON documents."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.core.errors import UserError
from gpt.core.files import atomic_write, canonical_json, write_json
from gpt.model.checkpoint import Checkpoint

WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Export:
    """The content of an exported folder.

    `metadata` is written into the file of the weights. It may have one entry only: the library writes several ones in
    random order. `documents` are values for JSON files, by file name.
    """

    weights: Mapping[str, Tensor]
    metadata: tuple[str, str]
    documents: Mapping[str, Any]

    def save(self, folder: Path) -> list[Path]:
        """Write the files, each atomically, and return their paths; equal contents give equal bytes.

        Raises:
            UserError: the package safetensors is missing, or the folder cannot be written.
        """
        try:
            from safetensors.torch import save  # noqa: PLC0415 (an optional dependency)
        except ModuleNotFoundError:
            raise UserError(
                "expected the package safetensors, found none; install it: pip install 'chargpt[export]'"
            ) from None
        # Copies, because the format has neither strides nor shared memory (of tied embeddings).
        copies = {name: weight.clone(memory_format=torch.contiguous_format) for name, weight in self.weights.items()}
        content = save(copies, dict([self.metadata]))
        with atomic_write(folder / WEIGHTS_FILE) as file:
            file.write(content)
        for name, document in self.documents.items():
            write_json(folder / name, document)
        return [folder / name for name in (WEIGHTS_FILE, *self.documents)]


def safetensors_export(checkpoint: Checkpoint) -> Export:
    """The weights under their own names, the section `model` as config.json, and this project's tokenizer.json.

    The metadata of the weights has, under `about`, the origin of the checkpoint as JSON.
    """
    documents = {"config.json": checkpoint.model.model_dump(), "tokenizer.json": checkpoint.tokenizer.to_json()}
    return Export(checkpoint.weights, ("about", canonical_json(checkpoint.about)), documents)
