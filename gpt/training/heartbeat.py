"""The heartbeat: how far every rank has come, so that the ranks that wait can name the one that hangs."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch import OutOfMemoryError
from torch.distributed import Store  # type: ignore[attr-defined]  # public, but not in its __all__

from gpt.core.errors import OneLineError

INTERVAL_S = 1
STORE_TIMEOUT_S = 5


class LostRankError(OneLineError):
    """Another rank died or does not answer."""


class Heartbeat:
    """Counts the collectives that this rank has reached; a thread writes the count to the store every second."""

    def __init__(self, store: Store, rank: int, size: int, timeout_s: int) -> None:
        self._store = store.clone() if size > 1 else store  # type: ignore[attr-defined]
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._count = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._write_repeatedly, daemon=True)
        if size > 1:
            self._store.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
            self._thread.start()

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Count a collective operation, and turn its failure into an error that names the ranks that are missing.

        Torch raises a plain RuntimeError for a lost peer, so the block must contain nothing but the operation.
        """
        self._count += 1
        try:
            yield
        except RuntimeError as error:
            if self._size == 1 or isinstance(error, OutOfMemoryError):
                raise
            raise LostRankError(
                f"{self._ranks_behind()} died, or did not answer within {self._timeout_s} s; run again to continue"
            ) from error

    def stop(self) -> None:
        """End the thread: one that is inside torch while Python shuts down would abort the process."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(STORE_TIMEOUT_S)

    def _ranks_behind(self) -> str:
        behind = []
        with suppress(RuntimeError):  # the store is on a machine that cannot be reached
            self._write()
            for rank in range(self._size):
                count, host, pid = self._store.get(f"heartbeat {rank}").decode().split()
                if int(count) < self._count:
                    behind.append(f"rank {rank} (PID {pid} on {host})")
        return ", ".join(behind) or f"a rank other than {self._rank}"

    def _write(self) -> None:
        self._store.set(f"heartbeat {self._rank}", f"{self._count} {socket.gethostname()} {os.getpid()}")

    def _write_repeatedly(self) -> None:
        with suppress(RuntimeError):  # the store is gone, and this process will end soon
            self._write()
            while not self._stopped.wait(INTERVAL_S):
                self._write()
