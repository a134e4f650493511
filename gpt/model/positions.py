"""How a model knows the order of its tokens: attention by itself sees a set.

Six schemes, `none` among them; each class says where it acts, what it costs, and what it can past the block it was
trained on. Places are counted from 0; they are given as (B, T) where texts stand at different places, and left out
where every text starts at 0. S keys are asked by T queries, H heads of D channels.
"""

import torch
from torch import Tensor, nn

from gpt.model.config import ModelConfig

BASE = 10_000  # of the slowest angle, as in both papers
REACH = 32  # distances that have a vector of their own; in the paper, words, 16 were as good as more


class LearnedPositions(nn.Module):
    """A trained vector for each place, added to the token's (Vaswani et al. 2017, section 3.5; GPT-2).

    Acts on the embeddings. Costs a row of C numbers a place; knows no place past `block_size`.
    """

    def __init__(self, params: ModelConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(params.block_size, params.n_embd)

    def forward(self, x_BTC: Tensor, positions_BT: Tensor | None) -> Tensor:
        """Add to each position the vector of its place."""
        return x_BTC + _rows(self.table.weight, x_BTC.shape[1], positions_BT)


class SinusoidalPositions(nn.Module):
    """Sines and cosines of slower and slower waves, added to the token's vector (Vaswani et al. 2017, section 3.5).

    Acts on the embeddings. Nothing is trained; there are numbers for any place, which the model has never seen, though.
    """

    table: Tensor  # (T, C)

    def __init__(self, params: ModelConfig) -> None:
        super().__init__()
        angles_TE = _angles(params.block_size, params.n_embd)
        waves_TC = torch.stack([angles_TE.sin(), angles_TE.cos()], dim=-1).flatten(1)
        height = 1 if params.ngram > 1 else 0.02  # of the vectors they join: n-grams are normalised, tokens start small
        self.register_buffer("table", (height * waves_TC).float(), persistent=False)

    def forward(self, x_BTC: Tensor, positions_BT: Tensor | None) -> Tensor:
        """Add to each position the waves of its place."""
        return x_BTC + _rows(self.table, x_BTC.shape[1], positions_BT)


class RotaryPositions(nn.Module):
    """Turns queries and keys by an angle that grows with their place (Su et al. 2021, section 3.2).

    Acts on queries and keys: their product then depends on how far apart they stand, not on where. Nothing is trained;
    farther than the block the angles are new to the model, and it gets worse soon.
    """

    turns: Tensor  # (T, E), complex: E = D / 2

    def __init__(self, params: ModelConfig) -> None:
        super().__init__()
        angles_TE = _angles(params.block_size, params.head_size)
        turns_TE = torch.polar(torch.ones_like(angles_TE), angles_TE).to(torch.complex64)
        self.register_buffer("turns", turns_TE, persistent=False)

    def forward(self, x_BTHD: Tensor, positions_BT: Tensor | None) -> Tensor:
        """Turn each pair of neighbouring channels.

        A pair is read as one complex number, which is the fastest way to do it in torch.
        """
        pairs_BTHE = torch.view_as_complex(x_BTHD.float().view(*x_BTHD.shape[:-1], -1, 2))
        turned_BTHE = pairs_BTHE * _rows(self.turns, x_BTHD.shape[1], positions_BT).unsqueeze(-2)
        return torch.view_as_real(turned_BTHE).flatten(-2)


class RelativePositions(nn.Module):
    """A trained vector for each distance, added to the key when a query asks it (Shaw et al. 2018, section 3.2).

    Acts on the scores: q · (k + r) = q · k + q · r. The heads share the vectors. From `REACH` on all distances are one,
    so that any length can be read. Costs a product of every query with all the vectors.
    """

    def __init__(self, params: ModelConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(REACH + 1, params.head_size)

    def forward(self, q_BHTD: Tensor, distances: Tensor) -> Tensor:
        """What is added to the scores, (B, H, T, S); `distances` from query back to key, (T, S) or (B, T, S)."""
        by_distance_BHTR = q_BHTD @ self.table.weight.T * q_BHTD.shape[-1] ** -0.5
        index = distances.clamp(0, REACH)
        bias_BHTS: Tensor = by_distance_BHTR.gather(-1, index.unsqueeze(-3).expand(*q_BHTD.shape[:3], -1))
        return bias_BHTS


class AlibiPositions(nn.Module):
    """A penalty that grows with the distance, in each head at another rate (Press et al. 2022, section 3).

    Acts on the scores. Nothing is trained, and more text than the block can be read: what is far away only counts less.
    """

    slopes: Tensor  # (H, 1, 1)

    def __init__(self, params: ModelConfig) -> None:
        super().__init__()
        heads_H = torch.arange(1, params.n_head + 1, dtype=torch.float32)
        self.register_buffer("slopes", (2 ** (-8 * heads_H / params.n_head))[:, None, None], persistent=False)

    def forward(self, q_BHTD: Tensor, distances: Tensor) -> Tensor:  # noqa: ARG002 (as all that act on scores)
        """What is added to the scores, (H, T, S) or (B, H, T, S)."""
        return -self.slopes * distances.unsqueeze(-3)


ADDED_TO_EMBEDDINGS = {"learned": LearnedPositions, "sinusoidal": SinusoidalPositions}
APPLIED_TO_QUERIES_AND_KEYS = {"rotary": RotaryPositions}
ADDED_TO_SCORES = {"relative": RelativePositions, "alibi": AlibiPositions}


def _angles(places: int, channels: int) -> Tensor:
    """How far each place has turned on each of the waves, (T, channels / 2), float64: the first wave is the fastest."""
    speeds_E = BASE ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    return torch.arange(places, dtype=torch.float64)[:, None] * speeds_E


def _rows(table: Tensor, length: int, positions_BT: Tensor | None) -> Tensor:
    """The rows of those places, (B, T, …); without places the first ones, (T, …)."""
    return table[:length] if positions_BT is None else table[positions_BT]
