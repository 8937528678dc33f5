"""Errors that end a command with one line and an exit code, instead of a traceback."""

import signal


class CommandError(Exception):
    """A command cannot go on; its text is the one line that is printed."""

    exit_code = 1
    at_boundary = False
    """Whether training stands between two steps, so that its state can be saved."""
    run: str | None = None
    """The run's name, where there is one already."""

    def __init__(self, text: str) -> None:
        # a DataLoader makes the error of a worker process anew, from all of its traceback: the last of it is the text
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2] if text.startswith("Caught ") else text)


class UserError(CommandError):
    """Bad input: a flag, a config, a file, a prompt. Says what was found and what to do."""

    exit_code = 2


class CheckError(CommandError):
    """A check failed: the input was good, the outcome is not."""


class Stopped(CommandError):  # noqa: N818
    """The command was stopped by a signal.

    Args:
        signum: The signal's number.
        at_boundary: Whether training stands between two steps, so that its state can be saved.
    """

    def __init__(self, signum: int, *, at_boundary: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum
        self.at_boundary = at_boundary
