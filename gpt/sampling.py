"""Sampling: from scores to the next token, one token after the other."""

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from gpt.model import GPT
from gpt.params import Section


class SamplingParams(Section):
    """How text is sampled. The only settings with defaults, so that a checkpoint alone is enough to make text."""

    max_new_tokens: int = Field(default=500, ge=1)
    temperature: float = Field(default=0.8, ge=0)
    top_k: int | None = Field(default=None, ge=1)
    seed: int = Field(default=1337, ge=0)


@torch.inference_mode()
def sample(model: GPT, prompt: Sequence[int], params: SamplingParams, seed: int) -> Iterator[int]:
    """Continue a prompt of at least one token; yields the new tokens as they are drawn.

    The model sees the last `block_size` tokens. The same seed gives the same tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(params.max_new_tokens):
        window_BT = torch.tensor([tokens[-model.params.block_size :]])
        logits_V = model(window_BT)[0, -1].float()
        tokens.append(_draw(keep_top_k(logits_V, params.top_k), params.temperature, generator))
        yield tokens[-1]


@torch.inference_mode()
def sample_together(model: GPT, prompt: Sequence[int], *, count: int, length: int, seed: int) -> Tensor:
    """Continue one prompt of at least one token several times side by side, which takes less time than in turn.

    Drawn from the model's own probabilities (temperature 1). The same seed gives the same tokens.

    Returns:
        The new tokens alone, of shape (count, length).
    """
    generator = torch.Generator().manual_seed(seed)
    device = model.token_embedding.weight.device
    tokens_BT = torch.tensor([list(prompt)] * count)
    for _ in range(length):
        logits_BV = model(tokens_BT[:, -model.params.block_size :].to(device))[:, -1].float().cpu()
        drawn_B1 = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)
        tokens_BT = torch.cat([tokens_BT, drawn_B1], dim=1)
    return tokens_BT[:, len(prompt) :]


def keep_top_k(logits_V: Tensor, k: int | None) -> Tensor:
    """Rule out all but the k highest scores (Fan et al. 2018, section 5.4); None and a k over V keep all."""
    if k is None or k >= len(logits_V):
        return logits_V
    return logits_V.masked_fill(logits_V < logits_V.topk(k).values[-1], -torch.inf)


def _draw(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    """Draw a token; a low temperature sharpens the choice, 0 always takes the highest score."""
    if temperature == 0:
        return int(logits_V.argmax())
    # Subtract the maximum first: at a tiny temperature the quotient alone would overflow.
    probabilities_V = ((logits_V - logits_V.max()) / temperature).softmax(0)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
