"""The model: a decoder-only transformer that predicts the next token at every position.

Shapes are part of the names: B sequences in a batch, T positions in the context, C channels (the width `n_embd`),
V tokens in the vocabulary, H heads, D channels of a head (C = H · D).
"""

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.params import Section


class ModelParams(Section):
    """The section `model`."""

    n_layer: int = Field(ge=1)
    n_head: int = Field(ge=1)
    n_embd: int = Field(ge=1)
    block_size: int = Field(ge=1)
    dropout: float = Field(ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> "ModelParams":
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd: expected a multiple of n_head ({self.n_head}), found {self.n_embd}; change one of the two"
            )
        return self


class SelfAttention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2): every position looks back at earlier ones.

    Each head asks with a query, is found by a key and gives a value; the mask hides what comes later.
    """

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.n_head = params.n_head
        self.dropout = params.dropout
        self.query_key_value = nn.Linear(params.n_embd, 3 * params.n_embd, bias=False)
        self.output = nn.Linear(params.n_embd, params.n_embd, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Mix earlier positions into each position, (B, T, C) to (B, T, C)."""
        B, T, C = x_BTC.shape
        q_BHTD, k_BHTD, v_BHTD = (
            part_BTC.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for part_BTC in self.query_key_value(x_BTC).split(C, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        mixed_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, dropout_p=dropout, is_causal=True)
        mixed_BTC: Tensor = self.output(mixed_BHTD.transpose(1, 2).reshape(B, T, C))
        return mixed_BTC


class FeedForward(nn.Module):
    """Two linear maps with a GELU between them (Vaswani et al. 2017, section 3.3): each position thinks by itself."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.widen = nn.Linear(params.n_embd, 4 * params.n_embd, bias=False)
        self.output = nn.Linear(4 * params.n_embd, params.n_embd, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Transform each position, (B, T, C) to (B, T, C)."""
        out_BTC: Tensor = self.output(F.gelu(self.widen(x_BTC)))
        return out_BTC


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on normalised input and added to the residual stream.

    Normalising before instead of after keeps deep stacks trainable (Radford et al. 2019, section 2.3).
    """

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(params.n_embd, bias=False)
        self.attention = SelfAttention(params)
        self.feed_forward_norm = nn.LayerNorm(params.n_embd, bias=False)
        self.feed_forward = FeedForward(params)
        self.dropout = nn.Dropout(params.dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Refine the residual stream, (B, T, C) to (B, T, C)."""
        x_BTC = x_BTC + self.dropout(self.attention(self.attention_norm(x_BTC)))
        thought_BTC: Tensor = self.dropout(self.feed_forward(self.feed_forward_norm(x_BTC)))
        return x_BTC + thought_BTC


class GPT(nn.Module):
    """Token and position embeddings, a stack of blocks, and a score for each possible next token."""

    def __init__(self, params: ModelParams, vocab_size: int) -> None:
        super().__init__()
        self.params = params
        self.token_embedding = nn.Embedding(vocab_size, params.n_embd)
        self.position_embedding = nn.Embedding(params.block_size, params.n_embd)
        self.dropout = nn.Dropout(params.dropout)
        self.blocks = nn.ModuleList(Block(params) for _ in range(params.n_layer))
        self.norm = nn.LayerNorm(params.n_embd, bias=False)
        self._initialise()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Score every token as the next one at every position, (B, T) to logits (B, T, V); T ≤ block_size."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTC = self.dropout(self.token_embedding(tokens_BT) + self.position_embedding(positions_T))
        for block in self.blocks:
            x_BTC = block(x_BTC)
        # The token embedding is used once more, as the output layer (Press & Wolf 2017).
        return F.linear(self.norm(x_BTC), self.token_embedding.weight)

    def _initialise(self) -> None:
        """Small normal weights, smaller yet where they write into a deep residual stream (GPT-2, section 2.3)."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual_stream = name.endswith("output.weight")
                std = 0.02 / math.sqrt(2 * self.params.n_layer) if into_residual_stream else 0.02
                nn.init.normal_(weight, mean=0.0, std=std)


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy of the tokens that really came next, in nats (float32 whatever the logits are)."""
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction=reduction)


def count_parameters(model: nn.Module) -> int:
    """Number of trained numbers in a model."""
    return sum(weight.numel() for weight in model.parameters())
