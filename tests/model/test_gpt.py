"""The model is the textbook's: causal, position-aware, started small."""

import math

import pytest
import torch

from gpt.model.attention import SelfAttention, reference_attention, scaled_dot_product
from gpt.model.baselines import KINDS, make_model
from gpt.model.gpt import (
    ACTIVATIONS,
    GPT,
    LanguageModel,
    NgramEmbeddings,
    ReluSquared,
    count_parameters,
    next_token_loss,
    scattered,
)
from gpt.model.positions import REACH, AlibiPositions, RelativePositions, RotaryPositions, SinusoidalPositions
from tests.support.common import model_params

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
POSITIONS = ["learned", "sinusoidal", "relative", "rotary", "alibi", "none"]
RICH = model_params(n_layer=3, n_head=2, n_embd=16, block_size=8, ngram_rows=50, dropout=0.0)


VARIANTS = {
    "plain": PLAIN,
    "rich": RICH,
    "rms": RICH.model_copy(update={"norm": "rms"}),
    "swiglu": PLAIN.model_copy(update={"activation": "swiglu"}),
    "relu": PLAIN.model_copy(update={"activation": "relu", "bias": True}),
    **{name: PLAIN.model_copy(update={"position": name}) for name in POSITIONS},
    **{kind: PLAIN.model_copy(update={"kind": kind}) for kind in KINDS},
}


@pytest.fixture(params=list(VARIANTS.values()), ids=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> LanguageModel:
    torch.manual_seed(0)
    return make_model(request.param, vocab_size=11).eval()


def test_no_position_sees_what_comes_later(model: LanguageModel) -> None:
    tokens_BT = torch.randint(11, (2, 8))
    changed_BT = tokens_BT.clone()
    changed_BT[:, 5] = (changed_BT[:, 5] + 1) % 11
    before, after = model(tokens_BT), model(changed_BT)
    assert torch.equal(before[:, :5], after[:, :5])
    for position in range(5, 6 if model.params.kind == "bigram" else 8):
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
    assert torch.allclose(attention(x_TC[None])[0], expected_TC, atol=1e-6)


@pytest.mark.parametrize("position", POSITIONS)
def test_the_fast_attention_is_the_textbooks(position: str) -> None:
    torch.manual_seed(0)
    params = PLAIN.model_copy(update={"position": position, "block_size": 50})
    attention = SelfAttention(params, layer=0)
    for weight in attention.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    x_BTC = torch.randn(2, 50, 16)
    fast_BHTD, (plain_BHTD, scores) = (
        scaled_dot_product(attention.attention_inputs(x_BTC), dropout=0),
        reference_attention(attention.attention_inputs(x_BTC)),
    )
    assert torch.allclose(fast_BHTD, plain_BHTD, atol=1e-5)
    for_fast, for_plain = (
        torch.autograd.grad(mixed.square().sum(), attention.query.weight)[0] for mixed in (fast_BHTD, plain_BHTD)
    )
    assert torch.allclose(for_fast, for_plain, rtol=1e-3, atol=1e-3)
    assert scores.weights.shape == (2, 2, 50, 50)
    assert torch.allclose(scores.weights.sum(-1), torch.ones(2, 2, 50))
    assert torch.all(scores.weights.triu(1) == 0)
    assert torch.all(scores.raw.isfinite())


@pytest.mark.parametrize("position", POSITIONS)
def test_attention_sees_the_order_of_what_came_before_unless_there_are_no_positions(position: str) -> None:
    torch.manual_seed(0)
    model = make_model(PLAIN.model_copy(update={"position": position, "kind": "head"}), vocab_size=11).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    one_V, other_V = (model(torch.tensor([tokens]))[0, -1] for tokens in ([1, 2, 3, 3], [2, 1, 3, 3]))
    assert torch.allclose(one_V, other_V, atol=1e-5) == (position == "none")


def test_the_average_is_that_of_all_tokens_so_far() -> None:
    torch.manual_seed(0)
    model = make_model(PLAIN.model_copy(update={"kind": "average"}), vocab_size=11)
    tokens_BT = torch.tensor([[3, 1, 4, 1, 5]])
    for end in range(1, 6):
        mean_C = model.get_submodule("token_embedding")(tokens_BT[0, :end]).mean(0)
        assert torch.allclose(model(tokens_BT)[0, end - 1], model.get_submodule("output")(mean_C), atol=1e-6)


def test_an_untrained_model_knows_nothing(model: LanguageModel) -> None:
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
    turn = RotaryPositions(PLAIN.model_copy(update={"block_size": 32}))
    torch.manual_seed(0)
    q_BTHD, k_BTHD = (torch.randn(8).expand(1, 32, 1, 8) for _ in range(2))
    scores_TT = turn(q_BTHD, None)[0, :, 0] @ turn(k_BTHD, None)[0, :, 0].T
    for distance in range(-31, 32):
        diagonal = scores_TT.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1], atol=1e-4)
    assert not torch.allclose(scores_TT[0, 0], scores_TT[0, 1], atol=1e-4)
    assert torch.allclose(turn(q_BTHD, None).norm(dim=-1), q_BTHD.norm(dim=-1), atol=1e-4)


