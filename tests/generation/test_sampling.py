"""Sampling draws what the scores say, and the same seed gives the same text."""

import math

import pytest
import torch

from gpt.generation.decoding import Decoder, generate_tokens
from gpt.generation.sampling import (
    SamplingParams,
    filtered,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise,
    with_temperature,
)
from gpt.generation.text import until
from gpt.model.baselines import KINDS, make_model
from gpt.model.gpt import GPT, LanguageModel
from gpt.tokenizers.char import CharTokenizer
from tests.support.common import model_params


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


def scores_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def kept(logits_BV: torch.Tensor) -> list[int]:
    return logits_BV[0].isfinite().nonzero().flatten().tolist()


def test_top_p_by_hand() -> None:
    logits_BV = scores_of(0.1, 0.5, 0.15, 0.25)
    for p, expected in [(0.4, [1]), (0.49, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])]:
        assert kept(keep_top_p(logits_BV, p)) == expected, p
    assert kept(keep_top_p(scores_of(0.25, 0.25, 0.25, 0.25), 0.3)) == [0, 1]  # of equal ones the first
    assert torch.equal(keep_top_p(logits_BV, None), logits_BV)


def test_min_p_by_hand() -> None:
    logits_BV = scores_of(0.1, 0.5, 0.15, 0.25)
    for p, expected in [(0.0, [0, 1, 2, 3]), (0.19, [0, 1, 2, 3]), (0.21, [1, 2, 3]), (0.4, [1, 3]), (1.0, [1])]:
        assert kept(keep_min_p(logits_BV, p)) == expected, p
    assert torch.equal(keep_min_p(logits_BV, None), logits_BV)


def test_the_penalty_by_hand() -> None:
    logits_BV, seen_BV = torch.tensor([[3.0, -3.0, 3.0, -3.0]]), torch.tensor([[True, True, False, False]])
    assert penalise(logits_BV, seen_BV, 1.5).tolist() == [[2.0, -4.5, 3.0, -3.0]]
    assert torch.equal(penalise(logits_BV, seen_BV, 1.0), logits_BV)


def test_the_temperature_by_hand() -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert with_temperature(logits_BV, 0.5).softmax(-1)[0].tolist() == pytest.approx(
        (2 * logits_BV).softmax(-1)[0].tolist()
    )
    assert kept(with_temperature(logits_BV, 0)) == [1]
    assert with_temperature(logits_BV, 1e-30).softmax(-1).tolist() == [[0.0, 0.5, 0.5, 0.0]]


def test_filters_see_what_the_temperature_made() -> None:
    """At a high temperature the likeliest token alone has less than half of the probability."""
    logits_BV, nothing_BV = scores_of(0.6, 0.2, 0.1, 0.1), torch.zeros(1, 4, dtype=torch.bool)
    for temperature, expected in [(1.0, 1), (3.0, 2)]:
        params = SamplingParams(temperature=temperature, top_p=0.5)
        assert int((filtered(logits_BV, nothing_BV, params) > 0).sum()) == expected


def test_a_penalty_keeps_a_text_from_turning_in_circles() -> None:
    torch.manual_seed(0)
    model = make_model(model_params(kind="bigram", block_size=8), vocab_size=30)
    torch.nn.init.normal_(next(model.parameters()))
    greedy, varied = (
        one(model, [0], SamplingParams(max_new_tokens=30, temperature=0, repetition_penalty=penalty), seed=1)
        for penalty in (1.0, 100.0)
    )
    assert len(set(greedy)) < 15
    assert len(set(varied)) > 25


def test_a_text_ends_before_a_stop_string_however_it_comes() -> None:
    text = "to be, or not to be:\nthat"
    for stops, expected in [
        ([], text),
        (["xyz"], text),
        (["not"], "to be, or "),
        (["be:", "or"], "to be, "),
        (["\n"], "to be, or not to be:"),
        (["to"], ""),
        (["thatch"], text),
    ]:
        for size in (1, 3, 100):
            pieces = (text[at : at + size] for at in range(0, len(text), size))
            assert "".join(until(pieces, stops)) == expected


def test_a_text_streams_as_far_as_no_stop_string_may_begin() -> None:
    assert list(until(iter("abcde"), ["xyz"])) == ["a", "b", "c", "de"]


