"""The loss of a model on batches of tokens."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gpt.model.gpt import next_token_loss

Batch = tuple[Tensor, Tensor]
OVERFITTING_GAP = 2  # a validation loss of more than this many times the training loss


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch the model to evaluation mode (no dropout) inside the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def token_losses(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> list[Tensor]:
    """The loss of every target in nats, shape (sequences, positions) for each batch, float64 on the CPU."""
    with eval_mode(model):
        return [batch_losses(model, batch, device)[0] for batch in batches]


def batch_losses(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of one batch as in `token_losses`, and its logits and targets on the device."""
    inputs_BT, targets_BT = (part_BT.to(device) for part_BT in batch)
    logits_BTV = model(inputs_BT)
    loss = next_token_loss(logits_BTV, targets_BT, reduction="none")
    return loss.view(targets_BT.shape).double().cpu(), logits_BTV, targets_BT
