"""`python -m tests.support.killed_dvc PATTERN ARGUMENTS…`: dvc that kills itself at a file operation.

PATTERN is a regular expression, searched for in the name of the audit event and its path. A file that is about to be
written is truncated first, as when the kill falls between opening and writing.
"""

import os
import re
import signal
import sys

from dvc.cli import main

WRITING = os.O_WRONLY | os.O_RDWR


def kill_at(pattern: str) -> None:
    """Send SIGKILL to this process at the first operation that matches."""

    def hook(event: str, details: tuple[object, ...]) -> None:
        reads = event == "open" and not (isinstance(details[2], int) and details[2] & WRITING)
        if reads or not details or not re.search(pattern, f"{event} {details[0]}"):
            return
        if event == "open":
            os.truncate(str(details[0]), 0)
        os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    kill_at(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
