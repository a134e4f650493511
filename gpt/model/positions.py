"""Position schemes: how the model knows the order of its tokens. Attention alone treats them as a set.

Positions are counted from 0. They are passed as (B, T) where the sequences of a batch are at different positions, and
as None where every sequence starts at 0. Shapes: T queries, S keys, C channels in H heads of D channels, E = D / 2.
What each scheme costs, and what it does past `block_size`: docs/model.md.
"""

import torch
from torch import Tensor, nn

from gpt.model.config import ModelConfig

BASE = 10_000  # wavelengths range from 2π to 2π · BASE positions, as in both papers
REACH = 32  # distances from here on share one vector; the paper found no gain above 16 words


class LearnedPositions(nn.Module):
    """A trained vector for each position, added to the embedding (Vaswani et al. 2017, section 3.5; GPT-2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.block_size, config.n_embd)

    def forward(self, x_BTC: Tensor, positions_BT: Tensor | None) -> Tensor:
        """Add the position vectors, (B, T, C)."""
        return x_BTC + _at_positions(self.table.weight, x_BTC.shape[1], positions_BT)


class SinusoidalPositions(nn.Module):
    """Sines and cosines of increasing wavelengths, added to the embedding (Vaswani et al. 2017, section 3.5)."""

    table: Tensor  # (T, C)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        angles_TE = _angles(config.block_size, config.n_embd)
        waves_TC = torch.stack([angles_TE.sin(), angles_TE.cos()], dim=-1).flatten(1)
        scale = 1 if config.ngram > 1 else 0.02  # that of the embeddings: normalized with n-grams, else as initialized
        self.register_buffer("table", (scale * waves_TC).float(), persistent=False)

    def forward(self, x_BTC: Tensor, positions_BT: Tensor | None) -> Tensor:
        """Add the position vectors, (B, T, C)."""
        return x_BTC + _at_positions(self.table, x_BTC.shape[1], positions_BT)


class RotaryPositions(nn.Module):
    """Rotates queries and keys by angles proportional to their position (RoPE; Su et al. 2021, section 3.2).

    The score then depends on the distance between query and key only.
    """

    rotations: Tensor  # (T, E), complex

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        angles_TE = _angles(config.block_size, config.head_size)
        rotations_TE = torch.polar(torch.ones_like(angles_TE), angles_TE).to(torch.complex64)
        self.register_buffer("rotations", rotations_TE, persistent=False)

    def forward(self, x_BTHD: Tensor, positions_BT: Tensor | None) -> Tensor:
        """Rotate each pair of neighbouring channels, (B, T, H, D).

        A pair is treated as one complex number: the fastest way in torch.
        """
        pairs_BTHE = torch.view_as_complex(x_BTHD.float().view(*x_BTHD.shape[:-1], -1, 2))
        rotations_TE = _at_positions(self.rotations, x_BTHD.shape[1], positions_BT)
        return torch.view_as_real(pairs_BTHE * rotations_TE.unsqueeze(-2)).flatten(-2)


class RelativePositions(nn.Module):
    """A trained vector for each distance, added to the key (Shaw et al. 2018, section 3.2).

    Computed as a bias of the scores: q · (k + r) = q · k + q · r. All heads share the vectors, and all distances of at
    least `REACH` share one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(REACH + 1, config.head_size)

    def forward(self, q_BHTD: Tensor, distances: Tensor) -> Tensor:
        """Bias of the scores, (B, H, T, S); `distances` are query minus key position, (T, S) or (B, T, S)."""
        by_distance_BHTR = q_BHTD @ self.table.weight.T * q_BHTD.shape[-1] ** -0.5
        index = distances.clamp(0, REACH)
        bias_BHTS: Tensor = by_distance_BHTR.gather(-1, index.unsqueeze(-3).expand(*q_BHTD.shape[:3], -1))
        return bias_BHTS


class AlibiPositions(nn.Module):
    """A penalty on the scores, linear in the distance, with a slope for each head (Press et al. 2022, section 3)."""

    slopes: Tensor  # (H, 1, 1)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads_H = torch.arange(1, config.n_head + 1, dtype=torch.float32)
        self.register_buffer("slopes", (2 ** (-8 * heads_H / config.n_head))[:, None, None], persistent=False)

    def forward(self, q_BHTD: Tensor, distances: Tensor) -> Tensor:  # noqa: ARG002 (same signature as RelativePositions)
        """Bias of the scores, (H, T, S) or (B, H, T, S)."""
        return -self.slopes * distances.unsqueeze(-3)


def make_position_embedding(config: ModelConfig) -> nn.Module | None:
    """The scheme that adds to the embeddings, if `config.position` is one."""
    schemes = {"learned": LearnedPositions, "sinusoidal": SinusoidalPositions}
    return schemes[config.position](config) if config.position in schemes else None


def make_attention_bias(config: ModelConfig) -> nn.Module | None:
    """The scheme that adds to the attention scores, if `config.position` is one."""
    schemes = {"relative": RelativePositions, "alibi": AlibiPositions}
    return schemes[config.position](config) if config.position in schemes else None


def _angles(positions: int, channels: int) -> Tensor:
    """Angle of each position at each frequency, highest frequency first, (T, channels / 2), float64."""
    frequencies_E = BASE ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    return torch.arange(positions, dtype=torch.float64)[:, None] * frequencies_E


def _at_positions(table: Tensor, length: int, positions_BT: Tensor | None) -> Tensor:
    """Entries of the table at the positions, (B, T, …), or at the first `length` ones, (T, …)."""
    return table[:length] if positions_BT is None else table[positions_BT]
