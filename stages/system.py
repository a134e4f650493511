"""What the machine is doing while a command runs, appended to a file under the names that MLflow's UI knows."""

import json
import os
import sys
import time
from pathlib import Path

import psutil

from stages.history import Follower

SAMPLE_S = 5


class Sampler:
    """Appends a line to `system.jsonl` every few seconds: CPU, memory, the disk of that file, network.

    Steps are the numbers of the samples; a continued run goes on counting. The network's figures count from the
    beginning of each process. GPUs are left out: nothing that this project installs can ask them.
    """

    def __init__(self, path: Path, every_s: float = SAMPLE_S) -> None:
        self._path, self._every_s = path, every_s
        self._step = -1  # not begun
        self._next = 0.0
        self._broken = False

    def look(self) -> None:
        """Take a sample if it is time to; whatever fails in it costs a line and the samples after it.

        The first call only begins: how busy the CPU is, is known between two calls.
        """
        if self._broken or time.monotonic() < self._next:
            return
        try:
            if self._step < 0:
                self._begin()
            else:
                self._sample()
        except Exception as error:  # psutil's, the disk's …
            self._broken = True
            print(f"stages.train: no more system metrics: {type(error).__name__} {error}", file=sys.stderr)

    def _begin(self) -> None:
        points = Follower(self._path).news()
        self._step = int(points[-1]["step"]) + 1 if points else 0
        self._received, self._sent = _network()
        psutil.cpu_percent()

    def _sample(self) -> None:
        self._next = time.monotonic() + self._every_s
        memory, disk, (received, sent) = psutil.virtual_memory(), psutil.disk_usage(str(self._path.parent)), _network()
        figures = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
            "network_receive_megabytes": (received - self._received) / 1e6,
            "network_transmit_megabytes": (sent - self._sent) / 1e6,
        }
        point = {"step": self._step, "time": round(time.time(), 3)}
        point |= {f"system/{name}": round(value, 1) for name, value in figures.items()}
        self._append(json.dumps(point))
        self._step += 1

    def _append(self, line: str) -> None:
        """Append a line, and before it end one that a power cut may have torn."""
        with self._path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            torn = file.read() not in (b"", b"\n")
            file.write(b"\n" * torn + line.encode() + b"\n")


def _network() -> tuple[int, int]:
    """Bytes received and sent since the machine started; zeros where a container hides them."""
    found = psutil.net_io_counters()
    return (found.bytes_recv, found.bytes_sent) if found else (0, 0)
