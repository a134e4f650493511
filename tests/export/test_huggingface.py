"""The export for transformers: the real library computes the same logits and the same text; all else is refused."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.core.errors import UserError
from gpt.data.dataset import evaluation_windows
from gpt.data.prepare import tokenize
from gpt.data.token_files import load_tokens
from gpt.export.huggingface import GPT2, LLAMA, Architecture, huggingface_export
from gpt.generation.text import GenerateParams, generate_texts
from gpt.model.checkpoint import Checkpoint, load_checkpoint
from gpt.tokenizers.base import Tokenizer
from gpt.tokenizers.char import CharTokenizer
from tests.conftest import RunMain
from tests.support.common import ROOT, model_params, read_yaml, run, strong_model, tokenize_params
from tests.tokenizers.test_tokenizers import TEXT, every_kind

ARCHITECTURES = {"gpt2": GPT2, "llama": LLAMA}
both = pytest.mark.parametrize("name", ARCHITECTURES)
ABC = CharTokenizer("abc")
SETTINGS: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 48, "block_size": 32, "dropout": 0.0}


def untrained(architecture: Architecture, tokenizer: Tokenizer = ABC, **changes: Any) -> Checkpoint:
    """A checkpoint of the architecture with random weights."""
    config = model_params(**SETTINGS, **{**architecture.settings, **changes})
    weights = strong_model(config, tokenizer.vocab_size).state_dict()
    return Checkpoint(config, tokenizer, weights, {"corpus_sha256": "0"})


# -- refusals


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ngram": 3}, ["as GPT-2 model.ngram 1 (found 3); or as Llama"]),
        ({"norm": "rms", "bias": False}, ["as GPT-2 model.norm layer (found rms), model.bias true (found false); or"]),
        ({"position": "alibi"}, ["model.position learned (found alibi)", "model.position rotary (found alibi)"]),
        ({"qk_norm": True}, ["as GPT-2 model.qk_norm false (found true); or"]),
        ({"activation": "relu"}, ["model.activation gelu (found relu)", "model.activation swiglu (found relu)"]),
        ({"kind": "head"}, ["as GPT-2 model.kind gpt (found head); or"]),
    ],
)
def test_settings_that_transformers_lacks_are_refused(settings: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError, match="--format huggingface") as error:
        huggingface_export(untrained(GPT2, **settings))
    for part in [*named, "presets/gpt2.yaml", "--format safetensors"]:
        assert part in str(error.value)


def test_the_command_names_all_settings_in_one_line_and_writes_nothing(
    run_main: RunMain, trained: Path, tmp_path: Path
) -> None:
    line = run_main("export", "--checkpoint", trained / "model.pt", "--format", "huggingface", "--out", "out", code=2)
    gpt2, llama = line.split("; or as Llama")
    assert [key for key in ("position", "ngram", "qk_norm", "activation", "bias") if f"model.{key} " not in gpt2] == []
    assert [key for key in ("ngram", "norm", "qk_norm", "activation") if f"model.{key} " not in llama] == []
    assert "model.norm" not in gpt2
    assert "model.position" not in llama
    assert not (tmp_path / "out").exists()


@both
def test_the_presets_train_models_that_can_be_exported(name: str) -> None:
    model = read_yaml(ROOT / "presets" / f"{name}.yaml")["model"]
    assert {key: model[key] for key in ARCHITECTURES[name].settings} == ARCHITECTURES[name].settings


def test_the_export_imports_no_transformers(run_main: RunMain, tmp_path: Path) -> None:
    untrained(LLAMA).save(tmp_path / "model.pt")
    code = "import sys; from gpt.commands.export import command; from pathlib import Path; "
    code += "command(Path('model.pt'), 'huggingface', Path('out')); assert 'transformers' not in sys.modules"
    run([sys.executable, "-c", code], tmp_path)
    names = ("config", "generation_config", "tokenizer", "tokenizer_config")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", *(f"{n}.json" for n in names)}


# -- with the real transformers


def open_in_transformers(folder: Path) -> tuple[Any, Any]:
    """The model and the tokenizer, as its users load them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 (takes seconds)

    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading  # missing, unexpected or mismatched weights
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def greedy_text(checkpoint: Checkpoint, prompt: str, tokens: int) -> str:
    params = GenerateParams(prompts=[prompt], temperature=0.0, max_new_tokens=tokens)
    _, _, chunks = next(generate_texts(checkpoint, params))
    return "".join(chunks)


