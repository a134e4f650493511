"""The model: a decoder-only transformer that predicts the next token at every position.

Shapes are part of the names: B sequences in a batch, T positions in the context, C channels (the width `n_embd`),
V tokens in the vocabulary, H heads, D channels of a head (C = H · D).
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.cache import Cache
from gpt.embeddings import NgramEmbeddings
from gpt.params import Section
from gpt.positions import LearnedPositions, RotaryPositions


class ModelParams(Section):
    """The section `model`."""

    n_layer: int = Field(ge=1)
    n_head: int = Field(ge=1)
    n_embd: int = Field(ge=1)
    block_size: int = Field(ge=1)
    position: Literal["learned", "rotary"]
    ngram: int = Field(ge=1, le=6)
    ngram_rows: int = Field(ge=1)
    ngram_width: int = Field(ge=1)
    qk_norm: bool
    activation: Literal["gelu", "relu2"]
    tie_embeddings: bool
    dropout: float = Field(ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> "ModelParams":
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd: expected a multiple of n_head ({self.n_head}), found {self.n_embd}; change one of the two"
            )
        if self.position == "rotary" and self.n_embd // self.n_head % 2:
            raise ValueError(
                f"n_embd: expected an even number of channels a head for position rotary, found "
                f"{self.n_embd // self.n_head}; change n_embd or n_head"
            )
        return self


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


ACTIVATIONS = {"gelu": F.gelu, "relu2": ReluSquared.apply}


class SelfAttention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2): every position looks back at earlier ones.

    Each head asks with a query, is found by a key and gives a value; the mask hides what comes later.
    """

    def __init__(self, params: ModelParams, layer: int) -> None:
        super().__init__()
        width, self.head_size = params.n_embd, params.n_embd // params.n_head
        self.layer = layer
        self.dropout, self.qk_norm = params.dropout, params.qk_norm
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.turn = RotaryPositions(params.block_size, self.head_size) if params.position == "rotary" else None

    def forward(self, x_BTC: Tensor, cache: Cache | None) -> Tensor:
        """Mix earlier positions into each position, (B, T, C) to (B, T, C)."""
        q_BTHD, k_BTHD, v_BTHD = (
            part(x_BTC).unflatten(-1, (-1, self.head_size)) for part in (self.query, self.key, self.value)
        )
        if self.qk_norm:  # so that no score grows without bounds (Henry et al. 2020)
            q_BTHD, k_BTHD = (F.layer_norm(part_BTHD, (self.head_size,)) for part_BTHD in (q_BTHD, k_BTHD))
        if self.turn:
            before = len(cache) - x_BTC.shape[1] if cache else 0
            q_BTHD, k_BTHD = self.turn(q_BTHD, before), self.turn(k_BTHD, before)
        if cache:
            k_BTHD, v_BTHD = cache.extend(self.layer, k_BTHD, v_BTHD)
        mixed_BTHD = attend(q_BTHD, k_BTHD, v_BTHD, dropout=self.dropout if self.training else 0.0)
        mixed_BTC: Tensor = self.output(mixed_BTHD.flatten(2))
        return mixed_BTC


