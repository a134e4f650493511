"""`python -m tests.support.killed_dvc MOMENT LOG WORDS…`: dvc that kills itself before it changes a file.

MOMENT is the number of a file operation, the first is 0, or a regular expression that is found in the operation's line
in LOG. With a `+` before it, dvc dies when it has emptied the file that it was about to write.
"""

import contextlib
import os
import re
import signal
import sys

from dvc.cli import main

from stages.mend import before_dvc

WRITING = os.O_WRONLY | os.O_RDWR
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}


def watch(moment: str, log: str) -> None:
    """Write every operation down, and die at one."""
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    seen, dies = -1, False

    def look(event: str, details: tuple[object, ...]) -> None:
        nonlocal seen, dies
        writes = event == "open" and isinstance(details[2], int) and bool(WRITING & details[2])
        path = str(details[0]) if details else ""
        if dies or not (writes or event in CHANGES) or not path.startswith("/") or path.startswith(("/dev", "/proc")):
            return
        seen += 1
        line = f"{seen} {event} {path}"
        os.write(file, f"{line}\n".encode())
        wanted = moment.removeprefix("+")
        if seen == int(wanted) if wanted.isdigit() else re.search(wanted, line):
            dies = True
            if moment.startswith("+") and writes:
                with contextlib.suppress(OSError):  # as it would have failed itself
                    os.open(path, int(str(details[2])), 0o666)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


if __name__ == "__main__":
    before_dvc()  # as every dvc does
    moment, log, *words = sys.argv[1:]
    watch(moment, log)
    sys.exit(main(words))
