"""The model is the textbook's: causal, position-aware, started small."""

import math

import pytest
import torch

from gpt.model import GPT, ModelParams, SelfAttention, count_parameters, next_token_loss

PARAMS = ModelParams(n_layer=3, n_head=2, n_embd=16, block_size=8, dropout=0.0)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(PARAMS, vocab_size=11).eval()


def test_no_position_sees_what_comes_later(model: GPT) -> None:
    tokens_BT = torch.randint(11, (2, 8))
    changed_BT = tokens_BT.clone()
    changed_BT[:, 5] = (changed_BT[:, 5] + 1) % 11
    before, after = model(tokens_BT), model(changed_BT)
    assert torch.equal(before[:, :5], after[:, :5])
    for position in range(5, 8):
        assert not torch.equal(before[:, position], after[:, position])


def test_attention_is_the_textbook_formula() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(PARAMS).eval()
    x_TC = torch.randn(5, 16)
    q_TC, k_TC, v_TC = attention.query_key_value(x_TC).split(16, dim=1)
    mixed = []
    for head in (slice(0, 8), slice(8, 16)):
        scores_TT = q_TC[:, head] @ k_TC[:, head].T / math.sqrt(8)
        scores_TT = scores_TT.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        mixed.append(scores_TT.softmax(1) @ v_TC[:, head])
    expected_TC = attention.output(torch.cat(mixed, dim=1))
    assert torch.allclose(attention(x_TC[None])[0], expected_TC, atol=1e-6)


def test_positions_matter(model: GPT) -> None:
    same_BT = torch.full((1, 8), 3)
    logits_TV = model(same_BT)[0]
    assert not torch.allclose(logits_TV[0], logits_TV[7])


def test_an_untrained_model_knows_nothing(model: GPT) -> None:
    tokens_BT = torch.randint(11, (64, 8))
    loss = next_token_loss(model(tokens_BT), torch.randint(11, (64, 8)))
    assert float(loss.detach()) == pytest.approx(math.log(11), abs=0.05)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = GPT(ModelParams(**{**PARAMS.model_dump(), "dropout": 0.5}), vocab_size=11)
    tokens_BT = torch.randint(11, (1, 8))
    assert not torch.equal(model.train()(tokens_BT), model(tokens_BT))
    assert torch.equal(model.eval()(tokens_BT), model(tokens_BT))


def test_the_size_is_that_of_nanogpts_recipe() -> None:
    model = GPT(ModelParams(n_layer=4, n_head=4, n_embd=128, block_size=64, dropout=0.0), vocab_size=65)
    assert count_parameters(model) - model.position_embedding.weight.numel() == 795_904  # nanoGPT says 0.80M
