"""What a model remembers of its texts while it writes on: keys and values, so that each token is computed once."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the tokens read so far, of all layers, in tensors of their final size (Pope et al. 2022).

    The texts lie side by side, each with a length of its own. What stands behind a text's end is never looked at. The
    tokens themselves are kept too, since an n-gram reaches back.
    """

    def __init__(self, shape_LBSHD: tuple[int, int, int, int, int], device: torch.device) -> None:
        texts, places = shape_LBSHD[1:3]
        self._keys_LBSHD, self._values_LBSHD = (torch.zeros(shape_LBSHD, device=device) for _ in range(2))
        self._tokens_BS = torch.zeros(texts, places, dtype=torch.int64, device=device)
        self._texts_B1 = torch.arange(texts, device=device)[:, None]
        self.lengths_B = torch.zeros(texts, dtype=torch.int64, device=device)

    def places(self, tokens: int) -> Tensor:
        """Where the next so many tokens of each text stand, (B, T)."""
        return self.lengths_B[:, None] + torch.arange(tokens, device=self.lengths_B.device)

    def with_earlier(self, tokens_BT: Tensor, count: int) -> Tensor:
        """Note the tokens that come next; returns them behind the `count` before them, 0 where a text begins."""
        self._tokens_BS[self._texts_B1, self.places(tokens_BT.shape[1])] = tokens_BT
        before_BT = self.lengths_B[:, None] - torch.arange(count, 0, -1, device=tokens_BT.device)
        earlier_BT = self._tokens_BS.gather(1, before_BT.clamp(min=0)).masked_fill(before_BT < 0, 0)
        return torch.cat([earlier_BT, tokens_BT], dim=1)

    def extend(self, layer: int, k_BTHD: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor]:
        """Note a layer's keys and values of the tokens that come next; returns those of all places up to the last."""
        tokens = k_BTHD.shape[1]
        positions_BT, end = self.places(tokens), int(self.lengths_B.max()) + tokens
        keys_BSHD, values_BSHD = self._keys_LBSHD[layer], self._values_LBSHD[layer]
        keys_BSHD[self._texts_B1, positions_BT], values_BSHD[self._texts_B1, positions_BT] = k_BTHD, v_BTHD
        return keys_BSHD[:, :end], values_BSHD[:, :end]

    def advance(self, tokens_B: Tensor | int) -> None:
        """All layers have read the next tokens: so many of each text count, what was read behind them does not."""
        self.lengths_B += tokens_B

    def forget(self, rows: list[int]) -> None:
        """Start these texts anew."""
        self.lengths_B[rows] = 0

    def put(self, rows: list[int], other: "KVCache") -> None:
        """Take over all texts of another cache of the same model, as these rows."""
        self._keys_LBSHD[:, rows], self._values_LBSHD[:, rows] = other._keys_LBSHD, other._values_LBSHD
        self._tokens_BS[rows], self.lengths_B[rows] = other._tokens_BS, other.lengths_B
