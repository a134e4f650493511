"""The GPT: a decoder-only transformer that predicts the next token at every position.

Names of tensors end with their shape: B sequences of a batch, T positions, C channels (`n_embd`), V tokens of the
vocabulary. Attention, position schemes and the key-value cache have a module each; simpler models are in `baselines`.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.model.attention import NORMS, SelfAttention
from gpt.model.config import ModelConfig
from gpt.model.kv_cache import KVCache
from gpt.model.positions import make_position_embedding

HASH_MULTIPLIER = 2_654_435_761  # near 2³² / golden ratio: spreads consecutive numbers evenly (Knuth 1973, 6.4)
MAX_FACTOR = 1 << 62  # powers of the vocabulary size are taken modulo this number, to stay within 64 bits


class NgramEmbeddings(nn.Module):
    """Embeddings of the last 2, 3, … `ngram` tokens, in addition to that of the last one (Roy et al. 2022, N-Grammer).

    They cost a table look-up and a product with a small matrix. If there are more n-grams than rows in a table, several
    n-grams share a row.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.tables = nn.ModuleList(
            nn.Embedding(min(config.ngram_rows, vocab_size**n), config.ngram_width) for n in range(2, config.ngram + 1)
        )
        self.dropout = nn.Dropout1d(config.ngram_dropout)  # of whole embeddings
        self.mix = nn.Linear(config.ngram_width * len(self.tables), config.n_embd, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Embed the n-grams that end at each position, (B, T) to (B, T, C); missing earlier tokens count as token 0."""
        embeddings = [table(rows_BT) for table, rows_BT in zip(self.tables, self.rows(tokens_BT), strict=True)]
        by_length = self.dropout(torch.stack(embeddings, dim=-2).flatten(0, 1))
        mixed_BTC: Tensor = self.mix(by_length.view(*tokens_BT.shape, -1))
        return mixed_BTC

    def rows(self, tokens_BT: Tensor) -> Iterator[Tensor]:
        """The rows of the tables for n = 2, 3, … that are looked up, (B, T) each."""
        ngrams_BT = tokens_BT
        for n, table in enumerate(self.tables, start=2):
            assert isinstance(table, nn.Embedding)
            earlier_BT = F.pad(tokens_BT, (n - 1, 0))[:, : tokens_BT.shape[1]]
            ngrams_BT = ngrams_BT + pow(self.vocab_size, n - 1, MAX_FACTOR) * earlier_BT
            rows = table.num_embeddings
            yield ngrams_BT if rows == self.vocab_size**n else hash_ngrams(ngrams_BT, rows)


def hash_ngrams(ngrams: Tensor, rows: int) -> Tensor:
    """Map n-gram numbers to table rows, spread evenly."""
    return (ngrams * HASH_MULTIPLIER >> 16) % rows


class ReluSquared(torch.autograd.Function):
    """max(0, x)² (So et al. 2021, Primer). Faster than autograd: the gradient 2 · max(0, x) needs no mask."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:  # noqa: D102 (defined by torch)
        positive = x.relu()
        context.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # noqa: D102
        (positive,) = context.saved_tensors
        product: Tensor = gradient * positive
        return product.mul_(2)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,  # Nair & Hinton 2010
    "gelu": F.gelu,  # Hendrycks & Gimpel 2016
    "relu2": ReluSquared.apply,
    "swiglu": F.silu,  # of the gate (Shazeer 2020)
}


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, applied to each position (Vaswani et al. 2017, section 3.3).

    SwiGLU has a third matrix, the gate, and fewer hidden channels, so that the number of weights is the same.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        gated = config.activation == "swiglu"
        hidden = 8 * config.n_embd // 3 if gated else 4 * config.n_embd
        self.widen = nn.Linear(config.n_embd, hidden, config.bias)
        self.gate = nn.Linear(config.n_embd, hidden, config.bias) if gated else None
        self.activation = ACTIVATIONS[config.activation]
        self.output = nn.Linear(hidden, config.n_embd, config.bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Transform each position, (B, T, C) to (B, T, C)."""
        hidden = self.widen(x_BTC)
        hidden = self.activation(self.gate(x_BTC)) * hidden if self.gate else self.activation(hidden)
        out_BTC: Tensor = self.output(hidden)
        return out_BTC


def make_norm(config: ModelConfig) -> nn.Module:
    """LayerNorm (Ba et al. 2016), or RMSNorm, which does not subtract the mean (Zhang & Sennrich 2019)."""
    if config.norm == "layer":
        return nn.LayerNorm(config.n_embd, bias=config.bias)
    return nn.RMSNorm(config.n_embd)


class Block(nn.Module):
    """A transformer layer: attention, then feed-forward, each added to the residual stream.

    Pre-norm: both get normalized input, which keeps deep models trainable (Radford et al. 2019, section 2.3).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = SelfAttention(config, layer)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTC: Tensor, cache: KVCache | None) -> Tensor:
        """Update the residual stream, (B, T, C) to (B, T, C)."""
        x_BTC = x_BTC + self.dropout(self.attention(self.attention_norm(x_BTC), cache))
        update_BTC: Tensor = self.dropout(self.feed_forward(self.feed_forward_norm(x_BTC)))
        return x_BTC + update_BTC


