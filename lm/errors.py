"""Errors that end a command with one line and an exit code, instead of a traceback."""

import signal
from typing import Any

STOPS = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
"""The signals that stop a command: a terminal that is closed, Ctrl-C, SLURM ahead of a job's end, kill."""


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
        self.exit_code = 128 + (signal.SIGTERM if signum == signal.SIGUSR1 else signum)  # SLURM sends it ahead of that
        self.at_boundary = at_boundary


def take_stops(handler: Any) -> dict[int, Any]:
    """Let a handler take the signals that stop a command; return who had them before.

    SIGHUP stays ignored where it is: under nohup.
    """
    taken = [signum for signum in STOPS if (signum, signal.getsignal(signum)) != (signal.SIGHUP, signal.SIG_IGN)]
    return {signum: signal.signal(signum, handler) for signum in taken}
