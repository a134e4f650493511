"""The errors that a person is meant to read: one line each, no traceback."""


class OneLineError(Exception):
    """What went wrong and what to do about it; the front door prints it and exits with `exit_code`."""

    exit_code = 1


class UserError(OneLineError):
    """A mistake in what the person gave us: names the key or path, expected, found, remedy."""

    exit_code = 2


class StoppedError(OneLineError):
    """The run was asked to stop, has saved its state and can be continued."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later
