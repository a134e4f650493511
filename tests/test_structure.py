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

from gpt.training.fingerprint import imported_files, name_of
from tests.support.common import ROOT, environment

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


def covered_by(dep: str) -> set[str]:
    """The source files that a dependency of a stage stands for: itself, or all of a folder."""
    path = ROOT / dep
    return {file.relative_to(ROOT).as_posix() for file in path.rglob("*.py")} if path.is_dir() else {dep}


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_exactly_what_the_command_imports(stage: str) -> None:
    """A folder is listed where the command imports all of it; a folder's own docstring decides nothing."""
    listed = {file for dep in STAGES[stage]["deps"] if dep.startswith("gpt/") for file in covered_by(dep)}
    imported = {name_of(path) for path in imported_files(f"gpt.commands.{stage}")}
    assert listed - imported == set()
    missing = imported - listed
    assert all(file.endswith("/__init__.py") and only_a_docstring(ROOT / file) for file in missing), missing


def only_a_docstring(path: Path) -> bool:
    return [type(node) for node in ast.parse(path.read_text(encoding="utf-8")).body] == [ast.Expr]


@pytest.mark.parametrize("stage", STAGES)
def test_static_imports_are_what_python_imports(stage: str) -> None:
    """Matplotlib is imported only when something is drawn."""
    code = f"import gpt.commands.{stage}, sys; print(*(m.__file__ for n, m in sys.modules.items() if n[:4] == 'gpt.'))"
    code += "; assert 'matplotlib' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True, env=environment()
    )
    assert set(map(Path, done.stdout.split())) == set(imported_files(f"gpt.commands.{stage}"))


def test_no_command_holds_anything_of_the_machine() -> None:
    for stage in STAGES.values():
        assert "$" not in stage["cmd"]
        assert " /" not in stage["cmd"]


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
