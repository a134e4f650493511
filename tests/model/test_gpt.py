"""The models compute the published formulas, are causal, and start with small weights."""

import math
from typing import get_args

import pytest
import torch
from torch import nn

from gpt.model.attention import SelfAttention, reference_attention, scaled_dot_product
from gpt.model.baselines import MODEL_CLASSES, make_model
from gpt.model.config import ModelConfig
from gpt.model.gpt import ACTIVATIONS, GPT, NgramEmbeddings, ReluSquared, count_parameters, hash_ngrams, next_token_loss
from gpt.model.positions import REACH, AlibiPositions, RelativePositions, RotaryPositions
from tests.support.common import model_params, strong_model

WITH_NGRAMS = model_params(n_layer=3, n_head=2, n_embd=16, block_size=8, ngram_rows=50, dropout=0.0)
GPT2 = WITH_NGRAMS.model_copy(
    update={"position": "learned", "ngram": 1, "qk_norm": False, "activation": "gelu", "tie_embeddings": True}
)
POSITIONS = get_args(ModelConfig.model_fields["position"].annotation)
VARIANTS = {
    "gpt2": GPT2,
    "n-grams": WITH_NGRAMS,
    "rms": WITH_NGRAMS.model_copy(update={"norm": "rms"}),
    "swiglu": GPT2.model_copy(update={"activation": "swiglu"}),
    "relu": GPT2.model_copy(update={"activation": "relu", "bias": True}),
    **{name: GPT2.model_copy(update={"position": name}) for name in POSITIONS},
    **{kind: GPT2.model_copy(update={"kind": kind}) for kind in MODEL_CLASSES},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_are_causal_and_predict_uniformly_at_first(variant: str) -> None:
    torch.manual_seed(0)
    model = make_model(VARIANTS[variant], vocab_size=11).eval()
    tokens_BT = torch.randint(11, (64, 8))
    changed_BT = tokens_BT.clone()
    changed_BT[:, 5] = (changed_BT[:, 5] + 1) % 11
    before, after = model(tokens_BT), model(changed_BT)
    assert torch.equal(before[:, :5], after[:, :5])
    for position in range(5, 6 if variant == "bigram" else 8):
        assert not torch.equal(before[:, position], after[:, position])
    assert float(next_token_loss(before, torch.randint(11, (64, 8))).detach()) == pytest.approx(math.log(11), abs=0.05)


def test_attention_computes_the_published_formula() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(GPT2, layer=0).eval()
    x_TC = torch.randn(5, 16)
    q_TC, k_TC, v_TC = attention.query(x_TC), attention.key(x_TC), attention.value(x_TC)
    mixed, future_TT = [], torch.ones(5, 5).triu(1).bool()
    for head in (slice(0, 8), slice(8, 16)):
        scores_TT = (q_TC[:, head] @ k_TC[:, head].T / math.sqrt(8)).masked_fill(future_TT, -math.inf)
        mixed.append(scores_TT.softmax(1) @ v_TC[:, head])
    expected_TC = attention.output(torch.cat(mixed, dim=1))
    assert torch.allclose(attention(x_TC[None])[0], expected_TC, atol=1e-6)


@pytest.mark.parametrize("position", POSITIONS)
def test_the_fused_kernel_agrees_with_the_reference(position: str) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(GPT2.model_copy(update={"position": position, "block_size": 50}), layer=0)
    for weight in attention.parameters():
        nn.init.normal_(weight, std=0.5)
    inputs = attention.attention_inputs(torch.randn(2, 50, 16))
    fused_BHTD, (reference_BHTD, scores) = scaled_dot_product(inputs, dropout=0), reference_attention(inputs)
    assert torch.allclose(fused_BHTD, reference_BHTD, atol=1e-5)
    fused_gradient, reference_gradient = (
        torch.autograd.grad(mixed.square().sum(), attention.query.weight, retain_graph=True)[0]
        for mixed in (fused_BHTD, reference_BHTD)
    )
    assert torch.allclose(fused_gradient, reference_gradient, rtol=1e-3, atol=1e-3)
    assert torch.allclose(scores.weights.sum(-1), torch.ones(2, 2, 50))
    assert torch.all(scores.weights.triu(1) == 0)
    assert torch.all(scores.raw.isfinite())


@pytest.mark.parametrize("position", POSITIONS)
def test_only_without_positions_does_a_head_ignore_the_order_of_earlier_tokens(position: str) -> None:
    model = strong_model(GPT2.model_copy(update={"position": position, "kind": "head"}), vocab_size=11)
    one_V, other_V = (model(torch.tensor([tokens]))[0, -1] for tokens in ([1, 2, 3, 3], [2, 1, 3, 3]))
    assert torch.allclose(one_V, other_V, atol=1e-5) == (position == "none")


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = GPT(GPT2.model_copy(update={"dropout": 0.5}), vocab_size=11)
    tokens_BT = torch.randint(11, (1, 8))
    assert not torch.equal(model.train()(tokens_BT), model(tokens_BT))
    assert torch.equal(model.eval()(tokens_BT), model(tokens_BT))


def test_parameter_counts() -> None:
    config = GPT2.model_copy(update={"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64})
    assert count_parameters(GPT(config, vocab_size=65)) - 64 * 128 == 795_904  # nanoGPT prints 0.80M, without positions
    configs = [GPT2.model_copy(update={"n_embd": 96, "activation": name}) for name in ("gelu", "swiglu")]
    assert len({count_parameters(GPT(config, vocab_size=11)) for config in configs}) == 1


def test_relu_squared_has_the_gradient_of_its_formula() -> None:
    x = torch.randn(10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ReluSquared.apply, x)
    assert torch.equal(ACTIVATIONS["relu2"](x), x.clamp(min=0) ** 2)


def test_rotary_scores_depend_on_the_distance_only() -> None:
    torch.manual_seed(0)
    rotary = RotaryPositions(GPT2.model_copy(update={"block_size": 32}))
    q_BTHD, k_BTHD = (torch.randn(8).expand(1, 32, 1, 8) for _ in range(2))
    scores_TT = rotary(q_BTHD, None)[0, :, 0] @ rotary(k_BTHD, None)[0, :, 0].T
    for distance in range(-31, 32):
        diagonal = scores_TT.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1], atol=1e-4)
    assert not torch.allclose(scores_TT[0, 0], scores_TT[0, 1], atol=1e-4)
    assert torch.allclose(rotary(q_BTHD, None).norm(dim=-1), q_BTHD.norm(dim=-1), atol=1e-4)


def test_relative_positions_add_a_vector_to_the_key() -> None:
    torch.manual_seed(0)
    relative = RelativePositions(GPT2)
    q_BHTD, distances = torch.randn(1, 2, 60, 8), torch.arange(60)[:, None] - torch.arange(60)
    bias_BHTS = relative(q_BHTD, distances)
    for t, s in ((5, 5), (5, 2), (59, 59 - REACH), (59, 3)):
        vector_D = relative.table.weight[min(t - s, REACH)]
        expected_H = q_BHTD[0, :, t] @ vector_D / math.sqrt(8)
        assert torch.allclose(bias_BHTS[0, :, t, s], expected_H, atol=1e-6)


def test_alibi_penalties_grow_with_the_distance_at_the_slope_of_the_head() -> None:
    alibi = AlibiPositions(GPT2.model_copy(update={"n_head": 8}))
    bias_HTS = alibi(torch.zeros(1, 8, 4, 2), torch.arange(4)[:, None] - torch.arange(4))
    assert bias_HTS[:, 3, 3].tolist() == [0.0] * 8
    assert bias_HTS[:, 3, 1].tolist() == [-2 / 2**head for head in range(1, 9)]


@pytest.mark.parametrize("rows", [11**3, 100])
def test_ngram_embeddings_depend_on_the_last_n_tokens(rows: int) -> None:
    torch.manual_seed(0)
    embeddings = NgramEmbeddings(GPT2.model_copy(update={"ngram": 3, "ngram_rows": rows}), vocab_size=11)
    tokens_BT = torch.tensor([[1, 2, 3, 4, 1, 2, 3], [9, 9, 1, 2, 3, 5, 2]])
    vectors_BTC = embeddings(tokens_BT)
    assert torch.equal(vectors_BTC[0, 2], vectors_BTC[0, 6])
    assert torch.equal(vectors_BTC[0, 2], vectors_BTC[1, 4])
    assert not torch.equal(vectors_BTC[0, 5], vectors_BTC[1, 6])  # the same token after different ones
    assert torch.equal(embeddings(tokens_BT[:, :4]), vectors_BTC[:, :4])


def test_ngram_dropout_zeroes_whole_embeddings_in_training_only() -> None:
    torch.manual_seed(0)
    config = GPT2.model_copy(update={"ngram": 3, "ngram_width": 4, "n_embd": 8, "ngram_dropout": 0.5})
    embeddings = NgramEmbeddings(config, vocab_size=11)
    nn.init.eye_(embeddings.mix.weight)
    for table in embeddings.tables.parameters():
        nn.init.ones_(table)
    tokens_BT = torch.randint(11, (4, 8))
    by_length = embeddings(tokens_BT).view(-1, 4)
    assert set(map(tuple, by_length.tolist())) == {(0.0,) * 4, (2.0,) * 4}
    assert torch.equal(embeddings.eval()(tokens_BT), torch.ones(4, 8, 8))


@pytest.mark.parametrize("n", [3, 6])
def test_hashed_ngrams_are_spread_evenly(n: int) -> None:
    torch.manual_seed(0)
    ngrams = (torch.randint(65, (20_000, n)) * 65 ** torch.arange(n)).sum(1)
    counts = torch.bincount(hash_ngrams(ngrams, 1000), minlength=1000)
    assert len(counts) == 1000
    assert 0 < counts.min() < counts.max() < 4 * counts.double().mean()


def test_ngrams_of_a_large_vocabulary_do_not_overflow() -> None:
    torch.manual_seed(0)
    embeddings = NgramEmbeddings(GPT2.model_copy(update={"ngram": 6, "ngram_rows": 100}), vocab_size=50_257)
    vectors_BTC = embeddings(torch.tensor([[50_256, 7, 50_000, 3, 2, 1, 9] * 2]))
    assert torch.equal(vectors_BTC[0, 6], vectors_BTC[0, 13])
    assert len(vectors_BTC[0].unique(dim=0)) > 7
