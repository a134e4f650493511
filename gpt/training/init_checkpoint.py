"""Fine-tuning: weights that were trained before, as the first ones of another training."""

from pathlib import Path

from gpt.core.errors import UserError
from gpt.model.checkpoint import Checkpoint, load_checkpoint
from gpt.model.config import ModelConfig
from gpt.tokenizers.base import Tokenizer

NO_MATTER = {"dropout"}  # keys of the model that change no weight's shape or meaning


def load_init_checkpoint(path: Path, params: ModelConfig, tokenizer: Tokenizer) -> Checkpoint:
    """Read the model to continue from, which must be one that these params and this tokenizer describe.

    Raises:
        UserError: the file is none, or of another architecture (every differing key is named) or another tokenizer.
    """
    found = load_checkpoint(path)
    wanted, has = params.model_dump(), found.model.model_dump()
    difference = [
        f"{key} {has[key]!r} instead of {wanted[key]!r}"
        for key in wanted
        if key not in NO_MATTER and has[key] != wanted[key]
    ]
    if difference:
        raise UserError(
            f"train.init_from: expected a model of the same architecture, found in {path}: {'; '.join(difference)}; "
            "set the section model to its values"
        )
    if found.tokenizer != tokenizer:
        raise UserError(
            f"train.init_from: expected the tokenizer of {path} ({found.tokenizer.vocab_size:,} symbols), found tokens "
            f"of another one ({tokenizer.vocab_size:,}); tokenize the text with that model's: set tokenize.init_from"
        )
    return found
