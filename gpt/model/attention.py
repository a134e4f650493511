"""Self-attention: every position asks the earlier ones, and takes from them what answers best.

B sequences, T positions that ask and S that are asked, C channels in H heads of D.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.model.config import ModelConfig
from gpt.model.kv_cache import KVCache
from gpt.model.positions import ADDED_TO_SCORES, APPLIED_TO_QUERIES_AND_KEYS

NORMS: dict[str, Callable[..., Tensor]] = {"layer": F.layer_norm, "rms": F.rms_norm}


@dataclass(frozen=True)
class AttentionInputs:
    """All that attention needs: queries, keys, values; what the scheme of positions adds to the scores; the future.

    `bias` is None where nothing is added. `future` is true where a key comes after the query, (T, S) or (B, 1, T, S);
    None says that query and key of the same number stand at the same place, as in training.
    """

    q_BHTD: Tensor
    k_BHSD: Tensor
    v_BHSD: Tensor
    bias: Tensor | None
    future: Tensor | None


@dataclass(frozen=True)
class AttentionScores:
    """How much each position takes from each earlier one, (B, H, T, S): before the mask, after it, after softmax."""

    raw: Tensor
    masked: Tensor
    weights: Tensor


class SelfAttention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2): every position looks back at earlier ones.

    Each head asks with a query, is found by a key and gives a value; the mask hides what comes later.
    """

    def __init__(self, params: ModelConfig, layer: int) -> None:
        super().__init__()
        width, self.head_size, self.layer = params.n_embd, params.head_size, layer
        self.dropout, self.norm = params.dropout, NORMS[params.norm] if params.qk_norm else None
        self.query, self.key, self.value, self.output = (nn.Linear(width, width, params.bias) for _ in range(4))
        turn, bias = APPLIED_TO_QUERIES_AND_KEYS.get(params.position), ADDED_TO_SCORES.get(params.position)
        self.turn = turn(params) if turn else None
        self.bias = bias(params) if bias else None

    def forward(self, x_BTC: Tensor, cache: KVCache | None = None) -> Tensor:
        """Mix earlier positions into each position, (B, T, C) to (B, T, C)."""
        mixed_BHTD = scaled_dot_product(
            self.attention_inputs(x_BTC, cache), dropout=self.dropout if self.training else 0.0
        )
        mixed_BTC: Tensor = self.output(mixed_BHTD.transpose(1, 2).flatten(2))
        return mixed_BTC

    def attention_inputs(self, x_BTC: Tensor, cache: KVCache | None = None) -> AttentionInputs:
        """Queries, keys and values of each position, and what the scheme of positions makes of them."""
        q_BTHD, k_BTHD, v_BTHD = (
            part(x_BTC).unflatten(-1, (-1, self.head_size)) for part in (self.query, self.key, self.value)
        )
        length = x_BTC.shape[1]
        positions_BT = cache.places(length) if cache else None
        if self.norm:  # so that no score grows without bounds (Henry et al. 2020)
            q_BTHD, k_BTHD = self.norm(q_BTHD, (self.head_size,)), self.norm(k_BTHD, (self.head_size,))
        if self.turn:
            q_BTHD, k_BTHD = self.turn(q_BTHD, positions_BT), self.turn(k_BTHD, positions_BT)
        if cache:
            k_BTHD, v_BTHD = cache.extend(self.layer, k_BTHD, v_BTHD)
        q_BHTD, k_BHSD, v_BHSD = (part_BTHD.transpose(1, 2) for part_BTHD in (q_BTHD, k_BTHD, v_BTHD))
        if q_BHTD.device.type == "cpu":  # where the backward pass takes five times as long in bfloat16
            q_BHTD, k_BHSD, v_BHSD = q_BHTD.float(), k_BHSD.float(), v_BHSD.float()
        if positions_BT is None and not self.bias:
            return AttentionInputs(q_BHTD, k_BHSD, v_BHSD, None, None)
        keys_S = torch.arange(k_BHSD.shape[2], device=x_BTC.device)
        distances = (keys_S if positions_BT is None else positions_BT)[..., None] - keys_S
        future = distances < 0 if positions_BT is None else (distances < 0).unsqueeze(1)
        with torch.autocast("cpu", enabled=False):
            bias = self.bias(q_BHTD, distances) if self.bias else None
        return AttentionInputs(q_BHTD, k_BHSD, v_BHSD, bias, future)


def scaled_dot_product(asked: AttentionInputs, *, dropout: float) -> Tensor:
    """Mix the values by how well query and key agree, (B, H, T, D): `reference_attention` by fast kernels."""
    mask = None if asked.future is None else ~asked.future
    if asked.bias is not None and asked.future is not None:
        mask = asked.bias.masked_fill(asked.future, -torch.inf)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(
            asked.q_BHTD, asked.k_BHSD, asked.v_BHSD, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
        )


def reference_attention(asked: AttentionInputs) -> tuple[Tensor, AttentionScores]:
    """softmax(Q Kᵀ / √D + mask) V, term by term (Vaswani et al. 2017, equation 1), and the scores on the way."""
    raw_BHTS = asked.q_BHTD @ asked.k_BHSD.mT / asked.q_BHTD.shape[-1] ** 0.5
    if asked.bias is not None:
        raw_BHTS = raw_BHTS + asked.bias
    future = asked.future
    if future is None:
        future = torch.ones(raw_BHTS.shape[-2:], dtype=torch.bool, device=raw_BHTS.device).triu(1)
    masked_BHTS = raw_BHTS.masked_fill(future, -torch.inf)
    weights_BHTS = masked_BHTS.softmax(-1)
    return weights_BHTS @ asked.v_BHSD, AttentionScores(raw_BHTS, masked_BHTS, weights_BHTS)
