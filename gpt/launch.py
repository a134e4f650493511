"""How many processes train: the section `launch`, and what the machine offers, seen without importing torch."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from gpt.core.errors import UserError
from gpt.core.params import Section

CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # "quota period" in microseconds, or "max period"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/gpus")


class LaunchParams(Section):
    """The section `launch`. It changes no output."""

    processes: Literal["auto"] | int
    timeout: int = Field(ge=1)  # seconds after which a process that does not answer counts as dead

    @field_validator("processes", mode="before")
    @classmethod
    def _power_of_two(cls, value: object) -> object:
        if value == "auto" or (type(value) is int and value > 0 and value & (value - 1) == 0):
            return value
        raise ValueError(f"expected auto or a power of two (1, 2, 4, …), found {value!r}; auto suits most machines")


def choose_processes(asked: Literal["auto"] | int, *, shards: int, gpus: int, cores: int) -> tuple[int, str]:
    """Decide how many processes train.

    Args:
        asked: `launch.processes`.
        shards: `train.shards`; a process computes at least one of them.
        gpus: GPUs that may be used, 0 to compute on the CPU.
        cores: CPU cores that may be used.

    Returns:
        The number, and one line about devices that stay idle, or nothing.

    Raises:
        UserError: a fixed number is above the shards.
    """
    if asked != "auto" and asked > shards:
        raise UserError(
            f"launch.processes: expected at most train.shards ({shards}), found {asked}; "
            "set it to auto, or raise train.shards (which trains another model)"
        )
    devices, kind = (gpus, "GPUs") if gpus else (cores, "CPU cores")
    processes = 1 << (min(shards, max(devices, 1)).bit_length() - 1) if asked == "auto" else asked
    idle = devices - processes
    limit = f"train.shards is {shards}" if asked == "auto" else f"launch.processes is {asked}"
    if asked == "auto" and 2 * processes <= shards:
        limit = "their number is no power of two"
    return processes, f"{idle} of {devices} {kind} stay idle: {limit}" if idle > 0 else ""


def visible_gpus() -> int:
    """NVIDIA GPUs that this process may use: those of the driver, cut down by CUDA_VISIBLE_DEVICES."""
    present = len(list(NVIDIA_DRIVER.glob("*"))) or len(list(Path("/dev").glob("nvidia[0-9]*")))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    names = [name.strip() for name in chosen.split(",")]
    valid = next((at for at, name in enumerate(names) if name in ("", "-1")), len(names))  # CUDA stops at the first bad
    return min(present, valid)


def usable_cores() -> int:
    """CPU cores that this process may use: affinity, and the quota of a container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU_MAX.read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup of version 2, or no quota in it ("max")
        return cores