class LanguageModel(nn.Module):
    """Base class of the GPT and the baselines."""

    def __init__(self, config: ModelConfig, *, layers: int, heads: int) -> None:
        super().__init__()
        self.config = config
        self._layers, self._heads = layers, heads

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Score every token of the vocabulary as the next one, (B, T) to logits (B, T, V); T ≤ block_size.

        Args:
            cache: holds the tokens before these, which are not computed again. The new keys and values are written to
                it; the caller then calls `cache.advance`.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def make_cache(self, batch_size: int) -> KVCache:
        """An empty cache of `block_size` tokens for each sequence."""
        shape = (self._layers, batch_size, self._heads, self.config.block_size, self.config.n_embd // self._heads)
        return KVCache.empty(shape, self.device)

    def init_weights(self) -> None:
        """Normal weights with deviation 0.02, scaled down where added to the residual stream (GPT-2, section 2.3)."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                added_to_residual = name.endswith("output.weight")
                std = 0.02 / math.sqrt(2 * self._layers) if added_to_residual else 0.02
                nn.init.normal_(weight, mean=0.0, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)


class GPT(LanguageModel):
    """Token, n-gram and position embeddings, a stack of blocks, and a linear layer to the logits."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__(config, layers=config.n_layer, heads=config.n_head)
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        self.ngram_embeddings = NgramEmbeddings(config, vocab_size) if config.ngram > 1 else None
        self.embedding_norm = NORMS[config.norm]
        self.positions = make_position_embedding(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        self.output = nn.Linear(config.n_embd, vocab_size, bias=False)
        self.init_weights()
        if config.tie_embeddings:  # one matrix for embedding and output (Press & Wolf 2017)
            self.output.weight = self.token_embedding.weight

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:  # noqa: D102 (see the base class)
        length = tokens_BT.shape[1]
        x_BTC = self.token_embedding(tokens_BT)
        if self.ngram_embeddings is not None:
            context_BT = cache.append_tokens(tokens_BT, self.config.ngram - 1) if cache else tokens_BT
            ngrams_BTC = self.ngram_embeddings(context_BT)[:, -length:]
            # The norm gives rare and frequent n-grams the same scale.
            x_BTC = self.embedding_norm(x_BTC + ngrams_BTC, x_BTC.shape[-1:])
        if self.positions is not None:
            x_BTC = self.positions(x_BTC, cache.next_tokens(length).positions_BT if cache else None)
        x_BTC = self.dropout(x_BTC)
        for block in self.blocks:
            x_BTC = block(x_BTC, cache)
        logits_BTV: Tensor = self.output(self.norm(x_BTC))
        return logits_BTV


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy of the target tokens in nats, computed in float32."""
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction=reduction)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values of a model."""
    return sum(weight.numel() for weight in model.parameters())
