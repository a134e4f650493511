"""Choice of the device, and the fixed number of CPU threads."""

import os

import torch

from gpt.core.errors import UserError

CPU_THREADS = 1  # per process; results are bit-identical only for the same number of threads


def choose_device(setting: str, key: str) -> torch.device:
    """The device of this process, and set the number of CPU threads; under torchrun, the GPU of the local rank.

    Args:
        setting: cpu, cuda, or auto: a GPU if there is one.
        key: the params key of the setting, for the error message.

    Raises:
        UserError: the setting is cuda and there is no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if setting == "cuda" and not has_gpu:
        raise UserError(f"{key}: expected a GPU for 'cuda', found none that torch can use; set it to auto or cpu")
    torch.set_num_threads(CPU_THREADS)
    if setting == "cpu" or not has_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def slow_in_bfloat16(device: torch.device) -> bool:
    """Whether torch emulates bfloat16 products on this device: on a CPU without AVX-512 or similar instructions."""
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
