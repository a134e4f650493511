"""The loss in equal parts of the validation text, with which two models can be compared whatever their tokenizers."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from gpt.data.token_files import TokenData

BLOCKS = 100  # fewer if the text has fewer characters
CONTINUATION = 0b10  # the first two bits of every byte of a UTF-8 character but its first

Indices = npt.NDArray[np.int64]


def loss_by_block(losses_by_batch: Sequence[Tensor], data: TokenData) -> pd.DataFrame:
    """The loss of each of `BLOCKS` contiguous blocks of the validation characters, whose lengths differ by at most one.

    A token counts in the block of the character that its first byte belongs to, also if it ends in the next block.

    Args:
        losses_by_batch: of every validation token, in order, in nats.

    Returns:
        For each `block`, from 1, the number of its `characters` and its `nats`, rounded to 4 decimals.
    """
    characters = data.meta.val_characters
    blocks = min(BLOCKS, characters)
    starts = -(-np.arange(blocks + 1) * characters // blocks)
    nats = torch.cat([batch.flatten() for batch in losses_by_batch]).numpy()
    block = np.searchsorted(starts, _first_characters(data), side="right") - 1
    columns = {"block": np.arange(1, blocks + 1), "characters": [end - start for start, end in pairwise(starts)]}
    return pd.DataFrame({**columns, "nats": np.bincount(block, nats, minlength=blocks).round(4)})


def _first_characters(data: TokenData) -> Indices:
    """For each validation token, the index of the character that its first byte belongs to."""
    token_bytes = data.tokenizer.token_bytes
    begun = np.array([sum(byte >> 6 != CONTINUATION for byte in token) for token in token_bytes])
    continues = np.array([token[0] >> 6 == CONTINUATION for token in token_bytes])
    tokens = np.asarray(data.val)
    first: Indices = np.cumsum(begun[tokens]) - begun[tokens] - continues[tokens]
    return first
