"""Baselines that lead up to the GPT, and the choice among all models by `model.kind`.

All share training, evaluation, generation and the checkpoint format.
"""

import torch
from torch import Tensor, nn

from gpt.model.attention import SelfAttention
from gpt.model.config import ModelConfig
from gpt.model.gpt import GPT, LanguageModel
from gpt.model.kv_cache import KVCache
from gpt.model.positions import make_position_embedding


class Bigram(LanguageModel):
    """A table with the logits of the next token for each last token (Shannon 1948, section 3)."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__(config, layers=0, heads=1)
        self.table = nn.Embedding(vocab_size, vocab_size)
        self.init_weights()

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:  # noqa: ARG002, D102 (see the base class)
        logits_BTV: Tensor = self.table(tokens_BT)
        return logits_BTV


class Average(LanguageModel):
    """The mean of the embeddings of all tokens so far: attention with equal scores.

    One product with a lower triangular matrix computes the means of all positions.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__(config, layers=1, heads=1)
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        self.output = nn.Linear(config.n_embd, vocab_size, bias=False)
        self.init_weights()

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:  # noqa: D102 (see the base class)
        x_BSC = self.token_embedding(tokens_BT)
        length = tokens_BT.shape[1]
        positions = (
            torch.arange(length, device=self.device) if cache is None else cache.next_tokens(length).positions_BT
        )
        if cache:
            cached_BHSC, _ = cache.update(0, x_BSC[:, None], x_BSC[:, None])
            x_BSC = cached_BHSC.squeeze(1)
        mask = positions[..., None] >= torch.arange(x_BSC.shape[1], device=self.device)
        weights = mask / mask.sum(-1, keepdim=True)
        logits_BTV: Tensor = self.output(weights @ x_BSC)
        return logits_BTV


class SingleHead(LanguageModel):
    """One head of self-attention between embeddings and logits; no residual stream, no feed-forward layer."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__(config, layers=1, heads=1)
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        self.positions = make_position_embedding(config)
        self.attention = SelfAttention(config.model_copy(update={"n_head": 1}), layer=0)
        self.output = nn.Linear(config.n_embd, vocab_size, bias=False)
        self.init_weights()

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:  # noqa: D102 (see the base class)
        x_BTC = self.token_embedding(tokens_BT)
        if self.positions is not None:
            x_BTC = self.positions(x_BTC, cache.next_tokens(tokens_BT.shape[1]).positions_BT if cache else None)
        logits_BTV: Tensor = self.output(self.attention(x_BTC, cache))
        return logits_BTV


MODEL_CLASSES: dict[str, type[Bigram] | type[Average] | type[SingleHead] | type[GPT]] = {
    "bigram": Bigram,
    "average": Average,
    "head": SingleHead,
    "gpt": GPT,
}


def make_model(config: ModelConfig, vocab_size: int) -> LanguageModel:
    """Construct the model of `config.kind` with initial weights."""
    return MODEL_CLASSES[config.kind](config, vocab_size)
