"""Fuzzing of params files and options: whatever is wrong, there is one line, and what passes the check is usable."""

import io
import os
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from gpt import __main__
from gpt.commands.check_params import SECTIONS
from gpt.core.errors import printable
from gpt.core.params import check_section, read_params
from gpt.model.baselines import make_model
from gpt.model.config import ModelConfig
from gpt.model.memory import available_memory
from gpt.training.run import training_memory
from gpt.training.trainer import TrainParams
from tests.support.common import ROOT, made_up_text, small_params, stage_line

CASES = int(os.environ.get("CHARGPT_FUZZ_CASES", "25"))
PARAMS: dict[str, Any] = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
KEYS = [(section, key) for section, keys in PARAMS.items() for key in keys]
NUMBERS = [
    0,
    -1,
    1,
    2,
    1e-50,
    1e50,
    -0.0,
    10**9,
    2**31,
    2**53,
    2**63,
    2**64,
    10**12,
    10**400,
    float("inf"),
    float("nan"),
]
TEXTS = ["", " ", "auto", "null", "1e-3", "\ufeff", "\x00", "a\tb", "é" * 1000, "../../etc", "\x1b[2J", "<<<<<<< HEAD"]
SCALARS = st.one_of(st.sampled_from([None, True, False, *NUMBERS, *TEXTS]), st.integers(), st.floats(), st.text())
VALUES = st.recursive(
    SCALARS,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
BROKEN = [
    "",
    "\ufeff",
    "\x00",
    "\t a: 1",
    "a: &x [*x]",
    "<<<<<<< HEAD\na: 1\n=======\n",
    "- 1",
    "a: 1\na: 2",
    "?",
    "[" * 2000,
]
FUZZ = settings(
    max_examples=CASES, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def one_line_or_success(*arguments: str) -> int:
    """Run a command in this process; returns its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", ["gpt", *arguments]), redirect_stdout(out), redirect_stderr(err):
        try:
            __main__.main()
        except SystemExit as end:
            code = int(end.code or 0)
    assert code in (0, 2), (arguments, err.getvalue())
    if code:
        assert err.getvalue().startswith("gpt "), (arguments, err.getvalue())
        assert err.getvalue().count("\n") == 1
        assert err.getvalue() == printable(err.getvalue())
    return code


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return str(path)


@FUZZ
@given(key=st.sampled_from(KEYS), value=VALUES)
@example(key=("launch", "processes"), value=True)
@example(key=("generate", "samples"), value=10**15)
@example(key=("model", "n_embd"), value=1 << 16)
def test_any_value_of_any_key_is_refused_in_one_line_or_usable(
    key: tuple[str, str], value: Any, tmp_path: Path
) -> None:
    section, name = key
    file = tmp_path / "params.yaml"
    try:
        YAML(typ="safe", pure=True).dump(PARAMS | {section: PARAMS[section] | {name: value}}, file)
    except ValueError:  # a text that YAML cannot represent
        return
    if one_line_or_success("check-params", str(file)) == 0:
        checked = check_section(file, section, SECTIONS[section], read_params(file))
        if isinstance(checked, ModelConfig) and checked.n_embd <= 512 and checked.block_size <= 4096:
            make_model(checked.model_copy(update={"n_layer": 1}), 65)


@FUZZ
@given(text=st.one_of(st.sampled_from(BROKEN), st.binary(max_size=200), st.text(max_size=200)), at=st.integers(0, 6000))
def test_any_file_is_refused_in_one_line_or_valid(text: str | bytes, at: int, tmp_path: Path) -> None:
    content = (ROOT / "params.yaml").read_bytes()
    inserted = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    one_line_or_success("check-params", write(tmp_path / "params.yaml", content[:at] + inserted + content[at:]))
    one_line_or_success("check-params", write(tmp_path / "params.yaml", inserted))


@FUZZ
@given(
    change=st.one_of(
        st.text(max_size=30), st.builds("{0[0]}.{0[1]}={1}".format, st.sampled_from(KEYS), st.text(max_size=20))
    )
)
def test_any_override_is_refused_in_one_line_or_valid(change: str) -> None:
    one_line_or_success("check-params", str(ROOT / "params.yaml"), f"--set={change}")


def test_a_file_of_10_mb_is_refused_in_one_line(tmp_path: Path) -> None:
    assert one_line_or_success("check-params", write(tmp_path / "params.yaml", "x" * 10_000_000)) == 2


@pytest.mark.parametrize("seed", ["18446744073709551616", "-1", "1e3", ""])
def test_seeds_on_the_command_line(seed: str, tmp_path: Path) -> None:
    assert one_line_or_success("generate", "--checkpoint", str(tmp_path / "no.pt"), "--seed", seed) == 2


# Values within their bounds: what passes the check trains, evaluates and generates, or is refused in one line.

MAX_MEMORY = 3e7  # bytes; what needs more, but fits, would take too long
MAX_VALUES = {"max_steps": 2, "shards": 8, "sample_characters": 500, "max_new_tokens": 9, "samples": 3}  # take time
BASE = small_params(train__max_steps=2, evaluate__sample_characters=240, generate__prompts=["", "the"])
DRAWN = [
    (section, key)
    for section, key in KEYS
    if section != "download" and key not in ("compile", "ranks")  # need a compiler, or a network
    if not key.endswith("sha256")
]
STAGES_IN_PROCESS = ("tokenize", "train", "evaluate", "generate")


def values_of(schema: dict[str, Any], key: str) -> st.SearchStrategy[Any]:
    """The values that a JSON schema allows, as far as it knows."""
    if choices := schema.get("anyOf"):
        return st.one_of([values_of(choice, key) for choice in choices])
    if choices := schema.get("enum"):
        return st.sampled_from([choice for choice in choices if choice != "tiktoken"])  # needs a network
    low, high = schema.get("minimum", schema.get("exclusiveMinimum", 0)), schema.get("maximum", 10**30)
    match schema["type"]:
        case "integer":
            high = MAX_VALUES.get(key, min(high, schema.get("exclusiveMaximum", high + 1) - 1))
            return st.one_of(
                st.integers(low, min(low + 40, high)), st.sampled_from([low, high]), st.integers(low, high)
            )
        case "number":
            return st.floats(low, schema.get("exclusiveMaximum", high), allow_nan=False)
        case "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=20)
        case "array":
            return st.lists(values_of(schema["items"], key), min_size=schema.get("minItems", 0), max_size=3)
    return {"boolean": st.booleans(), "null": st.none()}[schema["type"]]


SCHEMAS = {section: SECTIONS[section].model_json_schema()["properties"] for section, _ in DRAWN}


@st.composite
def changed_params(draw: st.DrawFn) -> dict[str, Any]:
    """Sections of small values, some keys of which have any value within their bounds."""
    params = {section: dict(keys) for section, keys in BASE.items()}
    for section, key in draw(st.lists(st.sampled_from(DRAWN), unique=True, max_size=8)):
        params[section][key] = draw(values_of(SCHEMAS[section][key], key))
    return params


@settings(FUZZ, max_examples=max(10, CASES // 10))
@given(params=changed_params())
def test_what_passes_the_check_trains_evaluates_and_generates_or_is_refused_in_one_line(params: dict[str, Any]) -> None:
    run_stages(params)


@pytest.mark.parametrize(
    "changes",
    [
        {"train__learning_rate": 1e12, "train__max_steps": 1},
        {"train__learning_rate": 1e12, "train__weight_decay": 1e12, "train__max_steps": 1, "model__kind": "bigram"},
        {"tokenize__kind": "bpe", "tokenize__vocab_size": 1 << 20},
        {"launch__timeout": 100_000},
    ],
)
def test_values_that_have_caused_a_crash(changes: dict[str, Any]) -> None:
    run_stages(small_params(**{"train__max_steps": 2, **changes}))


def run_stages(params: dict[str, Any]) -> None:
    """Run the stages up to the first one that refuses its input in one line."""
    with TemporaryDirectory() as folder, chdir(folder):
        YAML(typ="safe", pure=True).dump(params, Path("params.yaml"))
        if one_line_or_success("check-params", "params.yaml"):
            return
        model, train = ModelConfig.model_validate(params["model"]), TrainParams.model_validate(params["train"])
        needed = sum(term.size for term in training_memory(train, model, 65, ranks=1))
        if MAX_MEMORY < needed < available_memory(torch.device("cpu")):
            return
        Path("data").mkdir()
        Path("data", "shakespeare.txt").write_text(made_up_text(600))
        for stage in STAGES_IN_PROCESS:
            timeout = ["--timeout", str(params["launch"]["timeout"])] if stage == "train" else []
            if one_line_or_success(*stage_line(stage, *timeout)):
                return
