"""How a model knows the order of its tokens: attention by itself sees a set. Each scheme says where it acts."""

import torch
from torch import Tensor, nn

BASE = 10_000  # of the slowest angle, as in both papers


class LearnedPositions(nn.Module):
    """A trained vector for each place, added to the token's (Vaswani et al. 2017, section 3.5; GPT-2).

    Acts on the embeddings. Costs a row of C numbers a place; knows no place past `block_size`.
    """

    def __init__(self, block_size: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(block_size, width)

    def forward(self, x_BTC: Tensor, before: int) -> Tensor:
        """Add to each position the vector of its place, the first after so many before."""
        return x_BTC + self.table.weight[before : before + x_BTC.shape[1]]


class RotaryPositions(nn.Module):
    """Turns queries and keys by an angle that grows with their place (Su et al. 2021, section 3.2).

    Acts on queries and keys: their product then depends on how far apart they stand, not on where. Nothing is trained.
    """

    turns: Tensor  # (T, E), complex: E = D / 2

    def __init__(self, block_size: int, head_size: int) -> None:
        super().__init__()
        speeds_E = BASE ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
        angles_TE = torch.arange(block_size, dtype=torch.float64)[:, None] * speeds_E
        turns_TE = torch.polar(torch.ones_like(angles_TE), angles_TE).to(torch.complex64)
        self.register_buffer("turns", turns_TE, persistent=False)

    def forward(self, x_BTHD: Tensor, before: int) -> Tensor:
        """Turn each pair of neighbouring channels, the first position's as that after so many before.

        A pair is read as one complex number, which is the fastest way to do it in torch.
        """
        pairs_BTHE = torch.view_as_complex(x_BTHD.float().view(*x_BTHD.shape[:-1], -1, 2))
        turned_BTHE = pairs_BTHE * self.turns[before : before + x_BTHD.shape[1], None]
        return torch.view_as_real(turned_BTHE).flatten(-2)