def test_sinusoidal_positions_by_hand() -> None:
    table_TC = SinusoidalPositions(RICH).table
    assert table_TC[0].tolist() == [0.0, 1.0] * 8
    assert float(table_TC[3, 0]) == pytest.approx(math.sin(3))
    assert float(table_TC[3, 15]) == pytest.approx(math.cos(3 / 10_000 ** (14 / 16)))


def test_relative_positions_add_a_vector_to_the_key() -> None:
    torch.manual_seed(0)
    relative = RelativePositions(PLAIN)
    q_BHTD, distances = torch.randn(1, 2, 60, 8), torch.arange(60)[:, None] - torch.arange(60)
    bias_BHTS = relative(q_BHTD, distances)
    for t, s in ((5, 5), (5, 2), (59, 59 - REACH), (59, 3)):
        vector_D = relative.table.weight[min(t - s, REACH)]
        expected_H = q_BHTD[0, :, t] @ vector_D / math.sqrt(8)
        assert torch.allclose(bias_BHTS[0, :, t, s], expected_H, atol=1e-6)


def test_alibi_takes_more_off_the_farther_away_and_in_each_head_at_another_rate() -> None:
    alibi = AlibiPositions(PLAIN.model_copy(update={"n_head": 8}))
    bias_HTS = alibi(torch.zeros(1, 8, 4, 2), torch.arange(4)[:, None] - torch.arange(4))
    assert bias_HTS[:, 3, 3].tolist() == [0.0] * 8
    assert bias_HTS[:, 3, 1].tolist() == [-2 / 2**head for head in range(1, 9)]


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
    assert torch.autograd.gradcheck(ReluSquared.apply, x)
    assert torch.equal(ACTIVATIONS["relu2"](x), x.clamp(min=0) ** 2)


def test_a_large_vocabulary_has_n_grams_too() -> None:
    embeddings = NgramEmbeddings(6, 100, narrow=4, vocab_size=50_257, width=8)
    vectors_BTC = embeddings(torch.tensor([[50_256, 7, 50_000, 3, 2, 1, 9, 50_256, 7, 50_000, 3, 2, 1, 9]]))
    assert torch.equal(vectors_BTC[0, 6], vectors_BTC[0, 13])
    assert len(vectors_BTC[0].unique(dim=0)) > 7


def test_a_gate_costs_no_more_weights() -> None:
    params = PLAIN.model_copy(update={"n_embd": 96, "n_head": 2})
    sizes = {
        activation: count_parameters(GPT(params.model_copy(update={"activation": activation}), vocab_size=11))
        for activation in ("gelu", "swiglu")
    }
    assert sizes["swiglu"] == sizes["gelu"]
