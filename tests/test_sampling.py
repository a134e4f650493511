"""Sampling draws what the scores say, and the same seed gives the same text."""

import math

import pytest
import torch

from gpt.model import GPT, ModelParams
from gpt.sampling import SamplingParams, keep_top_k, sample


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
