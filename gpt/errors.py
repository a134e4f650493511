"""The one kind of error that is a person's to mend."""


class UserError(Exception):
    """A mistake in what the person gave us: one line that names the key or path, expected, found, remedy.

    The front door prints it without a traceback and exits with code 2.
    """
