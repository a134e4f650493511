"""Key-value cache: keys and values of earlier tokens, so that generation computes each token once."""

from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor

LENGTH_STEP = 16  # attention is computed over a multiple of this number of keys


class NextTokens(NamedTuple):
    """Where the next tokens go: their positions (B, T), the number of keys S up to them, and the mask (B, 1, T, S)."""

    positions_BT: Tensor
    end: int
    mask_B1TS: Tensor


@dataclass
class KVCache:
    """Keys and values of all layers in tensors of fixed size (Pope et al. 2022).

    Each of the B sequences has its own length; entries past it are never read. The tokens are stored as well, because
    n-gram embeddings need the previous ones. L layers, S positions, H heads of D channels.
    """

    keys_LBHSD: Tensor
    values_LBHSD: Tensor
    tokens_BS: Tensor
    lengths_B: Tensor
    _next: NextTokens | None = field(default=None, init=False)  # of all layers

    @classmethod
    def empty(cls, shape_LBHSD: tuple[int, int, int, int, int], device: torch.device) -> Self:
        """A cache of sequences without tokens; S is rounded up to a multiple of `LENGTH_STEP`."""
        layers, batch_size, heads, length, head_size = shape_LBHSD
        length = round_up(length)
        keys, values = (torch.zeros(layers, batch_size, heads, length, head_size, device=device) for _ in range(2))
        tokens, lengths = (
            torch.zeros(size, dtype=torch.int64, device=device) for size in ((batch_size, length), batch_size)
        )
        return cls(keys, values, tokens, lengths)

    def rows(self, first: int, last: int) -> Self:
        """The sequences from `first` to before `last`, in the same memory."""
        return type(self)(
            self.keys_LBHSD[:, first:last],
            self.values_LBHSD[:, first:last],
            self.tokens_BS[first:last],
            self.lengths_B[first:last],
        )

    def next_tokens(self, count: int) -> NextTokens:
        """Where the next `count` tokens of each sequence go. All layers share the answer.

        S is a multiple of `LENGTH_STEP`, so that what the kernels compute for a sequence does not depend on the others.
        """
        if self._next is None:
            device = self.lengths_B.device
            positions_BT = self.lengths_B[:, None] + torch.arange(count, device=device)
            end = round_up(int(self.lengths_B.max()) + count)
            mask_BTS = positions_BT[..., None] >= torch.arange(end, device=device)
            self._next = NextTokens(positions_BT, end, mask_BTS[:, None])
        return self._next

    def append_tokens(self, tokens_BT: Tensor, previous: int) -> Tensor:
        """Store the next tokens and return them after the `previous` tokens before them, padded at the start with 0."""
        self.tokens_BS.scatter_(1, self.next_tokens(tokens_BT.shape[1]).positions_BT, tokens_BT)
        before_BT = self.lengths_B[:, None] - torch.arange(previous, 0, -1, device=tokens_BT.device)
        earlier_BT = self.tokens_BS.gather(1, before_BT.clamp(min=0)).masked_fill(before_BT < 0, 0)
        return torch.cat([earlier_BT, tokens_BT], dim=1)

    def update(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values of the next tokens; return those of all positions, (B, H, S, D) each."""
        positions_BT, end, _ = self.next_tokens(k_BHTD.shape[2])
        index_BHTD = positions_BT[:, None, :, None].expand_as(k_BHTD)
        keys_BHSD, values_BHSD = self.keys_LBHSD[layer], self.values_LBHSD[layer]
        keys_BHSD.scatter_(2, index_BHTD, k_BHTD)
        values_BHSD.scatter_(2, index_BHTD, v_BHTD)
        return keys_BHSD[:, :, :end], values_BHSD[:, :, :end]

    def advance(self, tokens: int, sequences: int | None = None) -> None:
        """Count the tokens that all layers have stored, of the first `sequences` or of all."""
        self.lengths_B[:sequences] += tokens
        self._next = None

    def clear(self) -> None:
        """Remove the tokens of all sequences."""
        self.lengths_B.zero_()
        self._next = None

    def copy_from(self, other: "KVCache") -> None:
        """Copy all sequences of another cache of the same model."""
        end = int(other.lengths_B.max())
        self.keys_LBHSD[..., :end, :] = other.keys_LBHSD[..., :end, :]
        self.values_LBHSD[..., :end, :] = other.values_LBHSD[..., :end, :]
        self.tokens_BS.copy_(other.tokens_BS)
        self.lengths_B.copy_(other.lengths_B)


def round_up(length: int) -> int:
    """The next multiple of `LENGTH_STEP`."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP
