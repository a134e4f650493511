"""Sampling draws what the scores say, and the same seed gives the same text."""

import math

import pytest
import torch

from gpt.model import GPT, ModelParams
from gpt.sampling import SamplingParams, keep_top_k, sample, sample_together
from gpt.tokenizer import CharTokenizer


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelParams(n_layer=1, n_head=1, n_embd=8, block_size=4, dropout=0), vocab_size=5)
    torch.nn.init.normal_(model.token_embedding.weight, std=0.3)
    return model.eval()


def test_top_k_by_hand() -> None:
    logits_V = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert keep_top_k(logits_V, 2).tolist() == [-math.inf, 3.0, -math.inf, 2.0]
    for everything in (None, 4, 100):
        assert torch.equal(keep_top_k(logits_V, everything), logits_V)


def test_the_same_seed_gives_the_same_text_even_past_the_block(model: GPT) -> None:
    params = SamplingParams(max_new_tokens=30)
    torch.manual_seed(1)
    first = list(sample(model, [0], params, seed=1))
    torch.manual_seed(2)
    assert first == list(sample(model, [0], params, seed=1))
    assert first != list(sample(model, [0], params, seed=2))
    assert len(first) == 30


def test_temperature_0_and_top_1_take_the_likeliest(model: GPT) -> None:
    greedy = list(sample(model, [0], SamplingParams(max_new_tokens=12, temperature=0), seed=1))
    tokens = [0]
    for token in greedy:
        assert token == int(model(torch.tensor([tokens[-4:]]))[0, -1].argmax())
        tokens.append(token)
    for params in (SamplingParams(max_new_tokens=12, top_k=1), SamplingParams(max_new_tokens=12, temperature=1e-9)):
        assert list(sample(model, [0], params, seed=5)) == greedy


def test_draws_follow_the_probabilities(model: GPT) -> None:
    probabilities = model(torch.tensor([[2]]))[0, -1].softmax(0)
    params = SamplingParams(max_new_tokens=1, temperature=1.0)
    draws = torch.tensor([next(sample(model, [2], params, seed)) for seed in range(2000)])
    shares = torch.bincount(draws, minlength=5) / 2000
    assert torch.allclose(shares, probabilities, atol=0.05)


def test_side_by_side_every_sequence_follows_the_probabilities_of_its_own(model: GPT) -> None:
    tokens_BT = sample_together(model, [2], count=3000, length=2, seed=1)
    first, second = tokens_BT[:, 0], tokens_BT[:, 1]
    expected = model(torch.tensor([[2]]))[0, -1].softmax(0)
    assert torch.allclose(torch.bincount(first, minlength=5) / 3000, expected, atol=0.04)
    frequent = [token for token in range(5) if (first == token).sum() > 100]
    assert len(frequent) > 1
    for token in frequent:
        after = second[first == token]
        expected = model(torch.tensor([[2, token]]))[0, -1].softmax(0)
        assert torch.allclose(torch.bincount(after, minlength=5) / len(after), expected, atol=0.12)


def test_side_by_side_the_same_seed_gives_the_same_texts_even_past_the_block(model: GPT) -> None:
    first = sample_together(model, [0, 1], count=3, length=30, seed=1)
    assert first.shape == (3, 30)
    assert torch.equal(first, sample_together(model, [0, 1], count=3, length=30, seed=1))
    assert not torch.equal(first, sample_together(model, [0, 1], count=3, length=30, seed=2))
    assert len({tuple(tokens_T) for tokens_T in first.tolist()}) == 3


def test_side_by_side_a_sequence_is_what_it_is_alone() -> None:
    torch.manual_seed(0)
    model = GPT(ModelParams(n_layer=1, n_head=1, n_embd=8, block_size=4, dropout=0), vocab_size=5).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.7)  # so that every token of the context counts
    alone = sample(model, [3], SamplingParams(max_new_tokens=40, temperature=1.0), seed=4)
    assert sample_together(model, [3], count=1, length=40, seed=4).tolist() == [list(alone)]


def test_a_text_starts_after_a_line_end_where_there_is_one() -> None:
    assert CharTokenizer("\t\nab").start == 1
    assert CharTokenizer("ab").start == 0
