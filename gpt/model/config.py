"""The model configuration: the section `model` of the params file."""

from typing import Literal

from pydantic import Field, model_validator

from gpt.core.params import Section

MAX_SIZE = 1 << 16  # of a dimension; larger tables and caches would not fit into memory


class ModelConfig(Section):
    """The section `model`; the baselines ignore the keys that do not apply to them."""

    kind: Literal["bigram", "average", "head", "gpt"]
    n_layer: int = Field(ge=1, le=1000)
    n_head: int = Field(ge=1, le=MAX_SIZE)
    n_embd: int = Field(ge=1, le=MAX_SIZE)
    block_size: int = Field(ge=1, le=MAX_SIZE)
    position: Literal["learned", "sinusoidal", "relative", "rotary", "alibi", "none"]
    ngram: int = Field(ge=1, le=6)
    ngram_rows: int = Field(ge=1, le=1 << 31)
    ngram_width: int = Field(ge=1, le=MAX_SIZE)
    ngram_dropout: float = Field(ge=0, lt=1)
    norm: Literal["layer", "rms"]
    qk_norm: bool
    activation: Literal["relu", "gelu", "relu2", "swiglu"]
    bias: bool
    tie_embeddings: bool
    dropout: float = Field(ge=0, lt=1)

    @property
    def head_size(self) -> int:
        """Number of channels of an attention head."""
        return self.n_embd // self.n_head

    @model_validator(mode="after")
    def _check_widths(self) -> "ModelConfig":
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd: expected a multiple of n_head ({self.n_head}), found {self.n_embd}; change one of the two"
            )
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError(
                f"n_embd: expected an even number of channels per head for position rotary, found "
                f"{self.head_size}; change n_embd or n_head"
            )
        if self.position == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"n_embd: expected an even number for position sinusoidal, found {self.n_embd}; change it")
        return self
