"""Windows for training and evaluation, and the check that a text is long enough."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt.core.errors import UserError
from gpt.data.dataset import MIN_BLOCKS, check_lengths, evaluation_windows, random_windows, shuffled_windows
from gpt.data.loss import token_losses
from gpt.data.token_files import Meta, TokenData
from gpt.model.gpt import GPT
from gpt.tokenizers.char import CharTokenizer
from tests.support.common import model_params


@pytest.mark.parametrize(("block_size", "batch_size"), [(7, 3), (32, 1000), (1, 64)])
def test_every_validation_token_is_a_target_once(data: TokenData, block_size: int, batch_size: int) -> None:
    batches = evaluation_windows(data, block_size=block_size, batch_size=batch_size)
    targets = torch.cat([targets_BT.flatten() for _, targets_BT in batches])
    assert targets.tolist() == data.val.tolist()
    inputs = torch.cat([inputs_BT.flatten() for inputs_BT, _ in batches])
    assert inputs.tolist() == [data.train[-1], *data.val[:-1]]
    assert all(len(inputs_BT) <= batch_size for inputs_BT, _ in batches)


def test_losses_do_not_depend_on_the_batch_size(data: TokenData) -> None:
    torch.manual_seed(0)
    model = GPT(model_params(n_layer=1, n_head=1, n_embd=8, block_size=16, dropout=0.5), data.meta.vocab_size)
    sums = []
    for batch_size in (1, 7, 1000):
        windows = evaluation_windows(data, block_size=16, batch_size=batch_size)
        sums.append(sum(float(batch.sum()) for batch in token_losses(model, windows, torch.device("cpu"))))
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-6)
    assert model.training


def test_random_windows_include_the_first_and_the_last() -> None:
    torch.manual_seed(0)
    inputs_BT, targets_BT = random_windows(np.arange(10, dtype=np.uint16), count=200, block_size=8)
    assert torch.equal(targets_BT, inputs_BT + 1)  # the next token
    assert set(inputs_BT[:, 0].tolist()) == {0, 1}
    assert set(targets_BT[:, -1].tolist()) == {8, 9}


def test_shuffled_windows_cover_the_split_once_per_epoch() -> None:
    split = np.arange(1003, dtype=np.uint16)
    count = 1002 // 10 - 1
    epochs = []
    for epoch in range(2):
        inputs_BT, targets_BT = shuffled_windows(split, first=epoch * count, count=count, block_size=10, seed=1)
        assert torch.equal(targets_BT, inputs_BT + 1)
        assert len(set(inputs_BT.flatten().tolist())) == 10 * count
        starts = inputs_BT[:, 0].tolist()
        assert starts != sorted(starts)
        epochs.append(starts)
    assert epochs[0] != epochs[1]


def test_shuffled_windows_depend_only_on_number_and_seed() -> None:
    split = np.arange(1003, dtype=np.uint16)
    whole, _ = shuffled_windows(split, first=90, count=20, block_size=10, seed=1)  # of two epochs
    parts = [shuffled_windows(split, first=first, count=5, block_size=10, seed=1)[0] for first in range(90, 110, 5)]
    assert torch.equal(whole, torch.cat(parts))
    other, _ = shuffled_windows(split, first=90, count=20, block_size=10, seed=2)
    assert not torch.equal(whole, other)


def data_of_length(train: int, val: int) -> TokenData:
    meta = Meta(
        kind="char",
        vocab_size=2,
        dtype="<u2",
        train_tokens=train,
        val_tokens=val,
        train_characters=train,
        val_characters=val,
        corpus_sha256="",
    )
    return TokenData(np.zeros(train, "<u2"), np.zeros(val, "<u2"), CharTokenizer("ab"), meta)


def test_short_text_is_refused_with_remedies() -> None:
    with pytest.raises(UserError) as error:
        check_lengths(data_of_length(1800, 200), block_size=128)
    for part in (
        "at least 512 tokens in each split (4 blocks of model.block_size 128), found 1,800 to train on and 200 to",
        "model.block_size to at most 50",
        "tokenize.train_fraction to at most 0.74",
        "at least 5,120 tokens",
    ):
        assert part in str(error.value)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 500))
def test_each_remedy_suffices(train: int, val: int, block_size: int) -> None:
    try:
        check_lengths(data_of_length(train, val), block_size=block_size)
    except UserError as error:
        message = str(error).replace(",", "")
        assert min(train, val) < MIN_BLOCKS * block_size
        if block := re.search(r"block_size to at most (\d+)", message):
            check_lengths(data_of_length(train, val), block_size=int(block[1]))
        if fraction := re.search(r"train_fraction to at (?:most|least) (0\.\d+)", message):
            part = int((train + val) * float(fraction[1]))
            check_lengths(data_of_length(part, train + val - part), block_size=block_size)
        length = re.search(r"text of at least (\d+)", message)
        assert length
        longer = math.ceil(int(length[1]) * min(train, val) / (train + val))
        check_lengths(data_of_length(longer, longer), block_size=block_size)
    else:
        assert min(train, val) >= MIN_BLOCKS * block_size
