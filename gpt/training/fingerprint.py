"""The fingerprint of a training run: SHA-256 of its params, tokens and code. Works without importing torch."""

import ast
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt.core.files import canonical_json, sha256_file

PACKAGE = Path(__file__).parents[1]
TOKEN_FILES = ("train.bin", "val.bin", "tokenizer.json", "meta.json")


def run_key(params: Mapping[str, Any], tokens: Path) -> str:
    """The name of a training run: the SHA-256 of its `digests`. Equal keys promise equal outputs."""
    return hashlib.sha256(canonical_json(digests(params, tokens)).encode()).hexdigest()


def digests(params: Mapping[str, Any], tokens: Path) -> dict[str, object]:
    """Everything that determines the bytes of a trained model, as plain values that can be compared by field.

    Args:
        params: as `read_params` returns them.
        tokens: the token folder.
    """
    return {
        "model": params.get("model"),
        "train": params.get("train"),
        "tokens": {name: sha256_file(tokens / name) for name in TOKEN_FILES if (tokens / name).exists()},
        "code": {name_of(path): sha256_file(path) for path in imported_files("gpt.commands.train")},
    }


def name_of(path: Path) -> str:
    """A source file's path relative to the project: `gpt/model/gpt.py`."""
    return path.relative_to(PACKAGE.parent).as_posix()


def imported_files(module: str) -> list[Path]:
    """Return the sorted source files of `gpt` that a module imports, directly or not, itself included.

    The files are parsed, not imported. `gpt/__init__.py` is left out: no command depends on the public API.
    """
    found: set[Path] = set()
    pending = _files_of(module)
    while pending:
        path = pending.pop()
        if path not in found:
            found.add(path)
            pending += [file for name in _imported_names(path) for file in _files_of(name)]
    return sorted(found)


def _imported_names(path: Path) -> list[str]:
    """The dotted names that a file imports; `from a import b` gives `a.b`, which may be a module or not."""
    names: list[str] = []
    statements: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    for statement in statements:  # it grows; ast.walk would visit every expression, too
        if isinstance(statement, ast.Import):
            names += [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            names += [f"{statement.module}.{alias.name}" for alias in statement.names]
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            statements += getattr(statement, block, [])
    return names


def _files_of(name: str) -> list[Path]:
    """The files that Python runs for a dotted name: the `__init__.py` of each package, and the module."""
    package, *parts = name.split(".")
    if package != PACKAGE.name:
        return []
    paths = [PACKAGE.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    candidates = [path / "__init__.py" for path in paths] + [path.with_suffix(".py") for path in paths]
    return [path for path in candidates if path.is_file()]
