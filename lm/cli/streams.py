"""Standard streams that cannot surprise: one that is closed, full, or of a narrow encoding is no traceback."""

import io
import os
import sys
from typing import Any

from lm.errors import UserError


class Output(io.TextIOWrapper):
    """Standard output, whose failure is a user's to mend, and not blamed on whatever file is being written."""

    def write(self, text: str) -> int:
        """Write; what the encoding lacks is written as an escape."""
        try:
            return super().write(text)
        except OSError as error:
            raise _told(error) from error

    def flush(self) -> None:
        """Hand over what was written."""
        try:
            super().flush()
        except OSError as error:
            raise _told(error) from error


def _told(error: OSError) -> Exception:
    if isinstance(error, BrokenPipeError):  # who reads has gone, which is no fault
        return error
    drop_output()
    return UserError(f"standard output cannot be written to ({error.strerror}): free its disk, or send it elsewhere")


def prepare() -> None:
    """Make the process's standard streams safe to write to."""
    for number in range(3):  # the lowest number that is free is the stream's own: no file must come to have it
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    out: Any = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    encoding, interactive = out.encoding, out.line_buffering
    sys.stdout = Output(out.detach(), encoding, "backslashreplace", line_buffering=interactive)


def drop_output() -> None:
    """Let what is still to be written to standard output go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
