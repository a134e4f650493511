"""The structure of the code base: layers, stage dependencies, packaging, pinned versions, static checks."""

import ast
import json
import re
import sys
import tomllib
from collections import Counter
from contextlib import chdir
from pathlib import Path

import pytest
from dvc.repo import Repo

from gpt.training.fingerprint import imported_files, name_of
from tests.support.clones import write_placeholders
from tests.support.common import ROOT, STAGES, run
from tests.support.project import clone

COMMANDS = set(STAGES)
SOURCES = ["gpt", "stages", "benchmarks", "tests"]
TOOLS = Path(sys.executable).parent


def test_ruff() -> None:
    run([TOOLS / "ruff", "check", *SOURCES], ROOT)
    run([TOOLS / "ruff", "format", "--check", *SOURCES], ROOT)


def test_types() -> None:
    run([TOOLS / "mypy"], ROOT)


def test_import_contracts() -> None:
    run([TOOLS / "lint-imports"], ROOT)


def files_of(dep: str) -> set[str]:
    """The source files that a dependency of a stage covers: the file itself, or all files of the folder."""
    path = ROOT / dep
    return {file.relative_to(ROOT).as_posix() for file in path.rglob("*.py")} if path.is_dir() else {dep}


def only_a_docstring(path: Path) -> bool:
    return [type(node) for node in ast.parse(path.read_text(encoding="utf-8")).body] == [ast.Expr]


@pytest.mark.parametrize("stage", STAGES)
def test_deps_equal_the_imports_of_the_command(stage: str) -> None:
    """A folder is listed if the command imports all of it; an `__init__.py` with only a docstring need not be."""
    listed = {file for dep in STAGES[stage]["deps"] if dep.startswith("gpt/") for file in files_of(dep)}
    imported = {name_of(path) for path in imported_files(f"gpt.commands.{stage}")}
    assert listed - imported == set()
    missing = imported - listed
    assert all(file.endswith("/__init__.py") and only_a_docstring(ROOT / file) for file in missing), missing


IMPORT_EACH = """\
import importlib, json, sys
files = {}
for stage in sys.argv[1:]:
    importlib.import_module(f"gpt.commands.{stage}")
    if "gpt.generation.decoding" in sys.modules:
        importlib.import_module("gpt.generation.compiled_step")  # imported at the first step
    modules = [sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "gpt"]
    files[stage] = [module.__file__ for module in modules if module.__name__ != "gpt"]
assert not {"matplotlib", "tokenizers", "tiktoken"} & set(sys.modules)  # imported where they are used
print(json.dumps(files))
"""


def test_imports_found_in_the_source_are_those_of_python() -> None:
    found = json.loads(run([sys.executable, "-c", IMPORT_EACH, *STAGES], ROOT).stdout)
    for stage in STAGES:
        assert set(map(Path, found[stage])) == set(imported_files(f"gpt.commands.{stage}"))


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A clone in which dvc.lock records every stage as up to date, with placeholders as outputs."""
    project = clone(tmp_path_factory.mktemp("structure") / "project", corpus)
    write_placeholders(project)
    assert changed_stages(project) == set()
    return project


def changed_stages(project: Path) -> set[str]:
    """The stages that `dvc status` names."""
    return {name.rpartition(":")[2] for name in Repo(project).status()}


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("gpt/model/gpt.py", {"train", "evaluate", "generate"}),
        ("gpt/generation/sampling.py", {"evaluate", "generate"}),
        ("gpt/evaluation/plots.py", {"evaluate"}),
        ("stages/runs/publish.py", set()),
        ("gpt/core/params.py", COMMANDS),
    ],
)
def test_an_edit_changes_only_the_stages_that_use_the_file(committed: Path, file: str, changed: set[str]) -> None:
    path = committed / file
    before = path.read_bytes()
    path.write_bytes(before + b"# edited\n")
    found = changed_stages(committed)
    path.write_bytes(before)
    assert found == changed


def test_dvc_leaves_the_layout_of_dvc_yaml_as_it_is(committed: Path) -> None:
    before = (committed / "dvc.yaml").read_text()
    with chdir(committed):
        Repo().freeze("train")
        assert Path("dvc.yaml").read_text() != before
        Repo().unfreeze("train")
    assert (committed / "dvc.yaml").read_text() == before


def test_stage_commands_hold_no_variables_and_no_absolute_paths() -> None:
    for stage in STAGES.values():
        assert "$" not in stage["cmd"]
        assert " /" not in stage["cmd"]


def test_no_two_modules_share_a_name() -> None:
    """Except for a command and the stage around it, and the special files of packages."""
    names = Counter(path.stem for folder in ("gpt", "stages", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
    assert {name for name, count in names.items() if count > 1} <= COMMANDS | {"serve", "__init__", "__main__"}


def test_all_folders_of_gpt_are_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["gpt", "gpt.*"]
    folders = {path.parent for path in (ROOT / "gpt").rglob("*.py")}
    assert {path.parent for path in (ROOT / "gpt").rglob("__init__.py")} == folders


def test_the_lock_pins_public_versions_only() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for name, version in pins.items():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", f"{name}=={version}"), name
    assert {"dvc", "mlflow", "torch", "typer"} <= set(pins)
    assert re.fullmatch(r"2\.1[123]\.\d+", pins["torch"])


def test_help_lists_every_command_and_loads_no_torch() -> None:
    done = run([sys.executable, "-X", "importtime", "-m", "gpt", "--help"], ROOT)
    for verb in (*STAGES, "explain", "export", "serve", "check-params"):
        assert verb in done.stdout
    for heavy in ("torch", "pandas", "numpy", "pydantic", "tokenizers", "tiktoken", "matplotlib"):
        assert not re.search(rf"\| +{heavy}$", done.stderr, re.MULTILINE), heavy
