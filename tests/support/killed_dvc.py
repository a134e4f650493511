"""`python -m tests.support.killed_dvc PATTERN ARGUMENTS…`: dvc that kills itself before an operation.

PATTERN is a regular expression, searched for in the name of the audit event `open` or `os.mkdir` and its arguments.
"""

import os
import re
import signal
import sys

from dvc.cli import main


def kill_at(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("open", "os.mkdir") and re.search(sys.argv[1], f"{event} {arguments}"):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.addaudithook(kill_at)
    sys.exit(main(sys.argv[2:]))
