"""`gpt explain` prints and plots the values that the model computes with."""

import math
import re
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpt.evaluation.interpretability import inspect_model, order_by_similarity, printable_token
from gpt.evaluation.plots import position_values, render_plots
from gpt.model.attention import SelfAttention
from gpt.model.baselines import Average, make_model
from gpt.model.checkpoint import Checkpoint
from gpt.model.config import ModelConfig
from gpt.model.gpt import LanguageModel
from gpt.tokenizers.char import CharTokenizer
from tests.conftest import RunMain
from tests.support.common import contents, model_params, strong_model

TOKENIZER = CharTokenizer("\n abcdefgh")
SIZE = TOKENIZER.vocab_size
POSITIONS = get_args(ModelConfig.model_fields["position"].annotation)


class Explain(Protocol):
    def __call__(self, model: LanguageModel, text: str, *options: str | Path, code: int = 0) -> str: ...


@pytest.fixture
def explain(run_main: RunMain, tmp_path: Path) -> Explain:
    """Save the model as `model.pt` and run `gpt explain` in this process."""

    def run(model: LanguageModel, text: str, *options: str | Path, code: int = 0) -> str:
        Checkpoint(model.config, TOKENIZER, model.state_dict(), {"corpus_sha256": "0"}).save(tmp_path / "model.pt")
        return run_main("explain", "--checkpoint", tmp_path / "model.pt", "--text", text, *options, code=code)

    return run