def attend(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, *, dropout: float) -> Tensor:
    """The values of earlier positions and of each position itself, weighted by how well key and query agree.

    A single query is that of the last position, which may look at all of them.
    """
    alone = q_BTHD.shape[1] == 1
    assert alone or q_BTHD.shape == k_BTHD.shape
    q_BHTD, k_BHTD, v_BHTD = (part_BTHD.transpose(1, 2) for part_BTHD in (q_BTHD, k_BTHD, v_BTHD))
    if q_BTHD.device.type == "cpu":  # where the backward pass takes five times as long in bfloat16
        q_BHTD, k_BHTD, v_BHTD = q_BHTD.float(), k_BHTD.float(), v_BHTD.float()
    with torch.autocast("cpu", enabled=False):
        mixed_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, dropout_p=dropout, is_causal=not alone)
    return mixed_BHTD.transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear maps with an activation between them (Vaswani et al. 2017, section 3.3): each position by itself."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.widen = nn.Linear(params.n_embd, 4 * params.n_embd, bias=False)
        self.activation = ACTIVATIONS[params.activation]
        self.output = nn.Linear(4 * params.n_embd, params.n_embd, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Transform each position, (B, T, C) to (B, T, C)."""
        out_BTC: Tensor = self.output(self.activation(self.widen(x_BTC)))
        return out_BTC


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on normalised input and added to the residual stream.

    Normalising before instead of after keeps deep stacks trainable (Radford et al. 2019, section 2.3).
    """

    def __init__(self, params: ModelParams, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(params.n_embd, bias=False)
        self.attention = SelfAttention(params, layer)
        self.feed_forward_norm = nn.LayerNorm(params.n_embd, bias=False)
        self.feed_forward = FeedForward(params)
        self.dropout = nn.Dropout(params.dropout)

    def forward(self, x_BTC: Tensor, cache: Cache | None) -> Tensor:
        """Refine the residual stream, (B, T, C) to (B, T, C)."""
        x_BTC = x_BTC + self.dropout(self.attention(self.attention_norm(x_BTC), cache))
        thought_BTC: Tensor = self.dropout(self.feed_forward(self.feed_forward_norm(x_BTC)))
        return x_BTC + thought_BTC


class GPT(nn.Module):
    """Embeddings of tokens, a stack of blocks, and a score for each possible next token."""

    def __init__(self, params: ModelParams, vocab_size: int) -> None:
        super().__init__()
        self.params = params
        width = params.n_embd
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.ngram_embeddings = (
            NgramEmbeddings(params.ngram, params.ngram_rows, params.ngram_width, vocab_size, width)
            if params.ngram > 1
            else None
        )
        learned = params.position == "learned"
        self.positions = LearnedPositions(params.block_size, width) if learned else None
        self.dropout = nn.Dropout(params.dropout)
        self.blocks = nn.ModuleList(Block(params, layer) for layer in range(params.n_layer))
        self.norm = nn.LayerNorm(width, bias=False)
        self.output = nn.Linear(width, vocab_size, bias=False)
        self._initialise()
        if params.tie_embeddings:  # one matrix to read tokens and to score them (Press & Wolf 2017)
            self.output.weight = self.token_embedding.weight

    def forward(self, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """Score every token as the next one at every position, (B, T) to logits (B, T, V); T ≤ block_size.

        Args:
            cache: what was read before these tokens and is not computed again; empty, or they are one token a text.
        """
        length = tokens_BT.shape[1]
        before = len(cache) if cache else 0
        context_BT = cache.read(tokens_BT) if cache else tokens_BT
        x_BTC = self.token_embedding(tokens_BT)
        if self.ngram_embeddings is not None:
            ngrams_BTC = self.ngram_embeddings(context_BT[:, -length - self.params.ngram + 1 :])[:, -length:]
            x_BTC = F.layer_norm(x_BTC + ngrams_BTC, x_BTC.shape[-1:])  # rare and frequent n-grams weigh the same
        if self.positions is not None:
            x_BTC = self.positions(x_BTC, before)
        x_BTC = self.dropout(x_BTC)
        for block in self.blocks:
            x_BTC = block(x_BTC, cache)
        logits_BTV: Tensor = self.output(self.norm(x_BTC))
        return logits_BTV

    def _initialise(self) -> None:
        """Small normal weights, smaller yet where they write into a deep residual stream (GPT-2, section 2.3)."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_residual_stream = name.endswith("output.weight")
                std = 0.02 / math.sqrt(2 * self.params.n_layer) if into_residual_stream else 0.02
                nn.init.normal_(weight, mean=0.0, std=std)


def empty_cache(params: ModelParams, texts: int, device: torch.device) -> Cache:
    """A cache for a number of texts side by side, of as many tokens as the model can see."""
    head_size = params.n_embd // params.n_head
    return Cache((params.n_layer, texts, params.block_size, params.n_head, head_size), device)


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy of the tokens that really came next, in nats (float32 whatever the logits are)."""
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction=reduction)


def count_parameters(model: nn.Module) -> int:
    """Number of trained numbers in a model."""
    return sum(weight.numel() for weight in model.parameters())
