"""Decoding follows the model's probabilities; cache, compilation and batch do not change the result."""

from typing import get_args

import pytest
import torch
from torch import nn

from gpt.generation.decoding import Decoder, generate_tokens
from gpt.generation.packed_weights import POSITIONS
from gpt.generation.sampling import Sampler, SamplingParams, sample_tokens
from gpt.model.baselines import MODEL_CLASSES, make_model
from gpt.model.config import ModelConfig
from gpt.model.gpt import GPT, LanguageModel
from tests.support.common import model_params, strong_model

PROMPTS = [[1], [2, 3, 4, 5, 6], [7] * 8, list(range(11)) * 2]  # shorter than, as long as and longer than the window
VARIANTS = {
    **{name: {"position": name} for name in get_args(ModelConfig.model_fields["position"].annotation)},
    **{kind: {"kind": kind, "position": "learned"} for kind in MODEL_CLASSES},
    **{name: {"activation": name} for name in get_args(ModelConfig.model_fields["activation"].annotation)},
    "no n-grams": {"ngram": 1},
    "hashed n-grams": {"ngram": 6, "ngram_rows": 100},
    "RMSNorm": {"norm": "rms"},
    "no QK norm, biases": {"qk_norm": False, "bias": True},
    "tied, odd width": {"n_embd": 18, "position": "alibi", "tie_embeddings": True},
}