@pytest.mark.proof
@both
def test_a_model_of_the_preset_is_the_same_in_transformers(
    name: str, run_main: RunMain, corpus: Path, tmp_path: Path
) -> None:
    """Over the whole validation split, and for the longest text that fits into the context."""
    from transformers import pipeline  # noqa: PLC0415

    tokenize(params=tokenize_params(), corpus=corpus, out=tmp_path / "tokens")
    changes = ("-S", "train.max_steps=60", "-S", "train.eval_interval=60")
    outputs = ("--checkpoint", "model.pt", "--metrics", "m.json", "--history", "h.csv", "--validation", "v.csv")
    run_main("train", "--params", ROOT / "presets" / f"{name}.yaml", "--tokens", "tokens", *outputs, *changes)
    run_main("export", "--checkpoint", "model.pt", "--format", "huggingface", "--out", "out")
    checkpoint, (model, _) = load_checkpoint(tmp_path / "model.pt"), open_in_transformers(tmp_path / "out")
    own, block_size = checkpoint.build(), checkpoint.model.block_size
    batches = evaluation_windows(load_tokens(tmp_path / "tokens"), block_size=block_size, batch_size=32)
    with torch.inference_mode():
        for inputs_BT, _ in batches:
            assert torch.allclose(model(inputs_BT).logits, own(inputs_BT), rtol=0, atol=1e-4)
    generator = pipeline("text-generation", str(tmp_path / "out"))
    for prompt in ("the quick", "wizards brew\n"):
        text = generator(prompt, do_sample=False)[0]["generated_text"]
        assert text == prompt + greedy_text(checkpoint, prompt, block_size - len(prompt))
        assert len(text) == block_size
    (text,) = (found["generated_text"] for found in generator("", do_sample=False, max_new_tokens=20))
    assert text == "\n" + greedy_text(checkpoint, "", 20)  # an empty prompt starts a new line


@pytest.mark.proof
@pytest.mark.parametrize("tied", [False, True])
@both
def test_logits_are_equal_where_every_weight_matters(name: str, tied: bool, tmp_path: Path) -> None:
    """Random biases, gains and embeddings, which a short training leaves near their initial values."""
    checkpoint = untrained(ARCHITECTURES[name], tie_embeddings=tied)
    huggingface_export(checkpoint).save(tmp_path)
    model, _ = open_in_transformers(tmp_path)
    tokens_BT = torch.randint(3, (64, 32))
    with torch.inference_mode():
        found, expected = model(tokens_BT).logits, checkpoint.build()(tokens_BT)
    assert expected.std() > 0.5
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.proof
@every_kind
@both
def test_every_tokenizer_is_the_same_in_transformers(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    checkpoint = untrained(ARCHITECTURES[name], tokenizer)
    huggingface_export(checkpoint).save(tmp_path)
    model, found = open_in_transformers(tmp_path)
    for text in ("fox", TEXT, "\n\n  the , lazy\r\n"):
        tokens = tokenizer.encode(text).tolist()
        assert found(text)["input_ids"] == tokens
        assert found.decode(tokens) == found.decode(tokens, skip_special_tokens=True) == text
    assert len(found) == model.config.vocab_size == tokenizer.vocab_size
    assert model.generation_config.bos_token_id == tokenizer.start_token
    assert model.generation_config.eos_token_id is None
    if tokenizer.alphabet:
        with pytest.raises(Exception, match=r"(?i)unk"):
            found("fox ß")
