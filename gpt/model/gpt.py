"""The model: a decoder-only transformer that predicts the next token at every position.

Shapes are part of the names: B sequences in a batch, T positions in the context, C channels (the width `n_embd`),
V tokens in the vocabulary. Simpler models, the way here step by step, are in `gpt.ladder`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.model.attention import NORMS, SelfAttention
from gpt.model.config import ModelConfig
from gpt.model.kv_cache import KVCache
from gpt.model.positions import ADDED_TO_EMBEDDINGS

MULTIPLIER = 2_654_435_761  # near 2³² over the golden ratio, which scatters consecutive numbers (Knuth 1973, 6.4)

LIMIT = 1 << 62  # of a factor; with a large vocabulary only the last digits of an n-gram's number are kept


class NgramEmbeddings(nn.Module):
    """Vectors for the last 2, 3, … tokens, beside that of the token alone (Roy et al. 2022, N-Grammer).

    They cost a look-up and one product with a small matrix, and save the first layers from finding out which letters
    make a word. Where there are more n-grams than rows in a table, several share a row.
    """

    def __init__(self, longest: int, rows: int, narrow: int, vocab_size: int, width: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.tables = nn.ModuleList(nn.Embedding(min(rows, vocab_size**n), narrow) for n in range(2, longest + 1))
        self.mix = nn.Linear(narrow * len(self.tables), width, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Look up the n-grams that end at each position, (B, T) to (B, T, C); before the first token stands token 0."""
        ngrams_BT, vectors = tokens_BT, []
        for n, table in enumerate(self.tables, start=2):
            assert isinstance(table, nn.Embedding)
            earlier_BT = F.pad(tokens_BT, (n - 1, 0))[:, : tokens_BT.shape[1]]
            ngrams_BT = ngrams_BT + pow(self.vocab_size, n - 1, LIMIT) * earlier_BT
            rows = table.num_embeddings
            vectors.append(table(ngrams_BT if rows == self.vocab_size**n else scattered(ngrams_BT, rows)))
        mixed_BTC: Tensor = self.mix(torch.cat(vectors, dim=-1))
        return mixed_BTC


def scattered(numbers: Tensor, rows: int) -> Tensor:
    """Give each number one of the rows, neighbouring numbers far apart."""
    return (numbers * MULTIPLIER >> 16) % rows


class ReluSquared(torch.autograd.Function):
    """max(0, x)² (So et al. 2021, Primer), whose gradient 2 · max(0, x) needs nothing but what was kept: no mask."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:  # noqa: D102 (torch's own protocol)
        positive = x.relu()
        context.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # noqa: D102
        (positive,) = context.saved_tensors
        doubled: Tensor = gradient * positive
        return doubled.mul_(2)


# Rectified linear (Nair & Hinton 2010), Gaussian error linear (Hendrycks & Gimpel 2016), squared ReLU, and the gate of
# SwiGLU (Shazeer 2020), which is called Swish or SiLU.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "relu2": ReluSquared.apply,
    "swiglu": F.silu,
}


class FeedForward(nn.Module):
    """Two linear maps with an activation between them (Vaswani et al. 2017, section 3.3): each position by itself."""

    def __init__(self, params: ModelConfig) -> None:
        super().__init__()
        gated = params.activation == "swiglu"
        hidden = 8 * params.n_embd // 3 if gated else 4 * params.n_embd  # as many weights with a third matrix
        self.widen = nn.Linear(params.n_embd, hidden, params.bias)
        self.gate = nn.Linear(params.n_embd, hidden, params.bias) if gated else None
        self.activation = ACTIVATIONS[params.activation]
        self.output = nn.Linear(hidden, params.n_embd, params.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Transform each position, (B, T, C) to (B, T, C)."""
        wide = self.widen(x_BTC)
        active = self.activation(self.gate(x_BTC)) * wide if self.gate else self.activation(wide)
        out_BTC: Tensor = self.output(active)
        return out_BTC


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on normalised input and added to the residual stream.

    Normalising before instead of after keeps deep stacks trainable (Radford et al. 2019, section 2.3).
    """

    def __init__(self, params: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(params)
        self.attention = SelfAttention(params, layer)
        self.feed_forward_norm = make_norm(params)
        self.feed_forward = FeedForward(params)
        self.dropout = nn.Dropout(params.dropout)

    def forward(self, x_BTC: Tensor, cache: KVCache | None) -> Tensor:
        """Refine the residual stream, (B, T, C) to (B, T, C)."""
        x_BTC = x_BTC + self.dropout(self.attention(self.attention_norm(x_BTC), cache))
        thought_BTC: Tensor = self.dropout(self.feed_forward(self.feed_forward_norm(x_BTC)))
        return x_BTC + thought_BTC


class LanguageModel(nn.Module):
    """What every model here is: it scores each token of the vocabulary as the next one, at every position."""

    def __init__(self, params: ModelConfig, *, layers: int, heads: int) -> None:
        super().__init__()
        self.params = params
        self._layers, self._heads = layers, heads

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Score every token as the next one at every position, (B, T) to logits (B, T, V); T ≤ block_size.

        Args:
            cache: what was read before these tokens and is not computed again. It holds these as well afterwards, but
                they count only when it is told to `advance`.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def make_cache(self, texts: int) -> KVCache:
        """A cache for a number of texts side by side, of as many tokens each as the model can see."""
        shape = (self._layers, texts, self.params.block_size, self._heads, self.params.n_embd // self._heads)
        return KVCache(shape, self.device)

    def init_weights(self) -> None:
        """Small normal weights, smaller yet where they write into a deep residual stream (GPT-2, section 2.3)."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual_stream = name.endswith("output.weight")
                std = 0.02 / math.sqrt(2 * self._layers) if into_residual_stream else 0.02
                nn.init.normal_(weight, mean=0.0, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)


