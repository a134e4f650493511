"""Fuzzing of params files and options: whatever is wrong, there is one line, and what passes the check is usable."""

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from gpt import __main__
from gpt.commands.check_params import SECTIONS
from gpt.core.errors import printable
from gpt.core.params import check_section, read_params
from gpt.model.baselines import make_model
from gpt.model.config import ModelConfig
from tests.support.common import ROOT

CASES = int(os.environ.get("CHARGPT_FUZZ_CASES", "50"))
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
