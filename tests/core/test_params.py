"""Params files: presets are valid, errors name the key, the value found and the remedy."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from gpt.commands.check_params import command as check_params
from gpt.core.errors import UserError
from gpt.core.params import read_section
from gpt.training.trainer import TrainParams
from tests.conftest import RunMain
from tests.support.common import ROOT, write_params

PRESETS = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_every_preset_is_valid(path: Path) -> None:
    check_params(path)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_every_key_has_a_comment(path: Path) -> None:
    lines = path.read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        if line.startswith("  ") and ":" in line and not line.strip().startswith(("#", "-")):
            assert "#" in line or "kind:" in line or before.strip().startswith("#"), line


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"train__learning_rat": 0.1}, ["train.learning_rat", "unknown key", "did you mean 'learning_rate'?"]),
    ({"train__batch_size": "many"}, ["train.batch_size", "expected a valid integer", "'many'"]),
    ({"train__batch_size": 16.0}, ["train.batch_size", "expected a valid integer", "16.0"]),
    ({"train__batch_size": True}, ["train.batch_size", "expected a valid integer", "True"]),
    ({"train__learning_rate": "1e-3x"}, ["train.learning_rate", "expected a valid number", "1e-3x"]),
    ({"train__learning_rate": float("nan")}, ["train.learning_rate", "finite"]),
    ({"train__max_steps": 0}, ["train.max_steps", "greater than or equal to 1", "0"]),
    ({"model__n_embd": 33}, ["model.n_embd", "multiple of n_head (2)", "33"]),
    ({"train__shards": 3}, ["train.shards", "power of two", "3"]),
    ({"train__batch_size": 18}, ["train.batch_size", "multiple of shards (4)", "18"]),
    ({"train__device": "gpu"}, ["train.device", "'cuda'", "gpu"]),
    ({"train__min_learning_rate": 1.0}, ["train.min_learning_rate", "at most learning_rate", "1.0"]),
    ({"generate__prompts": []}, ["generate.prompts", "at least 1"]),
    ({"tokenize__train_fraction": 1.0}, ["tokenize.train_fraction", "less than 1"]),
    ({"tokenize__kind": "morse"}, ["tokenize.kind", "'char', 'word', 'bpe', 'wordpiece' or 'tiktoken'", "morse"]),
    ({"tokenize__ranks": []}, ["tokenize.ranks", "at least 1 item", "[]"]),
    ({"tokenize__ranks_sha256": None}, ["tokenize.ranks_sha256", "valid string", "null"]),
    ({"tokenize__ranks_sha256": "306c"}, ["tokenize.ranks_sha256", "{64}", "'306c'"]),
    *[({f"{section}__seed": 2**64}, [f"{section}.seed", "less than"]) for section in ("train", "evaluate", "generate")],
    ({"generate__temperature": 1e-50}, ["generate.temperature", "expected 0 or at least", "1e-50"]),
    ({"generate__top_p": 1e-50}, ["generate.top_p", "greater than", "1e-50"]),
    ({"generate__repetition_penalty": 1e-45}, ["generate.repetition_penalty", "greater than", "1e-45"]),
    ({"model__block_size": 10**12}, ["model.block_size", "less than or equal to 65536"]),
]


@pytest.mark.parametrize(("changes", "expected"), BAD, ids=[next(iter(changes)) for changes, _ in BAD])
def test_the_error_names_key_and_value(tmp_path: Path, changes: dict[str, object], expected: list[str]) -> None:
    path = write_params(tmp_path / "params.yaml", **changes)
    with pytest.raises(UserError) as error:
        check_params(path)
    assert "\n" not in str(error.value)
    for part in [str(path), *expected]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"train:\n  seed: 1\n  seed: 2\n", ["duplicate", "seed", "line 3"]),
        (b"train: [1,\n", ["expected YAML", "line"]),
        (b"train: \xff\n", ["expected UTF-8", "byte 7"]),
        (b"- 1\n", ["mapping of sections", "[1]"]),
        (b"", ["mapping of sections", "null"]),
        (b"train: 3\n", ["train", "expected a section", "3"]),
        (b"trian: {}\n", ["train", "missing", "did you mean 'trian'?"]),
    ],
)
def test_an_invalid_file_is_refused(tmp_path: Path, text: bytes, expected: list[str]) -> None:
    (tmp_path / "params.yaml").write_bytes(text)
    with pytest.raises(UserError) as error:
        read_section(tmp_path / "params.yaml", "train", TrainParams)
    for part in expected:
        assert part in str(error.value)


def test_a_missing_key_is_an_error_even_if_it_has_a_default_and_so_is_an_unknown_section(tmp_path: Path) -> None:
    path = write_params(tmp_path / "params.yaml")
    text = path.read_text()
    path.write_text("".join(line for line in text.splitlines(True) if "temperature" not in line))
    with pytest.raises(UserError, match=r"generate\.temperature: .* missing"):
        check_params(path)
    path.write_text(f"{text}evalute: {{}}\n")
    with pytest.raises(UserError, match="evalute: unknown section; did you mean 'evaluate'"):
        check_params(path)


def test_set_overrides_the_file(tmp_path: Path) -> None:
    """Numbers are those of YAML 1.2, as in dvc."""
    path = write_params(tmp_path / "params.yaml")
    changed = read_section(path, "train", TrainParams, ["train.max_steps=7", "model.n_layer=9", "train.grad_clip=1e-2"])
    assert (changed.max_steps, changed.grad_clip) == (7, 0.01)
    for wrong in ("train.max_step=7", "trains.max_steps=7", "max_steps=7", "train.max_steps"):
        with pytest.raises(UserError, match="--set"):
            read_section(path, "train", TrainParams, [wrong])


def test_check_params_applies_overrides_and_exits_with_2_on_an_error(run_main: RunMain, tmp_path: Path) -> None:
    path = write_params(tmp_path / "wrong.yaml", train__shards=3)
    assert run_main("check-params", path, code=2).startswith(f"gpt check-params: {path}: train.shards: ")
    run_main("check-params", path, "-S", "train.shards=4")
