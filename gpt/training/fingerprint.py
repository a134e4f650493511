"""What a run is made of, by content: the digests of its params, its tokens and its code."""

import ast
import hashlib
from collections.abc import Sequence
from pathlib import Path

from gpt.core.errors import UserError
from gpt.core.files import canonical_json, sha256_file
from gpt.core.params import read_params

PACKAGE = Path(__file__).parents[1]
TOKEN_FILES = ("train.bin", "val.bin", "tokenizer.json", "meta.json")


def run_key(params_file: Path, tokens: Path, changes: Sequence[str] = ()) -> str:
    """The name of a training run: SHA-256 over its `digests`. Equal keys promise equal bytes."""
    return hashlib.sha256(canonical_json(digests(params_file, tokens, changes)).encode()).hexdigest()


def digests(params_file: Path, tokens: Path, changes: Sequence[str] = ()) -> dict[str, object]:
    """All that decides the bytes of a trained model, as plain values that can be compared field by field."""
    params = read_params(params_file, changes)
    train = params.get("train") or {}
    return {
        "model": params.get("model"),
        "train": train,
        "init_from": _digest_of_start(train.get("init_from")),
        "tokens": {name: sha256_file(tokens / name) for name in TOKEN_FILES if (tokens / name).exists()},
        "code": {name_of(path): sha256_file(path) for path in imported_files("gpt.commands.train")},
    }


def _digest_of_start(init_from: object) -> str | None:
    """The digest of the model that a training continues from: another one under the same name is another start."""
    if not isinstance(init_from, str):
        return None
    if not Path(init_from).is_file():
        raise UserError(
            f"train.init_from: expected a trained model, found no file {init_from}; correct the path, or set it to null"
        )
    return sha256_file(Path(init_from))


def name_of(path: Path) -> str:
    """A source file's path seen from the project: `gpt/model/gpt.py`."""
    return path.relative_to(PACKAGE.parent).as_posix()


def imported_files(module: str) -> list[Path]:
    """The source files of this package that a module imports, itself included, sorted; found without importing any.

    `gpt/__init__.py` is left out: it offers functions to users of the package and takes no part in a command.
    """
    found: set[Path] = set()
    pending = _sources(module)
    while pending:
        path = pending.pop()
        if path not in found:
            found.add(path)
            pending += [source for name in _imported_names(path) for source in _sources(name)]
    return sorted(found)


def _imported_names(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _sources(name: str) -> list[Path]:
    """The files that Python runs for `import name`: those of its packages, and its own if it is a module."""
    package, *parts = name.split(".")
    if package != PACKAGE.name:
        return []
    folders = [PACKAGE.joinpath(*parts[:depth], "__init__.py") for depth in range(1, len(parts) + 1)]
    modules = [PACKAGE.joinpath(*parts[:depth]).with_suffix(".py") for depth in range(1, len(parts) + 1)]
    return [path for path in (*folders, *modules) if path.is_file()]
