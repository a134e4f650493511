"""What `gpt explain` prints and draws is what the model computes; what docs/model.md points at is there."""

import ast
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpt.__main__ import main
from gpt.evaluation.interpretability import look, side_by_side, visible
from gpt.evaluation.plots import pictures
from gpt.model.attention import SelfAttention
from gpt.model.baselines import Average, make_model
from gpt.model.checkpoint import Checkpoint
from gpt.model.config import ModelConfig
from gpt.model.gpt import LanguageModel
from gpt.model.positions import REACH
from gpt.tokenizers.char import CharTokenizer
from tests.conftest import RunGpt
from tests.support.common import ROOT, model_params, only_line

SYMBOLS = CharTokenizer("\n abcdefgh")
POSITIONS = ["learned", "sinusoidal", "relative", "rotary", "alibi", "none"]

Explain = Callable[..., str]


def strong_model(params: ModelConfig) -> LanguageModel:
    """With weights so large that the scores differ."""
    torch.manual_seed(0)
    model = make_model(params, SYMBOLS.vocab_size).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5)
    return model


def save(path: Path, model: LanguageModel) -> Path:
    Checkpoint(model.config, SYMBOLS, model.state_dict(), {}).save(path)
    return path


@pytest.fixture
def explain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Explain:
    """The command in this process: what it prints, or the one line of its refusal."""

    def run(*words: str | Path, code: int = 0) -> str:
        monkeypatch.setattr("sys.argv", ["gpt", "explain", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert end.value.code == (code or None) or end.value.code == code, err
        return only_line(err) if code else out

    return run


def matrices(printed: str) -> list[list[list[float]]]:
    """The numbers of each matrix, row by row."""
    rows = re.findall(r"^ *(\d+) \S +((?:-?(?:inf|\d+\.\d\d) *)+)$", printed, re.MULTILINE)
    found: list[list[list[float]]] = []
    for number, cells in rows:
        if number == "1":
            found.append([])
        found[-1].append([float(cell) for cell in cells.split()])
    return found


def test_three_matrices_by_hand(gpt: RunGpt, tmp_path: Path) -> None:
    """Vectors a (1, 0), b (0, 1), c (1, 1), which ask as they are found: every score is a product of two of them."""
    params = model_params(kind="head", n_embd=2, n_head=1, position="none", qk_norm=False, ngram=1, bias=False)
    model = make_model(params, SYMBOLS.vocab_size)
    with torch.no_grad():
        embedding = model.get_parameter("token_embedding.weight")
        embedding[2:5] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        model.get_parameter("attention.query.weight").copy_(math.sqrt(2) * torch.eye(2))
        model.get_parameter("attention.key.weight").copy_(torch.eye(2))
    done = gpt("explain", "--checkpoint", save(tmp_path / "model.pt", model), "--text", "abc")
    assert done.returncode == 0, done.stderr
    raw, masked, weights = matrices(done.stdout)
    inf = math.inf
    assert raw == [[1, 0, 1], [0, 1, 1], [1, 1, 2]]
    assert masked == [[1, -inf, -inf], [0, 1, -inf], [1, 1, 2]]
    one = math.exp(1)
    assert weights == [[1, 0, 0], [round(1 / (1 + one), 2), round(one / (1 + one), 2), 0], [0.21, 0.21, 0.58]]
    assert "Layer 1 of 1, head 1 of 1, positions none." in done.stdout
    assert "Highest where 3 c asks 3 c." in done.stdout
    assert "3 c takes most from 3 c: 0.58." in done.stdout
    for line in done.stdout.splitlines():
        assert len(line) <= 120
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt"}, "no picture without --out, no log"


@torch.inference_mode()
@pytest.mark.parametrize("position", POSITIONS)
def test_the_scores_are_those_the_model_computes_with(position: str) -> None:
    model = strong_model(model_params(n_layer=2, n_head=2, n_embd=16, block_size=8, position=position))
    given: list[tuple[SelfAttention, Tensor, Tensor]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], mixed_BTC: Tensor) -> None:
        assert isinstance(layer, SelfAttention)
        given.append((layer, inputs[0], mixed_BTC))

    for part in model.modules():
        if isinstance(part, SelfAttention):
            part.register_forward_hook(note)
    attention = look(model, [2, 5, 1, 3, 4, 4, 0, 9], SYMBOLS.decode).attention
    assert attention is not None
    assert attention.raw.shape == (2, 2, 8, 8)
    for number, (layer, x_BTC, mixed_BTC) in enumerate(given):
        values_BHTD = torch.from_numpy(attention.weights[number])[None] @ layer.attention_inputs(x_BTC).v_BHSD
        assert torch.allclose(layer.output(values_BHTD.transpose(1, 2).flatten(2)), mixed_BTC, atol=1e-4)
    future = np.triu(np.ones((8, 8), dtype=bool), 1)
    assert np.all(np.isneginf(attention.masked[:, :, future]))
    assert np.array_equal(attention.masked[:, :, ~future], attention.raw[:, :, ~future])
    assert np.all(np.isfinite(attention.raw))
    assert np.allclose(attention.weights.sum(-1), 1)


def test_a_chosen_head_of_a_longer_text(explain: Explain, tmp_path: Path) -> None:
    model = strong_model(model_params(n_layer=2, n_head=2, n_embd=16, block_size=32))
    path = save(tmp_path / "model.pt", model)
    line = ["--checkpoint", path, "--text", "a bc\ndefgh abc"]
    first, second = explain(*line), explain(*line, "--layer", "2", "--head", "2")
    attention = look(model, [2, 1, 3, 4, 0, 5, 6, 7], SYMBOLS.decode).attention
    assert attention
    assert np.allclose(matrices(first)[2], attention.weights[0, 0], atol=0.0051)
    assert np.allclose(matrices(second)[2], attention.weights[1, 1], atol=0.0051)
    assert "the first 8 of 14 tokens" in first
    assert "\n 2 ␣ " in first
    assert "\n 5 ↵ " in first
    assert "these are" not in explain("--checkpoint", path, "--text", "abcdefgh").lower()
    for words, told in (
        (["--text", "ab", "--layer", "3"], "--layer: expected 1 to 2"),
        (["--text", "ab", "--head", "3"], "--head: expected 1 to 2"),
        (["--text", ""], "--text: expected at least one character"),
        (["--text", "aZ"], "--text 'aZ': expected only the 10 characters of the training text, found 'Z'"),
    ):
        assert told in explain("--checkpoint", path, *words, code=2)


def test_models_without_attention_get_an_answer(explain: Explain, tmp_path: Path) -> None:
    average = strong_model(model_params(kind="average", n_embd=16))
    printed = explain("--checkpoint", save(tmp_path / "average.pt", average), "--text", "abc")
    assert "no queries and keys" in printed
    assert matrices(printed)[2] == [[1, 0, 0], [0.5, 0.5, 0], [0.33, 0.33, 0.33]]
    attention = look(average, [2, 3, 4], SYMBOLS.decode).attention
    assert attention
    assert isinstance(average, Average)
    mean_TC = torch.from_numpy(attention.weights[0, 0]) @ average.token_embedding.weight[[2, 3, 4]]
    assert torch.allclose(average.output(mean_TC), average(torch.tensor([[2, 3, 4]]))[0], atol=1e-5)
    bigram = save(tmp_path / "bigram.pt", strong_model(model_params(kind="bigram")))
    printed = explain("--checkpoint", bigram, "--text", "abcdefgh abc", "--out", tmp_path / "bigram")
    assert printed.startswith("model.kind bigram: no attention.")
    assert [path.name for path in (tmp_path / "bigram").iterdir()] == ["embeddings.png"]


def test_pictures_are_drawn_of_what_there_is_and_always_the_same(explain: Explain, tmp_path: Path) -> None:
    drawn: dict[str, dict[str, bytes]] = {}
    for position in POSITIONS:
        model = strong_model(model_params(n_layer=1, n_head=2, n_embd=16, block_size=8, position=position))
        drawn[position] = dict(pictures(look(model, [2, 5, 1, 3], SYMBOLS.decode)))
        assert (
            sorted(drawn[position]) == ["attention.png", "embeddings.png", "positions.png"][: 3 - (position == "none")]
        )
    assert len({found["positions.png"] for found in drawn.values() if "positions.png" in found}) == 5
    path = save(tmp_path / "model.pt", model)
    explain("--checkpoint", path, "--text", "ad b", "--out", tmp_path / "new" / "folder")
    found = {one.name: one.read_bytes() for one in (tmp_path / "new" / "folder").iterdir()}
    assert found == drawn["none"]
    assert all(b"Software" not in content and b"matplotlib" not in content for content in found.values())


@pytest.mark.filterwarnings("error")
def test_labels_of_any_tokens_can_be_drawn() -> None:
    """Words, signs that the font lacks, what matplotlib would take for a formula, nothing at all."""
    tokens = ["the wizards", "中文", "$x^$", "\x00", ""]
    model = strong_model(model_params(n_layer=1, n_head=2, n_embd=16, block_size=8))
    seen = look(model, range(5), lambda numbers: "".join(tokens[number % 5] for number in numbers))
    assert seen.labels == ("the␣wizards", "中文", "$x^$", "\\x00", "∅")
    assert all(content.startswith(b"\x89PNG") for _, content in pictures(seen))
    assert visible("\t") == "⇥"


def test_what_is_alike_stands_side_by_side() -> None:
    groups = [0, 1, 0, 2, 1, 0, 2]
    alike = np.array([[1.0 if a == b else 0.1 * (a - b) for b in groups] for a in groups], dtype=np.float32)
    order = side_by_side(alike)
    assert sorted(order) == list(range(7))
    ordered = [groups[place] for place in order]
    assert sum(a != b for a, b in pairwise(ordered)) == 2


def test_neighbours_on_a_line_stay_neighbours() -> None:
    """However the groups were joined, each is turned so that it goes on where the other one ends."""
    places = np.array([3.5, 12.5, 0, 10, 1, 11, 3], dtype=np.float32)
    order = side_by_side(-np.abs(places[:, None] - places))
    assert sorted(places) in (list(places[order]), list(places[order][::-1]))


@torch.inference_mode()
@pytest.mark.parametrize("position", POSITIONS)
def test_what_is_drawn_of_the_positions_by_hand(position: str) -> None:
    model = strong_model(model_params(n_layer=2, n_head=2, n_embd=16, block_size=8, ngram=2, position=position))
    found = look(model, [2, 5], SYMBOLS.decode).positions
    if position == "none":
        assert found is None
        return
    assert found
    assert found.scheme == position
    expected = np.asarray(positions_of(model))
    assert found.values.shape == expected.shape
    assert np.allclose(found.values, expected, atol=1e-5)


def positions_of(model: LanguageModel) -> "Tensor | np.ndarray[Any, np.dtype[np.float64]]":
    angles = np.arange(8.0)[:, None] * 10_000 ** (-np.arange(8) / 8)
    match model.config.position:
        case "learned":
            return model.get_parameter("positions.table.weight").detach()
        case "sinusoidal":
            return np.hstack([np.sin(angles), np.cos(angles)])
        case "rotary":  # of half as many channels
            return np.cos(angles[:, ::2])
        case "relative":
            tables = (model.get_parameter(f"blocks.{layer}.attention.bias.table.weight") for layer in range(2))
            return torch.stack([table.norm(dim=1) for table in tables])
    return -np.array([[2**-4], [2**-8]]) * np.arange(8)


DOC = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")


def test_every_name_and_file_in_the_text_on_the_model_exists() -> None:
    names = re.findall(r"\[`([\w.]+)`\]\(\.\./((?:gpt|stages)/[\w/]+\.py)\)", DOC)
    assert len(names) > 30
    for name, file in names:
        assert name in defined_in(ROOT / file), f"{name} in {file}"
    files = re.findall(r"\]\(((?:\.\./)?[\w/.-]+)\)", DOC)
    for file in files:
        assert (ROOT / "docs" / file).exists(), file


def test_the_figures_in_the_text_on_the_model_are_right() -> None:
    assert f"{math.log(65):.2f} for 65 characters" in DOC
    assert f"from {REACH} on" in DOC
    assert f"{REACH + 1} vectors" in DOC
    raw, masked, weights = (np.array(found) for found in matrices(DOC))
    future = np.triu(np.ones_like(raw, dtype=bool), 1)
    assert np.array_equal(masked, np.where(future, -np.inf, raw))
    parts = np.exp(masked)
    assert np.allclose(weights, parts / parts.sum(-1, keepdims=True), atol=0.01)


def defined_in(file: Path) -> set[str]:
    """Classes, functions, methods, fields and constants that a module defines."""
    found: set[str] = set()

    def walk(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign):
                found.update(prefix + target.id for target in node.targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(prefix + node.target.id)

    walk(ast.parse(file.read_text(encoding="utf-8")).body, "")
    return found
