"""Safe standard streams: one that is closed, full, or of a narrow encoding causes no traceback."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import IO, Any

from lm.errors import UserError, causes


class Output(io.TextIOWrapper):
    """Standard output, whose failure is a UserError of its own, not blamed on whatever file is being written."""

    def write(self, text: str) -> int:
        """Write, with escapes for what the encoding lacks."""
        try:
            return super().write(text)
        except OSError as error:
            raise _told(error) from error

    def flush(self) -> None:
        """Flush what was written."""
        try:
            super().flush()
        except OSError as error:
            raise _told(error) from error


def _told(error: OSError) -> Exception:
    if isinstance(error, BrokenPipeError):  # the reader has gone, which is not an error
        return error
    drop(1)
    return UserError(f"standard output cannot be written to ({error.strerror}): free its disk, or send it elsewhere")


class Losable:
    """A standard stream that work can do without: once a write to it fails, later writes are dropped.

    Args:
        stream: The stream.
    """

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.error: OSError | None = None
        """Why a write failed."""

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the stream."""
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, unless that is impossible."""
        with self._losing():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, unless that is impossible."""
        with self._losing():
            self.stream.flush()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UserError) as error:  # `Output` turns the former into the latter
            self.error = next(cause for cause in causes(error) if isinstance(cause, OSError))
            drop(self.stream.fileno())  # what is buffered must go somewhere

    @property
    def unread(self) -> bool:
        """Whether its reader has gone."""
        return self.error is not None and self.error.errno == errno.EPIPE


@contextmanager
def losable() -> Iterator[None]:
    """Let work continue without standard output and standard error where they are lost, by `| head` say."""
    with redirect_stdout(Losable(sys.stdout)), redirect_stderr(Losable(sys.stderr)):
        yield


def prepare() -> None:
    """Make the process's standard streams safe to write to."""
    for number in range(3):  # reopen a closed stream's number, or the next file opened would get it
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    out: Any = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    encoding, interactive = out.encoding, out.line_buffering
    sys.stdout = Output(out.detach(), encoding, "backslashreplace", line_buffering=interactive)


def drop(descriptor: int) -> None:
    """Discard what is still written to a stream."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
