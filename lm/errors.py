"""Errors that end a command with one line and an exit code, instead of a traceback."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPS = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
"""The signals that stop a command: a terminal that is closed, Ctrl-C, SLURM ahead of a job's end, kill."""


def setting(name: str) -> str:
    """Return a setting's name as the text of a CommandError or of a log line has it, to be `shown`.

    It is between zero bytes, which neither a path nor a command line can have: nothing that a user wrote passes for it.
    """
    return f"\0{name}\0"


def shown(text: str, form: str = "`{}`") -> str:
    """Return a text with the settings in it written in a form; the command line's is an option, "--{}"."""
    return re.sub("\0([a-z_.]+)\0", lambda found: form.format(found[1]), text)


class CommandError(Exception):
    """A command cannot continue; its text is the one line that is printed."""

    exit_code = 1
    at_boundary = False
    """Whether training stands between two steps, so that its state can be saved."""
    run: str | None = None
    """The run's name, where there is one already."""

    def __init__(self, text: str) -> None:
        # a DataLoader remakes a worker process's error with the whole traceback as its text: keep the last part
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2] if text.startswith("Caught ") else text)

    def __str__(self) -> str:
        """Return the line for a program that calls lm: settings in backticks."""
        return shown(self.text)

    @property
    def text(self) -> str:
        """The line before its settings are `shown`."""
        return str(self.args[0])


class UserError(CommandError):
    """Bad input: a flag, a config, a file, a prompt. Says what was found and what to do."""

    exit_code = 2


NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "Storage size calculation overflowed",
    "multiplication overflow",
    "std::bad_alloc",
    "Invalid buffer size",
)
"""Texts of torch's out-of-memory errors that have no class of their own."""


def as_user_error(error: Exception) -> UserError | None:
    """Return the line for an error of the system, of memory or of a file; None for any other."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        found = str(error).splitlines()[0][-200:] if str(error) else "none is left"
        return UserError(
            f"memory does not suffice ({found}): make the network, data.block_size or data.batch_size smaller, or "
            "accumulate micro-batches (trainer.accumulate_grad_batches)"
        )
    if isinstance(error, OSError) and error.strerror:
        name = str(error.filename or "a file or device")
        return UserError(f"{name if len(name) < 200 else name[:80] + '…'}: {error.strerror}")
    return None


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
        self.exit_code = 128 + (signal.SIGTERM if signum == signal.SIGUSR1 else signum)  # SLURM sends it before SIGTERM
        self.at_boundary = at_boundary


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, the one that it came from, and so on back to the first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def described(error: BaseException, length: int = 200) -> str:
    """Return an error's type and text in one line, cut to a length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:length]


def take_stops(handler: Any) -> dict[int, Any]:
    """Install a handler for the signals that stop a command; return the handlers that they had before.

    SIGHUP stays ignored where it is: under nohup.
    """
    taken = [signum for signum in STOPS if (signum, signal.getsignal(signum)) != (signal.SIGHUP, signal.SIG_IGN)]
    return {signum: signal.signal(signum, handler) for signum in taken}


@contextmanager
def stops_wait() -> Iterator[None]:
    """Let a stop signal wait until the end: its exception must not cut short the start of another process."""
    if threading.current_thread() is not threading.main_thread():  # handlers do not run here
        yield
        return
    came: list[int] = []
    before = take_stops(lambda signum, frame: came.append(signum))
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for signum in came:
            signal.raise_signal(signum)
