"""How far every rank of a training run has come, so that those who wait can name the one that hangs."""

import os
import signal
import socket
import threading
from contextlib import suppress
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]  # public, but not in its __all__

PULSE_S = 1
PULSE_ANSWER_S = 5


class Heartbeat:
    """Tells the other ranks how far this one has come, so that they can name the one that hangs.

    A rank counts the exchanges that it reached. A thread brings the count to the common store every second, which
    costs the training nothing.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store = store.clone() if size > 1 else store  # type: ignore[attr-defined]
        self._rank, self._size = rank, size
        self._count = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._report_for_ever, daemon=True)
        if size > 1:
            self._store.set_timeout(timedelta(seconds=PULSE_ANSWER_S))
            self._thread.start()

    def beat(self) -> None:
        """Count one exchange that this rank has reached."""
        self._count += 1

    def stop(self) -> None:
        """End the thread: one that is inside torch while Python shuts down aborts the process."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(PULSE_ANSWER_S)

    def diagnosis(self, timeout_s: int) -> str:
        """Say which ranks fell behind, and end those on this machine, which nothing else would."""
        reached = {}
        with suppress(RuntimeError):  # the store lies on a machine that is out of reach
            self._report()
            for rank in range(self._size):
                count, host, pid = self._store.get(f"pulse {rank}").decode().split()
                reached[rank] = int(count), host, int(pid)
        behind = {rank: who for rank, who in reached.items() if who[0] < self._count}
        for _, host, pid in behind.values():
            if host == socket.gethostname():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        names = ", ".join(f"rank {rank} (PID {pid} on {host})" for rank, (_, host, pid) in behind.items())
        missing = names or f"a rank other than {self._rank}"
        return f"{missing} died, or did not answer within {timeout_s} s; run again to continue"

    def _report(self) -> None:
        self._store.set(f"pulse {self._rank}", f"{self._count} {socket.gethostname()} {os.getpid()}")

    def _report_for_ever(self) -> None:
        with suppress(RuntimeError):  # the store is gone, and soon this process
            self._report()
            while not self._stopped.wait(PULSE_S):
                self._report()
