"""docs/model.md: the names that it links to exist, and the numbers that it states are correct."""

import importlib
import math
import re
from typing import Any

import numpy as np

from gpt.model.positions import REACH
from tests.evaluation.test_interpretability import matrices
from tests.support.common import ROOT

MODEL = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")


def test_links_in_the_model_page_resolve() -> None:
    names = re.findall(r"\[`([\w.]+)`\]\(\.\./((?:gpt|stages)/[\w/]+)\.py\)", MODEL)
    assert len(names) > 30
    for name, file in names:
        found: Any = importlib.import_module(file.replace("/", "."))
        for part in name.split("."):
            found = getattr(found, part, None) or found.__annotations__[part]  # fields without a default
    for path in re.findall(r"\]\(((?:\.\./)?[\w/.-]+)\)", MODEL):
        assert (ROOT / "docs" / path).exists(), path


def test_numbers_in_the_model_page() -> None:
    assert f"{math.log(65):.2f} for 65 characters" in MODEL
    assert f"from {REACH} on" in MODEL
    assert f"{REACH + 1} vectors" in MODEL
    raw, masked, weights = (np.array(found) for found in matrices(MODEL))
    future = np.triu(np.ones_like(raw, dtype=bool), 1)
    assert np.array_equal(masked, np.where(future, -np.inf, raw))
    exponentials = np.exp(masked)
    assert np.allclose(weights, exponentials / exponentials.sum(-1, keepdims=True), atol=0.01)