def one(model: LanguageModel, prompt: list[int], params: SamplingParams, seed: int) -> list[int]:
    """The continuation alone."""
    return [token for (token,) in generate_tokens(model, [prompt], params, [seed])]


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


VARIANTS = {
    **{name: {"position": name} for name in ("learned", "sinusoidal", "relative", "rotary", "alibi", "none")},
    **{kind: {"kind": kind, "position": "learned"} for kind in KINDS},
    "no n-grams": {"ngram": 1},
}


@pytest.fixture(params=list(VARIANTS.values()), ids=list(VARIANTS))
def lively(request: pytest.FixtureRequest) -> LanguageModel:
    """A model of every kind and scheme whose scores depend on all that it sees."""
    torch.manual_seed(0)
    params = model_params(n_layer=2, n_head=2, n_embd=16, block_size=8, dropout=0, **request.param)
    model = make_model(params, vocab_size=11).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return model


PROMPTS = [[1], [2, 3, 4, 5, 6], [7] * 8, list(range(11)) * 2]  # past the block, too


def test_what_is_kept_changes_no_score_inside_the_block_and_past_it(lively: LanguageModel) -> None:
    """For prompts of different lengths side by side, and for each of them alone."""
    torch.manual_seed(1)
    cached, reference = Decoder(lively, texts=4), Decoder(lively, texts=4, cached=False)
    alone = [Decoder(lively, texts=1) for _ in PROMPTS]
    with torch.inference_mode():
        tokens = PROMPTS
        for _ in range(30):
            expected_BV = reference.step(tokens)
            assert torch.allclose(cached.step(tokens), expected_BV, atol=1e-4)
            for row, reader in enumerate(alone):
                assert torch.allclose(reader.step([tokens[row]])[0], expected_BV[row], atol=1e-4)
            tokens = torch.randint(11, (4, 1)).tolist()


def test_the_cache_changes_no_text(lively: LanguageModel) -> None:
    params = SamplingParams(max_new_tokens=40, temperature=1.0)
    texts = [list(generate_tokens(lively, PROMPTS, params, range(4), cached=cached)) for cached in (True, False)]
    assert texts[0] == texts[1]


def test_the_rule_at_a_full_window(lively: LanguageModel) -> None:
    """Its last half stays: what the model sees then is what a new text of so many tokens would be."""
    reader, tokens = Decoder(lively, texts=1), [3, 1, 4, 1, 5, 9, 2, 6]
    with torch.inference_mode():
        reader.step([tokens])
        assert torch.allclose(reader.step([[7]]), Decoder(lively, texts=1).step([[5, 9, 2, 6, 7]]), atol=1e-5)


def test_a_long_prompt_is_seen_up_to_the_block(model: GPT) -> None:
    tokens = [1, 2, 3, 4, 0, 1, 2]
    with torch.inference_mode():
        assert torch.equal(Decoder(model, texts=1).step([tokens]), Decoder(model, texts=1).step([tokens[-4:]]))


def test_draws_follow_the_probabilities(model: GPT) -> None:
    probabilities = model(torch.tensor([[2]]))[0, -1].softmax(0)
    params = SamplingParams(max_new_tokens=1, temperature=1.0)
    (drawn,) = generate_tokens(model, [[2]] * 2000, params, range(2000))
    draws = torch.tensor(drawn)
    shares = torch.bincount(draws, minlength=5) / 2000
    assert torch.allclose(shares, probabilities, atol=0.05)


def test_side_by_side_every_text_follows_the_probabilities_of_its_own(model: GPT) -> None:
    rows = generate_tokens(model, [[2]] * 3000, SamplingParams(max_new_tokens=2, temperature=1.0), range(3000))
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
    together = list(zip(*generate_tokens(model, [[3]] * 3, params, [4, 5, 6]), strict=True))
    assert [list(text) for text in together] == [one(model, [3], params, seed) for seed in (4, 5, 6)]
    assert len(set(together)) == 3


def test_a_text_starts_after_a_line_end_where_there_is_one() -> None:
    assert CharTokenizer("\t\nab").start_token == 1
    assert CharTokenizer("ab").start_token == 0
