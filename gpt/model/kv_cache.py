"""Key-value cache: keys and values of earlier tokens, so that generation computes each token once."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all layers in tensors of fixed size (Pope et al. 2022).

    Each of the B sequences has its own length; entries past it are never read. The tokens are stored as well, because
    n-gram embeddings need the previous ones. L layers, S positions, H heads of D channels.
    """

    def __init__(self, shape_LBSHD: tuple[int, int, int, int, int], device: torch.device) -> None:
        batch_size, max_length = shape_LBSHD[1:3]
        self._keys_LBSHD, self._values_LBSHD = (torch.zeros(shape_LBSHD, device=device) for _ in range(2))
        self._tokens_BS = torch.zeros(batch_size, max_length, dtype=torch.int64, device=device)
        self._sequences_B1 = torch.arange(batch_size, device=device)[:, None]
        self.lengths_B = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def positions(self, count: int) -> Tensor:
        """Positions of the next `count` tokens of each sequence, (B, T)."""
        return self.lengths_B[:, None] + torch.arange(count, device=self.lengths_B.device)

    def append_tokens(self, tokens_BT: Tensor, previous: int) -> Tensor:
        """Store the next tokens and return them after the `previous` tokens before them, padded at the start with 0."""
        self._tokens_BS[self._sequences_B1, self.positions(tokens_BT.shape[1])] = tokens_BT
        before_BT = self.lengths_B[:, None] - torch.arange(previous, 0, -1, device=tokens_BT.device)
        earlier_BT = self._tokens_BS.gather(1, before_BT.clamp(min=0)).masked_fill(before_BT < 0, 0)
        return torch.cat([earlier_BT, tokens_BT], dim=1)

    def update(self, layer: int, k_BTHD: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values of the next tokens; return those of all positions, (B, S, H, D) each."""
        count = k_BTHD.shape[1]
        positions_BT, end = self.positions(count), int(self.lengths_B.max()) + count
        keys_BSHD, values_BSHD = self._keys_LBSHD[layer], self._values_LBSHD[layer]
        keys_BSHD[self._sequences_B1, positions_BT], values_BSHD[self._sequences_B1, positions_BT] = k_BTHD, v_BTHD
        return keys_BSHD[:, :end], values_BSHD[:, :end]

    def advance(self, tokens_B: Tensor | int) -> None:
        """Count the tokens that all layers have stored, one number for each sequence or one for all."""
        self.lengths_B += tokens_B

    def reset(self, sequences: list[int]) -> None:
        """Empty the cache of these sequences."""
        self.lengths_B[sequences] = 0

    def copy_from(self, other: "KVCache", sequences: list[int]) -> None:
        """Copy all sequences of another cache of the same model into these sequences."""
        self._keys_LBSHD[:, sequences], self._values_LBSHD[:, sequences] = other._keys_LBSHD, other._values_LBSHD
        self._tokens_BS[sequences], self.lengths_B[sequences] = other._tokens_BS, other.lengths_B
