"""Windows for training and evaluation, and the check that a text is long enough."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gpt.core.errors import UserError
from gpt.data.dataset import check_lengths, evaluation_windows, random_windows, shuffled_windows
from gpt.data.loss import token_losses
from gpt.data.token_files import TokenData
from gpt.model.gpt import GPT
from tests.support.common import model_params


@pytest.mark.parametrize(("block_size", "batch_size"), [(7, 3), (32, 1000), (1, 64)])
def test_every_validation_token_is_a_target_once(data: TokenData, block_size: int, batch_size: int) -> None:
    batches = evaluation_windows(data, block_size=block_size, batch_size=batch_size)
    targets = torch.cat([targets_BT.flatten() for _, targets_BT in batches])
    assert targets.tolist() == data.val.tolist()
    inputs = torch.cat([inputs_BT.flatten() for inputs_BT, _ in batches])
    assert inputs.tolist() == [data.train[-1], *data.val[:-1]]
    assert all(len(inputs_BT) <= batch_size for inputs_BT, _ in batches)


def test_every_second_batch_as_a_rank_takes_it(data: TokenData) -> None:
    batches = evaluation_windows(data, block_size=7, batch_size=3)
    listed = list(batches)
    assert len(batches) == len(listed) > 10
    for begin in (0, 1):
        taken = batches[begin::2]
        assert len(taken) == len(listed[begin::2])
        for part, whole in zip(taken, listed[begin::2], strict=True):
            assert all(map(torch.equal, part, whole))


def test_batches_of_a_large_split_are_read_when_they_are_used(data: TokenData) -> None:
    """All of them would take 16 TB."""
    large = replace(data, val=np.broadcast_to(np.uint16(1), 10**12))
    batches = evaluation_windows(large, block_size=1000, batch_size=1)
    assert len(batches) == 10**9
    assert [part_BT.shape for part_BT in batches[-1]] == [(1, 1000)] * 2


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


def test_short_text_is_refused_with_remedies(data: TokenData) -> None:
    short = replace(data, train=np.zeros(1800, "<u2"), val=np.zeros(200, "<u2"))
    with pytest.raises(UserError, match=r"at least 512 .*block_size 128.*1,800 .* 200 .*block_size to at most 50"):
        check_lengths(short, block_size=128)
    check_lengths(short, block_size=50)
