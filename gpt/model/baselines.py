"""The ladder up to the GPT: models that see more and more of the text, and the choice among all four.

    bigram   the last token alone: a table of what follows what
    average  all tokens so far, each counting the same
    head     all tokens so far, each counting as much as one head of attention finds it worth
    gpt      many such heads, layer upon layer, with feed-forward nets between them

They share training, evaluation, generation and the checkpoint format.
"""

import torch
from torch import Tensor, nn

from gpt.model.attention import SelfAttention
from gpt.model.config import ModelConfig
from gpt.model.gpt import GPT, LanguageModel
from gpt.model.kv_cache import KVCache
from gpt.model.positions import ADDED_TO_EMBEDDINGS


class Bigram(LanguageModel):
    """A table: for each token a score of every token that may come next (Shannon 1948, section 3)."""

    def __init__(self, params: ModelConfig, vocab_size: int) -> None:
        super().__init__(params, layers=0, heads=1)
        self.table = nn.Embedding(vocab_size, vocab_size)
        self.init_weights()

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:  # noqa: ARG002, D102 (as the base class)
        logits_BTV: Tensor = self.table(tokens_BT)
        return logits_BTV


class Average(LanguageModel):
    """The mean of the vectors of all tokens so far: what attention is when every score is equal.

    One product with a triangle whose rows sum to one takes all the means at once.
    """

    def __init__(self, params: ModelConfig, vocab_size: int) -> None:
        super().__init__(params, layers=1, heads=1)
        self.token_embedding = nn.Embedding(vocab_size, params.n_embd)
        self.output = nn.Linear(params.n_embd, vocab_size, bias=False)
        self.init_weights()

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:  # noqa: D102 (as the base class)
        x_BSC = self.token_embedding(tokens_BT)
        length = tokens_BT.shape[1]
        places = torch.arange(length, device=self.device) if cache is None else cache.places(length)
        if cache:
            kept_BSHC, _ = cache.extend(0, x_BSC[:, :, None], x_BSC[:, :, None])
            x_BSC = kept_BSHC.squeeze(2)
        seen = places[..., None] >= torch.arange(x_BSC.shape[1], device=self.device)
        triangle = seen / seen.sum(-1, keepdim=True)
        logits_BTV: Tensor = self.output(triangle @ x_BSC)
        return logits_BTV


class Head(LanguageModel):
    """One head of self-attention between the embeddings and the scores; no residual stream, no feed-forward net."""

    def __init__(self, params: ModelConfig, vocab_size: int) -> None:
        super().__init__(params, layers=1, heads=1)
        self.token_embedding = nn.Embedding(vocab_size, params.n_embd)
        positions = ADDED_TO_EMBEDDINGS.get(params.position)
        self.positions = positions(params) if positions else None
        self.attention = SelfAttention(params.model_copy(update={"n_head": 1}), layer=0)
        self.output = nn.Linear(params.n_embd, vocab_size, bias=False)
        self.init_weights()

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:  # noqa: D102 (as the base class)
        x_BTC = self.token_embedding(tokens_BT)
        if self.positions is not None:
            x_BTC = self.positions(x_BTC, cache.places(tokens_BT.shape[1]) if cache else None)
        logits_BTV: Tensor = self.output(self.attention(x_BTC, cache))
        return logits_BTV


KINDS: dict[str, type[Bigram] | type[Average] | type[Head] | type[GPT]] = {
    "bigram": Bigram,
    "average": Average,
    "head": Head,
    "gpt": GPT,
}


def make_model(params: ModelConfig, vocab_size: int) -> LanguageModel:
    """The model that the section describes, with its first weights."""
    return KINDS[params.kind](params, vocab_size)