def small_model(**changes: Any) -> LanguageModel:
    return strong_model(model_params(**{"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, **changes}), SIZE)


def matrices(printed: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The three printed matrices."""
    rows = re.findall(r"^ *\d+ \S +((?:-?(?:inf|\d+\.\d\d) *)+)$", printed, re.MULTILINE)
    return np.array([row.split() for row in rows], dtype=np.float64).reshape(3, len(rows) // 3, -1)


def test_three_matrices_by_hand(explain: Explain, tmp_path: Path) -> None:
    """With a = (1, 0), b = (0, 1), c = (1, 1) as queries and keys, the scores are their dot products."""
    params = model_params(kind="head", n_embd=2, n_head=1, position="none", qk_norm=False, ngram=1, bias=False)
    model = make_model(params, TOKENIZER.vocab_size)
    with torch.no_grad():
        embedding = model.get_parameter("token_embedding.weight")
        embedding[2:5] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        model.get_parameter("attention.query.weight").copy_(math.sqrt(2) * torch.eye(2))
        model.get_parameter("attention.key.weight").copy_(torch.eye(2))
    printed = explain(model, "abc")
    inf, e = math.inf, math.e
    raw, masked = [[1, 0, 1], [0, 1, 1], [1, 1, 2]], [[1, -inf, -inf], [0, 1, -inf], [1, 1, 2]]
    weights = [[1, 0, 0], [round(1 / (1 + e), 2), round(e / (1 + e), 2), 0], [0.21, 0.21, 0.58]]
    assert matrices(printed).tolist() == [raw, masked, weights]
    for part in ("Layer 1 of 1, head 1 of 1", "query 3 c, key 3 c", "query 3 c: key 3 c, 0.58"):
        assert part in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt"}  # no plots, no log


@torch.inference_mode()
@pytest.mark.parametrize("position", POSITIONS)
def test_scores_are_those_of_the_forward_pass(position: str) -> None:
    model = small_model(position=position)
    recorded: list[tuple[SelfAttention, Tensor, Tensor]] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], mixed_BTC: Tensor) -> None:
        assert isinstance(layer, SelfAttention)
        recorded.append((layer, inputs[0], mixed_BTC))

    for part in model.modules():
        if isinstance(part, SelfAttention):
            part.register_forward_hook(record)
    attention = inspect_model(model, [2, 5, 1, 3, 4, 4, 0, 9], TOKENIZER.decode).attention
    assert attention is not None
    assert attention.raw.shape == (2, 2, 8, 8)
    for number, (layer, x_BTC, mixed_BTC) in enumerate(recorded):
        values_BHTD = torch.from_numpy(attention.weights[number])[None] @ layer.attention_inputs(x_BTC).v_BHSD
        assert torch.allclose(layer.output(values_BHTD.transpose(1, 2).flatten(2)), mixed_BTC, atol=1e-4)
    future = np.triu(np.ones((8, 8), dtype=bool), 1)
    assert np.all(np.isneginf(attention.masked[:, :, future]))
    assert np.array_equal(attention.masked[:, :, ~future], attention.raw[:, :, ~future])
    assert np.all(np.isfinite(attention.raw))
    assert np.allclose(attention.weights.sum(-1), 1)


def test_layer_and_head_can_be_selected(explain: Explain) -> None:
    model, text = small_model(block_size=32), "a bc\ndefgh abc"
    first, second = explain(model, text), explain(model, text, "--layer", "2", "--head", "2")
    attention = inspect_model(model, [2, 1, 3, 4, 0, 5, 6, 7], TOKENIZER.decode).attention
    assert attention
    assert np.allclose(matrices(first)[2], attention.weights[0, 0], atol=0.0051)
    assert np.allclose(matrices(second)[2], attention.weights[1, 1], atol=0.0051)
    for part in ("the first 8 of 14 tokens", "\n 2 ␣ ", "\n 5 ↵ "):
        assert part in first
    assert "These are" not in explain(model, "abcdefgh")
    for (entered, *options), message in (
        (["ab", "--layer", "3"], "--layer: expected 1 to 2"),
        (["ab", "--head", "3"], "--head: expected 1 to 2"),
        ([""], "--text: expected at least one character"),
        (["aZ"], "--text 'aZ': expected only the 10 characters of the training text, found 'Z'"),
    ):
        assert message in explain(model, entered, *options, code=2)


def test_baseline_models(explain: Explain, tmp_path: Path) -> None:
    average = small_model(kind="average")
    printed = explain(average, "abc")
    assert "no queries and keys" in printed
    assert matrices(printed)[2].tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0.33, 0.33, 0.33]]
    attention = inspect_model(average, [2, 3, 4], TOKENIZER.decode).attention
    assert attention
    assert isinstance(average, Average)
    mean_TC = torch.from_numpy(attention.weights[0, 0]) @ average.token_embedding.weight[[2, 3, 4]]
    assert torch.allclose(average.output(mean_TC), average(torch.tensor([[2, 3, 4]]))[0], atol=1e-5)
    printed = explain(small_model(kind="bigram"), "abcdefgh abc", "--out", tmp_path / "bigram")
    assert printed.startswith("model.kind bigram: no attention.")
    assert [path.name for path in (tmp_path / "bigram").iterdir()] == ["embeddings.png"]


def test_plots_exist_for_the_parts_of_a_model_and_are_reproducible(explain: Explain, tmp_path: Path) -> None:
    model = small_model(n_layer=1)
    plots = dict(render_plots(inspect_model(model, [2, 5, 1, 3], TOKENIZER.decode)))
    assert list(plots) == ["attention.png", "positions.png", "embeddings.png"]
    assert all(b"Software" not in content and b"matplotlib" not in content for content in plots.values())
    explain(model, "ad b", "--out", tmp_path / "new" / "folder")
    assert contents(tmp_path / "new" / "folder", plots) == plots
    found = [inspect_model(small_model(position=position), [2], TOKENIZER.decode).positions for position in POSITIONS]
    assert len({position_values(positions) for positions in found if positions}) == len(POSITIONS) - 1


@pytest.mark.filterwarnings("error")
def test_labels_of_any_token_can_be_plotted() -> None:
    """Words, characters that the font lacks, mathtext syntax, control characters, the empty string."""
    tokens = ["the wizards", "中文", "$x^$", "\x00", ""]
    inspection = inspect_model(
        small_model(n_layer=1), range(5), lambda numbers: "".join(tokens[number % 5] for number in numbers)
    )
    assert inspection.tokens == ("the␣wizards", "中文", "$x^$", "\\x00", "∅")
    assert all(content.startswith(b"\x89PNG") for _, content in render_plots(inspection))
    assert printable_token("\t") == "⇥"


def test_similar_items_are_neighbours() -> None:
    """Points on a line end up in their order on the line: clusters are oriented when they are merged."""
    points = np.array([3.5, 12.5, 0, 10, 1, 11, 3], dtype=np.float32)
    order = order_by_similarity(-np.abs(points[:, None] - points))
    assert sorted(points) in (list(points[order]), list(points[order][::-1]))


@torch.inference_mode()
@pytest.mark.parametrize("position", POSITIONS[:-1])
def test_position_values_by_hand(position: str) -> None:
    model = small_model(ngram=2, position=position)
    found = inspect_model(model, [2, 5], TOKENIZER.decode).positions
    assert found
    assert found.scheme == position
    np.testing.assert_allclose(found.values, expected_positions(model), atol=1e-5)


def expected_positions(model: LanguageModel) -> Any:
    angles = np.arange(8.0)[:, None] * 10_000 ** (-np.arange(8) / 8)
    match model.config.position:
        case "learned":
            return model.get_parameter("positions.table.weight").detach()
        case "sinusoidal":
            return np.hstack([np.sin(angles), np.cos(angles)])
        case "rotary":  # of half of the channels
            return np.cos(angles[:, ::2])
        case "relative":
            tables = (model.get_parameter(f"blocks.{layer}.attention.bias.table.weight") for layer in range(2))
            return torch.stack([table.norm(dim=1) for table in tables])
    return -np.array([[2**-4], [2**-8]]) * np.arange(8)