@pytest.fixture(params=list(VARIANTS.values()), ids=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> LanguageModel:
    config = model_params(**{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "dropout": 0, **request.param})
    return strong_model(config, vocab_size=11)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(model_params(n_layer=1, n_head=1, n_embd=8, block_size=4, dropout=0), vocab_size=5)
    nn.init.normal_(model.token_embedding.weight, std=0.3)
    return model.eval()


def generate(model: LanguageModel, prompt: list[int], params: SamplingParams, seed: int, **options: bool) -> list[int]:
    """The continuation of a single prompt."""
    return [token for (token,) in generate_tokens(model, [prompt], params, [seed], **options)]


def test_neither_cache_nor_compilation_changes_the_logits(variant: LanguageModel) -> None:
    """Also after windows have overflowed at different steps: at steps 1, 4 and 8 first."""
    torch.manual_seed(1)
    decoders = [Decoder(variant, 4), Decoder(variant, 4, compiled=False), Decoder(variant, 4, cached=False)]
    fast = isinstance(variant, GPT) and variant.config.position in POSITIONS
    assert [decoder.compiled_step is not None for decoder in decoders] == [fast, False, False]
    logits = [torch.stack([added[-1] for added in decoder.add(PROMPTS)]) for decoder in decoders]
    for _ in range(14):
        compiled_BV, cached_BV, expected_BV = logits
        assert torch.allclose(compiled_BV, expected_BV, atol=1e-4)
        assert torch.allclose(cached_BV, expected_BV, atol=1e-4)
        tokens = torch.randint(11, (4,)).tolist()
        logits = [decoder.step(tokens) for decoder in decoders]


def test_compilation_does_not_change_the_text_of_a_seed(variant: LanguageModel) -> None:
    params = SamplingParams(max_new_tokens=60, temperature=1.0)
    compiled, reference = (
        list(generate_tokens(variant, PROMPTS, params, range(4), compiled=compiled)) for compiled in (True, False)
    )
    assert compiled == reference


@pytest.mark.parametrize("options", [{}, {"compiled": False}, {"cached": False}], ids=str)
def test_sequences_join_and_leave_without_an_effect_on_the_others(
    variant: LanguageModel, options: dict[str, bool]
) -> None:
    """Each of 12 sequences gets the tokens that it gets alone, among up to 6 that come and go."""
    params, alone = SamplingParams(max_new_tokens=14, temperature=1.0), {}
    prompts = {seed: PROMPTS[seed % 4] for seed in range(12)}
    for seed, prompt in prompts.items():
        alone[seed] = generate(variant, prompt, params, seed, **options)
    decoder, active, logits = Decoder(variant, 6, **options), list[int](), list[torch.Tensor]()
    texts: dict[int, list[int]] = {seed: [] for seed in prompts}
    samplers = {seed: Sampler(params, seed, prompt, 11) for seed, prompt in prompts.items()}
    waiting = list(prompts)
    while waiting or active:
        joining = [waiting.pop(0) for _ in range(min(len(waiting), 6 - len(active), 3))]
        active += joining
        logits += [added[-1] for added in decoder.add([prompts[seed] for seed in joining])]
        tokens = sample_tokens(torch.stack(logits), [samplers[seed] for seed in active])
        for seed, token in zip(active, tokens, strict=True):
            texts[seed].append(token)
        for index in reversed(range(len(active))):
            if len(texts[active[index]]) == 14 - active[index] % 3:
                decoder.remove(index)
                active[index], tokens[index] = active[-1], tokens[-1]
                del active[-1], tokens[-1]
        logits = list(decoder.step(tokens)) if tokens else []
    assert all(text == alone[seed][: len(text)] for seed, text in texts.items())


@pytest.mark.parametrize("compiled", [pytest.param(True), pytest.param(False, marks=pytest.mark.proof)])
def test_the_logits_of_a_sequence_are_bit_identical_in_every_batch(compiled: bool) -> None:
    """A proof without compilation: it holds for torch's kernels of a CPU, and was measured on some."""
    config = model_params(n_layer=2, n_head=4, n_embd=160, block_size=64, dropout=0, position="rotary", ngram=3)
    model = strong_model(config, vocab_size=65)
    alone = Decoder(model, 1, compiled=compiled)
    expected = [alone.add([[1, 2, 3]])[0][-1], *(alone.step([token % 65])[0] for token in range(80))]
    for others in (1, 2, 6, 15, 31):
        decoder = Decoder(model, 1 + others, compiled=compiled)
        first = decoder.add([[1, 2, 3], *([4] * (1 + other) for other in range(others))])[0][-1]
        steps = (decoder.step([token % 65] * (1 + others))[0] for token in range(80))
        assert all(map(torch.equal, expected, [first, *steps]))


def test_a_batch_generates_the_same_tokens_as_single_sequences(variant: LanguageModel) -> None:
    params, prompts, seeds = SamplingParams(max_new_tokens=14, temperature=1.0), [*PROMPTS, [1]], range(5)
    batch = list(zip(*generate_tokens(variant, prompts, params, seeds), strict=True))
    for tokens, prompt, seed in zip(batch, prompts, seeds, strict=True):
        assert list(tokens) == generate(variant, prompt, params, seed)
    assert batch[0] != batch[4]  # the same prompt with another seed


def test_the_window_holds_the_end_of_a_long_prompt_and_keeps_its_last_half_when_full(variant: LanguageModel) -> None:
    prompt = [0, 8, 3, 1, 4, 1, 5, 9, 2, 6]
    decoder = Decoder(variant, 1)
    assert torch.equal(decoder.add([prompt])[0], Decoder(variant, 1).add([prompt[-8:]])[0])
    assert torch.allclose(decoder.step([7])[0], Decoder(variant, 1).add([[5, 9, 2, 6, 7]])[0][-1], atol=1e-5)


def test_the_seed_alone_determines_the_tokens(model: GPT) -> None:
    params = SamplingParams(max_new_tokens=30)
    torch.manual_seed(1)
    first = generate(model, [0], params, seed=1)
    torch.manual_seed(2)
    assert first == generate(model, [0], params, seed=1)
    assert first != generate(model, [0], params, seed=2)
    assert len(first) == 30


def test_temperature_0_and_top_k_1_take_the_most_probable_token(model: GPT) -> None:
    greedy = generate(model, [0], SamplingParams(max_new_tokens=12, temperature=0), seed=1)
    window = [0]  # of at most 4 tokens
    for token in greedy:
        assert token == int(model(torch.tensor([window]))[0, -1].argmax())
        window = [*(window[-2:] if len(window) == 4 else window), token]
    for params in (SamplingParams(max_new_tokens=12, top_k=1), SamplingParams(max_new_tokens=12, temperature=1e-9)):
        assert generate(model, [0], params, seed=5) == greedy


def test_the_repetition_penalty_prevents_loops() -> None:
    torch.manual_seed(0)
    model = make_model(model_params(kind="bigram", block_size=8), vocab_size=30)
    nn.init.normal_(next(model.parameters()))
    greedy, varied = (
        generate(model, [0], SamplingParams(max_new_tokens=30, temperature=0, repetition_penalty=penalty), seed=1)
        for penalty in (1.0, 100.0)
    )
    assert len(set(greedy)) < 15
    assert len(set(varied)) > 25


def test_each_sequence_of_a_batch_follows_its_own_probabilities(model: GPT) -> None:
    params = SamplingParams(max_new_tokens=2, temperature=1.0)
    first, second = map(torch.tensor, generate_tokens(model, [[2]] * 3000, params, range(3000)))
    expected_V = model(torch.tensor([[2]]))[0, -1].softmax(0)
    assert torch.allclose(torch.bincount(first, minlength=5) / 3000, expected_V, atol=0.05)
    frequent = [token for token in range(5) if (first == token).sum() > 100]
    assert len(frequent) > 1
    for token in frequent:
        after = second[first == token]
        expected_V = model(torch.tensor([[2, token]]))[0, -1].softmax(0)
        assert torch.allclose(torch.bincount(after, minlength=5) / len(after), expected_V, atol=0.12)
