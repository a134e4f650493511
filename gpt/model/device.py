"""Where the numbers are computed: on a GPU or on the CPU, there always with the same number of threads."""

import os

import torch

from gpt.core.errors import UserError

CPU_THREADS = 1  # of a process; another number of threads gives other bits


def choose_device(wish: str, key: str) -> torch.device:
    """The device of this process: `auto` takes a GPU where there is one, with torchrun the one of the local rank.

    Args:
        key: the params key that the wish comes from, for the error.

    Raises:
        UserError: a GPU is demanded and none is there.
    """
    has_gpu = torch.cuda.is_available()
    if wish == "cuda" and not has_gpu:
        raise UserError(f"{key}: expected a GPU for 'cuda', found none that torch can use; set it to auto or cpu")
    torch.set_num_threads(CPU_THREADS)
    if wish == "cpu" or not has_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def slow_in_bfloat16(device: torch.device) -> bool:
    """Whether torch has to take bfloat16 products apart here: on a CPU without AVX-512 or the like."""
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
