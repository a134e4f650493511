"""Evaluation predicts every token once, its figures are what they are called, and baselines are what counting gives."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt.core.errors import UserError
from gpt.data.dataset import MIN_BLOCKS, check_lengths, evaluation_windows, random_windows, shuffled_windows
from gpt.data.loss import token_losses
from gpt.data.token_files import Meta, TokenData
from gpt.evaluation.calibration import calibration_error, calibration_table, predictions
from gpt.evaluation.evaluator import EvaluateParams, evaluate
from gpt.evaluation.ngram_baselines import bigram_loss, mean_by_position, unigram_loss
from gpt.model.checkpoint import Checkpoint
from gpt.model.gpt import GPT
from gpt.tokenizers.char import CharTokenizer
from tests.support.common import model_params

CPU = torch.device("cpu")


@pytest.mark.parametrize(("block_size", "batch_size"), [(7, 3), (32, 1000), (1, 64)])
def test_every_validation_token_is_a_target_once(data: TokenData, block_size: int, batch_size: int) -> None:
    batches = evaluation_windows(data, block_size=block_size, batch_size=batch_size)
    targets = torch.cat([targets_BT.flatten() for _, targets_BT in batches])
    assert targets.tolist() == data.val.tolist()
    inputs = torch.cat([inputs_BT.flatten() for inputs_BT, _ in batches])
    assert inputs.tolist() == [data.train[-1], *data.val[:-1]]
    assert all(len(inputs_BT) <= batch_size for inputs_BT, _ in batches)


def test_a_target_is_the_token_after_its_input(data: TokenData) -> None:
    torch.manual_seed(0)
    inputs_BT, targets_BT = random_windows(data.train, count=50, block_size=8)
    assert torch.equal(inputs_BT[:, 1:], targets_BT[:, :-1])
    text = data.tokenizer.decode(data.train)
    for inputs_T, targets_T in zip(inputs_BT, targets_BT, strict=True):
        assert data.tokenizer.decode([*inputs_T.tolist(), int(targets_T[-1])]) in text


def test_shuffled_windows_visit_every_place_once_an_epoch_and_anew_in_the_next() -> None:
    split = np.arange(1003, dtype=np.uint16)
    an_epoch = 1002 // 10 - 1
    seen = []
    for epoch in range(2):
        inputs_BT, targets_BT = shuffled_windows(split, first=epoch * an_epoch, count=an_epoch, block_size=10, seed=1)
        assert torch.equal(targets_BT, inputs_BT + 1)
        starts = inputs_BT[:, 0]
        assert len(set(inputs_BT.flatten().tolist())) == 10 * an_epoch
        assert starts.tolist() != sorted(starts.tolist())
        seen.append(starts)
    assert not torch.equal(*seen)


def test_shuffled_windows_are_a_function_of_their_numbers() -> None:
    split = np.arange(1003, dtype=np.uint16)
    whole, _ = shuffled_windows(split, first=90, count=20, block_size=10, seed=1)  # across the border of two epochs
    parts = [shuffled_windows(split, first=first, count=5, block_size=10, seed=1)[0] for first in range(90, 110, 5)]
    assert torch.equal(whole, torch.cat(parts))
    other, _ = shuffled_windows(split, first=90, count=20, block_size=10, seed=2)
    assert not torch.equal(whole, other)


def test_random_windows_reach_both_ends(data: TokenData) -> None:
    torch.manual_seed(0)
    split = data.train[:10]
    inputs_BT, targets_BT = random_windows(split, count=200, block_size=8)
    assert {int(row[0]) for row in inputs_BT} == {int(split[0]), int(split[1])}
    assert int(targets_BT[:, -1].max()) == max(split[8], split[9])


def test_losses_do_not_depend_on_the_batches(data: TokenData) -> None:
    torch.manual_seed(0)
    model = GPT(model_params(n_layer=1, n_head=1, n_embd=8, block_size=16, dropout=0.5), data.meta.vocab_size)
    sums = []
    for batch_size in (1, 7, 1000):
        windows = evaluation_windows(data, block_size=16, batch_size=batch_size)
        sums.append(sum(float(batch.sum()) for batch in token_losses(model, windows, CPU)))
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-6)
    assert model.training


def test_baselines_by_hand() -> None:
    train, val = np.array([0, 1, 0, 1, 0, 2], dtype="<u2"), np.array([0, 2], dtype="<u2")
    # counts + 1: 4, 3, 2 of 9
    assert unigram_loss(train, val, 3) == pytest.approx(-(math.log(4 / 9) + math.log(2 / 9)) / 2)
    # after 2 nothing was seen: 1/3; after 0 came 1, 1, 2: (1 + 1) / (3 + 3)
    assert bigram_loss(train, val, 3) == pytest.approx(-(math.log(1 / 3) + math.log(2 / 6)) / 2)


def test_mean_by_position_by_hand() -> None:
    batches = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double(), torch.tensor([[8.0]]).double()]
    assert mean_by_position(batches) == ([4.0, 3.0], [3, 2])


def test_predictions_are_those_of_the_losses(data: TokenData) -> None:
    torch.manual_seed(0)
    model = GPT(model_params(n_layer=1, n_head=1, n_embd=8, block_size=16, dropout=0.5), data.meta.vocab_size)
    torch.nn.init.normal_(model.token_embedding.weight, std=0.5)
    windows = evaluation_windows(data, block_size=16, batch_size=50)
    by_batch, probability, right = predictions(model, windows, CPU, torch.float32)
    for one, other in zip(by_batch, token_losses(model, windows, CPU), strict=True):
        assert torch.equal(one, other)
    assert model.training
    likely = torch.cat([batch.flatten() for batch in by_batch]).neg().exp().numpy()
    assert len(likely) == len(probability) == len(right) == len(data.val)
    assert likely[right] == pytest.approx(probability[right])  # the token that came was the likeliest
    assert (likely[~right] <= probability[~right]).all()
    assert 0 < right.sum() < len(right)


def test_calibration_by_hand() -> None:
    probability = np.array([0.15, 0.19, 1.0, 0.94, 0.3])
    table = calibration_table(probability, np.array([True, False, True, True, False]))
    columns = {"probability": [0.17, 0.3, 0.97], "right": [0.5, 0.0, 1.0], "ideal": [0.17, 0.3, 0.97]}
    pd.testing.assert_frame_equal(table, pd.DataFrame({**columns, "predictions": [2, 1, 2]}))
    assert calibration_error(table) == pytest.approx((2 * 0.33 + 0.3 + 2 * 0.03) / 5)


def test_a_model_that_always_guesses(data: TokenData) -> None:
    params = model_params(n_layer=1, n_head=1, n_embd=8, block_size=16, dropout=0)
    model = GPT(params, data.meta.vocab_size)
    weights = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    checkpoint = Checkpoint(params, data.tokenizer, weights, {})
    settings = EvaluateParams(batch_size=64, precision="float32", sample_characters=240, seed=1, device="cpu")
    found = evaluate(params=settings, checkpoint=checkpoint, data=data)
    size = data.meta.vocab_size
    assert found.figures["bits_per_char"] == pytest.approx(math.log2(size))
    assert found.positions["predictions"].sum() == found.calibration["predictions"].sum() == len(data.val)
    assert found.calibration["probability"].tolist() == pytest.approx([1 / size])
    assert found.figures["copied"] == 0.0
    assert 1 <= found.figures["longest_copy"] < 8
    bigram, unigram, uniform = map(float, re.findall(r"(?:bigram|unigram|uniform) ([\d.]+)", found.summary[0]))
    assert bigram < unigram < uniform == pytest.approx(math.log(size), abs=1e-3)
    again = evaluate(params=settings, checkpoint=checkpoint, data=data)
    assert (again.figures, again.summary) == (found.figures, found.summary)
    other = settings.model_copy(update={"seed": 2})
    assert evaluate(params=other, checkpoint=checkpoint, data=data).summary[-1] != found.summary[-1]


def data_of(train: int, val: int) -> TokenData:
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


def test_a_poem_is_refused_with_numbers_and_what_to_set() -> None:
    with pytest.raises(UserError) as error:
        check_lengths(data_of(1800, 200), block_size=128)
    assert str(error.value) == (
        "the text is too short: expected at least 512 tokens in each split (4 blocks of model.block_size 128), found "
        "1,800 to train on and 200 to validate on; set model.block_size to at most 50, or set tokenize.train_fraction "
        "to at most 0.74, or take a text of 5,120 tokens or more"
    )


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 500))
def test_each_remedy_is_enough(train: int, val: int, block_size: int) -> None:
    try:
        check_lengths(data_of(train, val), block_size=block_size)
    except UserError as error:
        said = str(error).replace(",", "")
        assert min(train, val) < MIN_BLOCKS * block_size
        if block := re.search(r"block_size to at most (\d+)", said):
            check_lengths(data_of(train, val), block_size=int(block[1]))
        if fraction := re.search(r"train_fraction to at (?:most|least) (0\.\d+)", said):
            part = int((train + val) * float(fraction[1]))
            check_lengths(data_of(part, train + val - part), block_size=block_size)
        length = re.search(r"text of (\d+)", said)
        assert length
        longer = math.ceil(int(length[1]) * min(train, val) / (train + val))
        check_lengths(data_of(longer, longer), block_size=block_size)
    else:
        assert min(train, val) >= MIN_BLOCKS * block_size
