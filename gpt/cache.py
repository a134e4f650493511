"""What a model remembers of a text while it writes on: keys and values, so that each token is computed once."""

import torch
from torch import Tensor


class Cache:
    """Keys and values of the tokens read so far, of all layers, in tensors of their final size (Pope et al. 2022).

    The tokens themselves are kept too, since an n-gram reaches back.
    """

    def __init__(self, shape_LBTHD: tuple[int, int, int, int, int], device: torch.device) -> None:
        self._keys_LBTHD, self._values_LBTHD = (torch.zeros(shape_LBTHD, device=device) for _ in range(2))
        self._tokens_BT = torch.zeros(shape_LBTHD[1:3], dtype=torch.int64, device=device)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __bool__(self) -> bool:
        return True  # an empty one is there, too

    def clear(self) -> None:
        """Forget everything."""
        self._length = 0

    def read(self, tokens_BT: Tensor) -> Tensor:
        """Note the tokens whose keys and values will follow, layer by layer; returns all tokens so far."""
        end = self._length + tokens_BT.shape[1]
        self._tokens_BT[:, self._length : end] = tokens_BT
        self._length = end
        return self._tokens_BT[:, :end]

    def extend(self, layer: int, k_BTHD: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's keys and values of the tokens noted last; returns those of all tokens."""
        end, begin = self._length, self._length - k_BTHD.shape[1]
        keys_BTHD, values_BTHD = self._keys_LBTHD[layer], self._values_LBTHD[layer]
        keys_BTHD[:, begin:end], values_BTHD[:, begin:end] = k_BTHD, v_BTHD
        return keys_BTHD[:, :end], values_BTHD[:, :end]
