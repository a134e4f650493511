"""The rules of the house: floors, exact deps, strict types, a lock that installs anywhere."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from gpt.fingerprint import imported_files
from tests.conftest import ROOT, environment

STAGES: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]


def run(*command: str) -> None:
    tools = Path(sys.executable).parent
    program = [str(tools / command[0]), *command[1:]]
    done = subprocess.run(program, cwd=ROOT, text=True, capture_output=True, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff() -> None:
    run("ruff", "check", "gpt", "stages", "benchmarks", "tests")
    run("ruff", "format", "--check", "gpt", "stages", "benchmarks", "tests")


def test_types() -> None:
    run("mypy")


def test_imports_go_down_only() -> None:
    run("lint-imports")


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_exactly_what_the_verb_imports(stage: str) -> None:
    listed = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    assert listed == {f"gpt/{path.name}" for path in imported_files(f"gpt.{stage}")}


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_verb_really_imports_is_what_the_walk_finds(stage: str) -> None:
    """The walk reads source; here Python itself says what was imported; matplotlib is only when something is drawn."""
    code = f"import gpt.{stage}, sys; print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('gpt.')))"
    code += "; assert 'matplotlib' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True, env=environment()
    )
    assert set(map(Path, done.stdout.split())) == set(imported_files(f"gpt.{stage}"))


def test_the_package_itself_holds_no_code() -> None:
    """Its `__init__.py` is no stage's dependency, so nothing in it may decide an output."""
    body = ast.parse((ROOT / "gpt" / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr]


def test_no_command_holds_anything_of_the_machine() -> None:
    for stage in STAGES.values():
        assert "$" not in stage["cmd"]
        assert " /" not in stage["cmd"]


def test_nothing_stands_between_dvc_and_a_stage() -> None:
    """A shell that waits there would outlive a killed dvc, and the stage with it."""
    for name, stage in STAGES.items():
        module = name if (ROOT / "stages" / f"{name}.py").exists() else "run"
        assert stage["cmd"].startswith(f"exec python -m stages.{module} ")


def test_the_lock_holds_public_versions_only() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 50
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin), pin
    assert any(re.fullmatch(r"torch==2\.1[123]\.\d+", pin) for pin in pins)


def test_help_is_quick_and_imports_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "gpt", "--help"]
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True, env=environment())
        seconds.append(time.monotonic() - began)
    for verb in (*STAGES, "explain", "check-params"):
        assert verb in done.stdout
    for heavy in ("torch", "pandas", "numpy", "pydantic", "tokenizers", "tiktoken", "matplotlib"):
        assert not re.search(rf"\| +{heavy}$", done.stderr, re.MULTILINE), heavy
    assert min(seconds) < 0.8  # the floor here is 0.25 s; the rest is for a busy machine
