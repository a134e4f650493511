"""Causal multi-head self-attention.

Shapes: B sequences, T query positions, S key positions, C channels in H heads of D channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.model.config import ModelConfig
from gpt.model.kv_cache import KVCache
from gpt.model.positions import RotaryPositions, make_attention_bias

NORMS: dict[str, Callable[..., Tensor]] = {"layer": F.layer_norm, "rms": F.rms_norm}


@dataclass(frozen=True)
class AttentionInputs:
    """Inputs of scaled dot-product attention.

    `bias` is added to the scores, None where there is none. `mask` is true where a query may attend to a key, (T, S) or
    (B, 1, T, S); None is the causal mask for queries and keys of the same positions, as in training.
    """

    q_BHTD: Tensor
    k_BHSD: Tensor
    v_BHSD: Tensor
    bias: Tensor | None
    mask: Tensor | None


class AttentionScores(NamedTuple):
    """Attention scores (B, H, T, S) before the mask, after the mask, and after softmax."""

    raw: Tensor
    masked: Tensor
    weights: Tensor


class SelfAttention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2): each position attends to earlier ones."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width, self.head_size, self.layer = config.n_embd, config.head_size, layer
        self.dropout, self.norm = config.dropout, NORMS[config.norm] if config.qk_norm else None
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, config.bias) for _ in range(4))
        self.rotary = RotaryPositions(config) if config.position == "rotary" else None
        self.bias = make_attention_bias(config)

    def forward(self, x_BTC: Tensor, cache: KVCache | None = None) -> Tensor:
        """Mix the values of earlier positions into each position, (B, T, C) to (B, T, C)."""
        inputs = self.attention_inputs(x_BTC, cache)
        mixed_BHTD = scaled_dot_product(inputs, dropout=self.dropout if self.training else 0.0)
        mixed_BTC: Tensor = self.output(mixed_BHTD.transpose(1, 2).flatten(2))
        return mixed_BTC

    def attention_inputs(self, x_BTC: Tensor, cache: KVCache | None = None) -> AttentionInputs:
        """Project to queries, keys and values, and apply the position scheme and the cache."""
        q_BTHD, k_BTHD, v_BTHD = (
            project(x_BTC).unflatten(-1, (-1, self.head_size)) for project in (self.query, self.key, self.value)
        )
        following = cache.next_tokens(x_BTC.shape[1]) if cache else None
        positions_BT = following.positions_BT if following else None
        if self.norm:  # bounds the scores (Henry et al. 2020)
            q_BTHD, k_BTHD = self.norm(q_BTHD, (self.head_size,)), self.norm(k_BTHD, (self.head_size,))
        if self.rotary:
            q_BTHD, k_BTHD = self.rotary(q_BTHD, positions_BT), self.rotary(k_BTHD, positions_BT)
        q_BHTD, k_BHSD, v_BHSD = (x_BTHD.transpose(1, 2) for x_BTHD in (q_BTHD, k_BTHD, v_BTHD))
        if cache:
            k_BHSD, v_BHSD = cache.update(self.layer, k_BHSD, v_BHSD)
        if q_BHTD.device.type == "cpu":  # in bfloat16 the backward pass takes five times as long there
            q_BHTD, k_BHSD, v_BHSD = q_BHTD.float(), k_BHSD.float(), v_BHSD.float()
        if not self.bias:
            mask = following.mask_B1TS if following else None
            return AttentionInputs(q_BHTD, k_BHSD, v_BHSD, bias=None, mask=mask)
        keys_S = torch.arange(k_BHSD.shape[2], device=x_BTC.device)
        distances = (keys_S if positions_BT is None else positions_BT)[..., None] - keys_S
        mask = distances >= 0 if positions_BT is None else (distances >= 0).unsqueeze(1)
        with torch.autocast("cpu", enabled=False):
            bias = self.bias(q_BHTD, distances)
        return AttentionInputs(q_BHTD, k_BHSD, v_BHSD, bias, mask)


def scaled_dot_product(inputs: AttentionInputs, *, dropout: float) -> Tensor:
    """Attention output (B, H, T, D), by torch's fused kernels; the formula is in `reference_attention`."""
    mask = inputs.mask
    if inputs.bias is not None and mask is not None:
        mask = inputs.bias.masked_fill(~mask, -torch.inf)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(
            inputs.q_BHTD, inputs.k_BHSD, inputs.v_BHSD, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
        )


def reference_attention(inputs: AttentionInputs) -> tuple[Tensor, AttentionScores]:
    """softmax(Q Kᵀ / √D + mask) V, step by step (Vaswani et al. 2017, equation 1), with the scores of each step."""
    raw_BHTS = inputs.q_BHTD @ inputs.k_BHSD.mT / inputs.q_BHTD.shape[-1] ** 0.5
    if inputs.bias is not None:
        raw_BHTS = raw_BHTS + inputs.bias
    mask = inputs.mask
    if mask is None:
        mask = torch.ones(raw_BHTS.shape[-2:], dtype=torch.bool, device=raw_BHTS.device).tril()
    masked_BHTS = raw_BHTS.masked_fill(~mask, -torch.inf)
    weights_BHTS = masked_BHTS.softmax(-1)
    return weights_BHTS @ inputs.v_BHSD, AttentionScores(raw_BHTS, masked_BHTS, weights_BHTS)
