"""Estimates of memory: close to what is measured, and what does not fit is refused before it is allocated."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.data.token_files import load_tokens
from gpt.model import memory
from gpt.model.baselines import make_model
from gpt.model.gpt import count_parameters
from gpt.training.run import training_memory
from tests.conftest import RunMain
from tests.support.common import (
    FAST,
    ROOT,
    environment,
    model_params,
    peak_memory,
    read_yaml,
    run,
    small_params,
    train_line,
    train_params,
    write_params,
)

CPU = torch.device("cpu")
HUGE = {  # values within their bounds, and the key that the message names
    "model.n_layer": {"model__n_layer": 1000, "model__n_embd": 512, "model__n_head": 8},
    "model.n_embd": {"model__n_embd": 65536},
    "model.ngram_rows": {"model__ngram_rows": 1 << 31, "model__ngram_width": 1000},
    "model.ngram_width": {"model__ngram_width": 65536, "model__ngram_rows": 60000},
    "train.batch_size": {"train__batch_size": 65536, "model__n_layer": 1000},
}
HUGE_GENERATIONS = {"generate.samples": {"generate__samples": 10**6, "generate__prompts": ["the"] * 10_000}}
HUGE_GENERATIONS["generate.max_new_tokens"] = {"generate__max_new_tokens": 10**9}
TRAIN = {**FAST, "train__max_steps": 2, "train__eval_interval": 1, "train__save_interval": 1, "model__dropout": 0.0}
WIDE = {"model__n_layer": 4, "model__n_embd": 512, "model__n_head": 8, "model__ngram": 1, "train__shards": 1}
LONG = {"model__n_layer": 4, "model__n_embd": 128, "model__n_head": 8, "model__block_size": 256, "train__shards": 1}
MEASURED: dict[str, dict[str, Any]] = {
    "weights": {**WIDE, "train__batch_size": 2},
    "weights of eight shards, and their average": {**WIDE, "train__shards": 8, "train__batch_size": 8},
    "activations": {**LONG, "train__batch_size": 32, "train__weight_average": 0.0},
    "scores with dropout": {**LONG, "train__batch_size": 16, "model__dropout": 0.1},
    "scores with biases": {**LONG, "train__batch_size": 32, "model__position": "relative"},
}
# Trains in a process of its own; prints by how many bytes its memory grew after the imports.
GROWTH = r"""
import re
from pathlib import Path
import torch._dynamo, gpt.commands.train
from gpt.__main__ import main
def size(name):  # ru_maxrss would include the memory of the process that started this one
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
before = size("VmRSS")
try:
    main()
finally:
    print("grew", size("VmHWM") - before)
"""


@pytest.mark.parametrize("key", HUGE)
def test_a_training_that_does_not_fit_is_refused_at_once(
    key: str, run_main: RunMain, tmp_path: Path, tokens: Path
) -> None:
    write_params(tmp_path / "params.yaml", **HUGE[key])
    peak = peak_memory()
    line = run_main(*train_line(tokens), code=2)
    assert f"{key}: expected a value with which the training" in line
    assert " GB" in line
    assert peak_memory() - peak < 1 << 26


@pytest.mark.parametrize("key", HUGE_GENERATIONS)
def test_a_generation_that_does_not_fit_is_refused_at_once(
    key: str, run_main: RunMain, tmp_path: Path, trained: Path
) -> None:
    write_params(tmp_path / "params.yaml", **{"generate__prompts": ["the", "fox"], **HUGE_GENERATIONS[key]})
    line = run_main("generate", "--params", "params.yaml", "--checkpoint", str(trained / "model.pt"), code=2)
    assert f"{key}: expected a value with which the generation" in line


def test_an_evaluation_that_does_not_fit_is_refused(
    run_main: RunMain, tmp_path: Path, trained: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of a container is taken as the available one."""
    (tmp_path / "memory.max").write_text("10000000\n")
    monkeypatch.setattr(memory, "CGROUP_MAX", tmp_path / "memory.max")
    write_params(tmp_path / "params.yaml", **FAST, evaluate__sample_characters=10**8)
    outputs = ["--metrics", "m.json", "--positions", "p.csv", "--blocks", "b.csv", "--calibration", "c.csv"]
    checkpoint = ["--checkpoint", str(trained / "model.pt")]
    line = run_main("evaluate", "--params", "params.yaml", "--tokens", tokens, *checkpoint, *outputs, code=2)
    assert "evaluate.sample_characters: expected a value with which the evaluation" in line
    assert "0.0 GB" in line


def test_all_presets_and_the_default_fit_into_8_gb_with_two_processes() -> None:
    for path in (ROOT / "params.yaml", *(ROOT / "presets").glob("*.yaml")):
        params = read_yaml(path)
        model, train = model_params(**params["model"]), train_params(**params["train"])
        assert 2 * sum(term.size for term in training_memory(train, model, 65, ranks=2)) < 6e9, path


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(["bigram", "average", "head", "gpt"]),
    position=st.sampled_from(["learned", "relative", "rotary"]),
    ngram=st.integers(1, 3),
    layers=st.integers(1, 3),
    gated=st.booleans(),
    tied=st.booleans(),
)
def test_the_weights_are_those_of_the_model(
    kind: str, position: str, ngram: int, layers: int, gated: bool, tied: bool
) -> None:
    activation = "swiglu" if gated else "gelu"
    model = model_params(
        kind=kind,
        position=position,
        ngram=ngram,
        n_layer=layers,
        activation=activation,
        tie_embeddings=tied,
        n_embd=96,
        ngram_rows=500,
    )
    estimate = sum(term.size for term in memory.weights(model, 40)) / memory.FLOAT
    assert estimate == pytest.approx(count_parameters(make_model(model, 40)), rel=0.1)


@pytest.mark.proof
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of one process is in Linux's /proc")
@pytest.mark.parametrize("case", MEASURED)
def test_the_memory_of_a_training_is_between_half_and_twice_the_estimate(
    case: str, tmp_path: Path, tokens: Path
) -> None:
    params = {**TRAIN, **MEASURED[case]}
    write_params(tmp_path / "params.yaml", **params)
    line = [sys.executable, "-c", GROWTH, *train_line(tokens, "--run-dir", "run")]
    grown = float(run(line, tmp_path, env=environment(OMP_NUM_THREADS="1")).stdout.rpartition("grew ")[2])
    sections = small_params(**params)
    model, train = model_params(**sections["model"]), train_params(**sections["train"])
    vocab_size = load_tokens(tokens).meta.vocab_size
    estimate = sum(term.size for term in training_memory(train, model, vocab_size, ranks=1))
    assert 0.5 < grown / estimate < 2, f"{grown / 1e6:.0f} MB, estimated {estimate / 1e6:.0f} MB"
