"""The Python API: load a checkpoint, generate and score text. See docs/api.md."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict, Unpack

import torch

from gpt.core.errors import UserError
from gpt.core.params import check_section
from gpt.data.dataset import consecutive_windows
from gpt.data.loss import token_losses
from gpt.generation.text import GenerateParams, generate_texts
from gpt.model.checkpoint import Checkpoint, load_checkpoint
from gpt.model.config import ModelConfig
from gpt.model.gpt import LanguageModel
from gpt.tokenizers.base import Tokenizer

__all__ = ["LoadedModel", "Sampling", "UserError", "load"]

WINDOWS_PER_BATCH = 16


class Sampling(TypedDict, total=False):
    """Sampling settings; defaults and bounds are those of `gpt generate`."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    stop: list[str]
    seed: int


def load(path: str | os.PathLike[str]) -> "LoadedModel":
    """Load a checkpoint.

    Raises:
        UserError: the file is missing, damaged or not a checkpoint.
    """
    return LoadedModel(load_checkpoint(Path(path)))


@dataclass(frozen=True)
class LoadedModel:
    """A trained model with its tokenizer, on the CPU."""

    checkpoint: Checkpoint

    @property
    def config(self) -> ModelConfig:
        """The section `model` that it was trained with."""
        return self.checkpoint.model

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it was trained with."""
        return self.checkpoint.tokenizer

    @cached_property
    def module(self) -> LanguageModel:
        """The PyTorch module, in evaluation mode."""
        return self.checkpoint.build()

    def generate(self, prompt: str = "", **sampling: Unpack[Sampling]) -> str:
        """Return the prompt and its continuation: the text that `gpt generate` prints with the same settings.

        Raises:
            UserError: a setting is out of bounds, or the tokenizer cannot encode the prompt.
        """
        return "".join(self.stream(prompt, **sampling))

    def stream(self, prompt: str = "", **sampling: Unpack[Sampling]) -> Iterator[str]:
        """Yield what `generate` returns in chunks as they are generated; the first chunk is the prompt.

        Raises:
            UserError: as `generate`.
        """
        settings = {**GenerateParams().model_dump(), **sampling, "prompts": [prompt]}
        params = check_section(Path("gpt.generate"), "generate", GenerateParams, {"generate": settings})
        _, _, chunks = next(generate_texts(self.checkpoint, params))
        yield prompt
        yield from chunks

    def loss(self, text: str) -> float:
        """Return the mean cross-entropy loss of the text in nats per token.

        The text is split into consecutive windows of `config.block_size` tokens. Each token but the first is predicted
        once, from the tokens before it in its window.

        Raises:
            UserError: the text has fewer than two tokens, or the tokenizer cannot encode it.
        """
        tokens = torch.tensor([int(token) for token in self.tokenizer.encode(text)])
        if len(tokens) < 2:
            raise UserError(f"text: expected at least 2 tokens, found {len(tokens)}; give a longer text")
        batches = consecutive_windows(tokens, block_size=self.config.block_size, batch_size=WINDOWS_PER_BATCH)
        losses = token_losses(self.module, batches, torch.device("cpu"))
        return float(torch.cat([loss_BT.flatten() for loss_BT in losses]).mean())