class GPT(LanguageModel):
    """Embeddings of tokens, a stack of blocks, and a score for each possible next token."""

    def __init__(self, params: ModelConfig, vocab_size: int) -> None:
        super().__init__(params, layers=params.n_layer, heads=params.n_head)
        width = params.n_embd
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.ngram_embeddings = (
            NgramEmbeddings(params.ngram, params.ngram_rows, params.ngram_width, vocab_size, width)
            if params.ngram > 1
            else None
        )
        self.norm_of_sum = NORMS[params.norm]
        positions = ADDED_TO_EMBEDDINGS.get(params.position)
        self.positions = positions(params) if positions else None
        self.dropout = nn.Dropout(params.dropout)
        self.blocks = nn.ModuleList(Block(params, layer) for layer in range(params.n_layer))
        self.norm = make_norm(params)
        self.output = nn.Linear(width, vocab_size, bias=False)
        self.init_weights()
        if params.tie_embeddings:  # one matrix to read tokens and to score them (Press & Wolf 2017)
            self.output.weight = self.token_embedding.weight

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:  # noqa: D102 (as the base class)
        length = tokens_BT.shape[1]
        x_BTC = self.token_embedding(tokens_BT)
        if self.ngram_embeddings is not None:
            context_BT = cache.with_earlier(tokens_BT, self.params.ngram - 1) if cache else tokens_BT
            ngrams_BTC = self.ngram_embeddings(context_BT)[:, -length:]
            x_BTC = self.norm_of_sum(x_BTC + ngrams_BTC, x_BTC.shape[-1:])  # rare and frequent ones weigh the same
        if self.positions is not None:
            x_BTC = self.positions(x_BTC, cache.places(length) if cache else None)
        x_BTC = self.dropout(x_BTC)
        for block in self.blocks:
            x_BTC = block(x_BTC, cache)
        logits_BTV: Tensor = self.output(self.norm(x_BTC))
        return logits_BTV


def make_norm(params: ModelConfig) -> nn.Module:
    """LayerNorm (Ba et al. 2016), or RMSNorm, which leaves the mean alone (Zhang & Sennrich 2019)."""
    if params.norm == "layer":
        return nn.LayerNorm(params.n_embd, bias=params.bias)
    return nn.RMSNorm(params.n_embd)


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy of the tokens that really came next, in nats (float32 whatever the logits are)."""
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction=reduction)


def count_parameters(model: nn.Module) -> int:
    """Number of trained numbers in a model."""
    return sum(weight.numel() for weight in model.parameters())
