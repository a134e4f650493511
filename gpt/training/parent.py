"""The death of the parent process, which has to end this process too: nobody would wait for its results."""

import ctypes
import os
import signal
import sys
import threading
import time

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before any fork
PR_SET_PDEATHSIG = 1  # from Linux's <sys/prctl.h>
POLL_S = 0.5


def end_with_parent(number: signal.Signals) -> None:
    """Receive a signal when this process's parent dies, even by SIGKILL: from the kernel or, where it cannot, a thread.

    To be called before the parent may have died: its death before the call goes unnoticed.
    """
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, number)
    else:
        threading.Thread(target=_watch, args=[os.getppid(), number], daemon=True).start()


def _watch(parent: int, number: signal.Signals) -> None:
    """Wait until the parent has died: an orphan gets another parent."""
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os.kill(os.getpid(), number)
