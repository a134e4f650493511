"""The model is the textbook's: causal, position-aware, started small."""

import math

import pytest
import torch

from gpt.embeddings import NgramEmbeddings, scattered
from gpt.model import ACTIVATIONS, GPT, SelfAttention, count_parameters, next_token_loss
from gpt.positions import RotaryPositions
from tests.conftest import model_params

PLAIN = model_params(
    n_layer=3,
    n_head=2,
    n_embd=16,
    block_size=8,
    position="learned",
    ngram=1,
    qk_norm=False,
    activation="gelu",
    tie_embeddings=True,
    dropout=0.0,
)
RICH = model_params(n_layer=3, n_head=2, n_embd=16, block_size=8, ngram_rows=50, dropout=0.0)


@pytest.fixture(params=[PLAIN, RICH], ids=["plain", "rich"])
def model(request: pytest.FixtureRequest) -> GPT:
    torch.manual_seed(0)
    return GPT(request.param, vocab_size=11).eval()


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
    attention = SelfAttention(PLAIN, layer=0).eval()
    x_TC = torch.randn(5, 16)
    q_TC, k_TC, v_TC = attention.query(x_TC), attention.key(x_TC), attention.value(x_TC)
    mixed = []
    for head in (slice(0, 8), slice(8, 16)):
        scores_TT = q_TC[:, head] @ k_TC[:, head].T / math.sqrt(8)
        scores_TT = scores_TT.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        mixed.append(scores_TT.softmax(1) @ v_TC[:, head])
    expected_TC = attention.output(torch.cat(mixed, dim=1))
    assert torch.allclose(attention(x_TC[None], None)[0], expected_TC, atol=1e-6)


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
    model = GPT(PLAIN.model_copy(update={"dropout": 0.5}), vocab_size=11)
    tokens_BT = torch.randint(11, (1, 8))
    assert not torch.equal(model.train()(tokens_BT), model(tokens_BT))
    assert torch.equal(model.eval()(tokens_BT), model(tokens_BT))


def test_the_size_is_that_of_nanogpts_recipe() -> None:
    params = PLAIN.model_copy(update={"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64})
    model = GPT(params, vocab_size=65)
    assert count_parameters(model) - 64 * 128 == 795_904  # nanoGPT says 0.80M


def test_rotary_positions_see_distances_only() -> None:
    turn = RotaryPositions(block_size=32, head_size=8)
    torch.manual_seed(0)
    q_BTHD, k_BTHD = (torch.randn(8).expand(1, 32, 1, 8) for _ in range(2))
    scores_TT = turn(q_BTHD, 0)[0, :, 0] @ turn(k_BTHD, 0)[0, :, 0].T
    for distance in range(-31, 32):
        diagonal = scores_TT.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1], atol=1e-4)
    assert not torch.allclose(scores_TT[0, 0], scores_TT[0, 1], atol=1e-4)
    assert torch.allclose(turn(q_BTHD, 0).norm(dim=-1), q_BTHD.norm(dim=-1), atol=1e-4)


@pytest.mark.parametrize("rows", [11**3, 100])
def test_n_gram_embeddings_stand_for_the_last_tokens(rows: int) -> None:
    torch.manual_seed(0)
    embeddings = NgramEmbeddings(3, rows, narrow=4, vocab_size=11, width=8)
    tokens_BT = torch.tensor([[1, 2, 3, 4, 1, 2, 3], [9, 9, 1, 2, 3, 5, 2]])
    vectors_BTC = embeddings(tokens_BT)
    assert torch.equal(vectors_BTC[0, 2], vectors_BTC[0, 6])
    assert torch.equal(vectors_BTC[0, 2], vectors_BTC[1, 4])
    assert not torch.equal(vectors_BTC[0, 5], vectors_BTC[1, 6])  # the same token after others
    assert torch.equal(embeddings(tokens_BT[:, :4]), vectors_BTC[:, :4])


@pytest.mark.parametrize("n", [3, 6])
def test_n_grams_scatter_evenly_where_they_share_rows(n: int) -> None:
    torch.manual_seed(0)
    numbers = (torch.randint(65, (20_000, n)) * 65 ** torch.arange(n)).sum(1)
    counts = torch.bincount(scattered(numbers, 1000), minlength=1000)
    assert len(counts) == 1000
    assert 0 < counts.min() < counts.max() < 4 * counts.double().mean()


def test_relu_squared_has_the_gradient_of_its_formula() -> None:
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ACTIVATIONS["relu2"], x)
    assert torch.equal(ACTIVATIONS["relu2"](x), x.clamp(min=0) ** 2)
