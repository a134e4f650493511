"""Sampling draws what the scores say, and the same seed gives the same text."""

import math

import pytest
import torch

from gpt.model import GPT
from gpt.sampling import Reader, SamplingParams, keep_top_k, sample
from gpt.tokenizer import CharTokenizer
from tests.conftest import model_params


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(model_params(n_layer=1, n_head=1, n_embd=8, block_size=4, dropout=0), vocab_size=5)
    torch.nn.init.normal_(model.token_embedding.weight, std=0.3)
    return model.eval()


def test_top_k_by_hand() -> None:
    logits_V = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert keep_top_k(logits_V, 2).tolist() == [-math.inf, 3.0, -math.inf, 2.0]
    for everything in (None, 4, 100):
        assert torch.equal(keep_top_k(logits_V, everything), logits_V)


def one(model: GPT, prompt: list[int], params: SamplingParams, seed: int) -> list[int]:
    """The continuation alone."""
    return [token for (token,) in sample(model, prompt, params, [seed])]


def test_the_same_seed_gives_the_same_text_even_past_the_block(model: GPT) -> None:
    params = SamplingParams(max_new_tokens=30)
    torch.manual_seed(1)
    first = one(model, [0], params, seed=1)
    torch.manual_seed(2)
    assert first == one(model, [0], params, seed=1)
    assert first != one(model, [0], params, seed=2)
    assert len(first) == 30


def test_temperature_0_and_top_1_take_the_likeliest(model: GPT) -> None:
    greedy = one(model, [0], SamplingParams(max_new_tokens=12, temperature=0), seed=1)
    window = [0]  # of at most 4 tokens; a full one keeps its last half
    for token in greedy:
        assert token == int(model(torch.tensor([window]))[0, -1].argmax())
        window = [*(window[-2:] if len(window) == 4 else window), token]
    for params in (SamplingParams(max_new_tokens=12, top_k=1), SamplingParams(max_new_tokens=12, temperature=1e-9)):
        assert one(model, [0], params, seed=5) == greedy


@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("prompt", [1, 5, 8, 20])
def test_what_is_kept_changes_no_score_inside_the_block_and_past_it(position: str, prompt: int) -> None:
    torch.manual_seed(0)
    params = model_params(n_layer=2, n_head=2, n_embd=16, block_size=8, position=position)
    model = GPT(params, vocab_size=11).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    cached, reference = Reader(model, texts=3), Reader(model, texts=3, cached=False)
    with torch.inference_mode():
        for length in [prompt] + [1] * 30:
            tokens_BT = torch.randint(11, (3, length))
            assert torch.allclose(cached.scores(tokens_BT), reference.scores(tokens_BT), atol=1e-4)


def test_a_long_prompt_is_seen_up_to_the_block(model: GPT) -> None:
    tokens_BT = torch.tensor([[1, 2, 3, 4, 0, 1, 2]])
    with torch.inference_mode():
        assert torch.equal(Reader(model, texts=1).scores(tokens_BT), Reader(model, texts=1).scores(tokens_BT[:, -4:]))


def test_draws_follow_the_probabilities(model: GPT) -> None:
    probabilities = model(torch.tensor([[2]]))[0, -1].softmax(0)
    params = SamplingParams(max_new_tokens=1, temperature=1.0)
    (drawn,) = sample(model, [2], params, range(2000))
    draws = torch.tensor(drawn)
    shares = torch.bincount(draws, minlength=5) / 2000
    assert torch.allclose(shares, probabilities, atol=0.05)


def test_side_by_side_every_text_follows_the_probabilities_of_its_own(model: GPT) -> None:
    rows = sample(model, [2], SamplingParams(max_new_tokens=2, temperature=1.0), range(3000))
    first, second = (torch.tensor(row) for row in rows)
    frequent = [token for token in range(5) if (first == token).sum() > 100]
    assert len(frequent) > 1
    for token in frequent:
        after = second[first == token]
        expected = model(torch.tensor([[2, token]]))[0, -1].softmax(0)
        assert torch.allclose(torch.bincount(after, minlength=5) / len(after), expected, atol=0.12)


def test_side_by_side_a_text_is_what_it_is_alone() -> None:
    torch.manual_seed(0)
    model = GPT(model_params(n_layer=1, n_head=1, n_embd=8, block_size=4, dropout=0), vocab_size=5).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.7)  # so that every token of the context counts
    params = SamplingParams(max_new_tokens=40, temperature=1.0)
    together = list(zip(*sample(model, [3], params, [4, 5, 6]), strict=True))
    assert [list(text) for text in together] == [one(model, [3], params, seed) for seed in (4, 5, 6)]
    assert len(set(together)) == 3


def test_a_text_starts_after_a_line_end_where_there_is_one() -> None:
    assert CharTokenizer("\t\nab").start == 1
    assert CharTokenizer("ab").start == 0
