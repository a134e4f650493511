"""The loss by block of the validation characters: which token counts where, for tokens of several lengths."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt.data.prepare import tokenize
from gpt.data.token_files import TokenData, load_tokens
from gpt.evaluation.blocks import loss_by_block
from tests.support.common import made_up_text, tokenize_params


def tokens_of(folder: Path, text: str, **params: object) -> TokenData:
    (folder / "text.txt").write_text(text, encoding="utf-8")
    tokenize(params=tokenize_params(**params), corpus=folder / "text.txt", out=folder)
    return load_tokens(folder)


@pytest.mark.parametrize("params", [{}, {"kind": "bpe", "vocab_size": 256}, {"kind": "bpe", "vocab_size": 300}])
def test_each_token_counts_in_the_block_of_its_first_character(tmp_path: Path, params: dict[str, object]) -> None:
    """Token by token, with the text decoded so far; 🙂 has four bytes, which are up to four tokens."""
    text = made_up_text(2000).replace("o", "🙂")
    data = tokens_of(tmp_path, text, **params)
    characters = data.meta.val_characters
    nats = torch.rand(len(data.val), dtype=torch.float64)
    expected, done = np.zeros(100), b""
    sizes = [sum(character * 100 // characters == block for character in range(characters)) for block in range(100)]
    for token, value in zip(data.val.tolist(), nats.tolist(), strict=True):
        complete = done.decode(errors="ignore")  # a character of which only some bytes have been read is not counted
        expected[len(complete) * 100 // characters] += value
        done += data.tokenizer.token_bytes[token]
    assert done.decode() == text[-characters:]
    found = loss_by_block([nats[:64].view(2, 32), nats[64:][None]], data)
    assert found["block"].tolist() == list(range(1, 101))
    assert found["characters"].tolist() == sizes
    assert max(sizes) - min(sizes) == 1
    assert found["nats"].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_text_shorter_than_the_number_of_blocks_has_one_character_in_each(tmp_path: Path) -> None:
    data = tokens_of(tmp_path, "ab" * 200)
    found = loss_by_block([torch.full((1, 40), math.log(2), dtype=torch.float64)], data)
    assert found["characters"].tolist() == [1] * 40
    assert found["nats"].sum() == pytest.approx(40 * math.log(2), abs=0.01)
