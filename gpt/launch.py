"""Number of training processes: the section `launch`, and the available GPUs and CPU cores, without torch."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from gpt.core.errors import UserError
from gpt.core.params import MAX_TIMEOUT_S, Section

CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # "quota period" in microseconds, or "max period"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/gpus")


class LaunchParams(Section):
    """The section `launch`. It does not change any output."""

    processes: Literal["auto", 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    timeout: int = Field(ge=1, le=MAX_TIMEOUT_S)  # seconds without communication after which a process counts as dead


def choose_processes(requested: Literal["auto"] | int, *, shards: int, gpus: int, cores: int) -> tuple[int, str]:
    """Choose the number of training processes: each computes at least one shard, on a GPU or, without GPUs, a core.

    Returns:
        The number, and a message about idle devices, empty if there are none.
    """
    if requested != "auto" and requested > shards:
        raise UserError(
            f"launch.processes: expected at most train.shards ({shards}), found {requested}; "
            "set it to auto, or raise train.shards (which trains a different model)"
        )
    devices, kind = (gpus, "GPUs") if gpus else (cores, "CPU cores")
    processes = 1 << (min(shards, max(devices, 1)).bit_length() - 1) if requested == "auto" else requested
    idle = devices - processes
    limit = f"train.shards is {shards}" if requested == "auto" else f"launch.processes is {requested}"
    if requested == "auto" and 2 * processes <= shards:
        limit = "their number is not a power of two"
    return processes, f"{idle} of {devices} {kind} stay idle: {limit}" if idle > 0 else ""


def visible_gpus() -> int:
    """Return the number of NVIDIA GPUs that this process can use: the driver's, limited by CUDA_VISIBLE_DEVICES."""
    present = len(list(NVIDIA_DRIVER.glob("*"))) or len(list(Path("/dev").glob("nvidia[0-9]*")))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    names = [name.strip() for name in chosen.split(",")]
    valid = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))  # CUDA ignores the rest
    return min(present, valid)


def usable_cores() -> int:
    """Return the number of CPU cores that this process can use: affinity, limited by the quota of a container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU_MAX.read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or no quota ("max")
        return cores
