"""Errors that are printed as one line, without a traceback."""

import re


class OneLineError(Exception):
    """An error with its remedy; the command line prints it and exits with `exit_code`."""

    exit_code = 1


class UserError(OneLineError):
    """An error in the user's input: key or path, expected, found, remedy."""

    exit_code = 2


class StoppedError(OneLineError):
    """The run received a stop request, has saved its state and can be continued."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


def without_secrets(text: str) -> str:
    """The text without user, password and query string in the addresses that it contains."""
    text = re.sub(r"(?<=://)[^/?#\s]*@", "", text)
    return re.sub(r"(://[^?]*\?).+", r"\1…", text, flags=re.DOTALL)
