"""Lines that lm prints while it works: for people, or with LM_LOG=json as JSON, one object a line, for machines."""

import errno
import fcntl
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import IO, Any

from lm.errors import UserError


def as_json() -> bool:
    """Return whether lines are to be JSON."""
    return os.environ.get("LM_LOG", "") == "json"


def rank() -> int:
    """Return this process's number in the job, as whoever launched it says: torchrun, SLURM, or lm itself."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def line(text: str, *, level: str = "info", run: str | None = None, **fields: Any) -> str:
    """Return a line, without its end.

    Args:
        text: What it says to people.
        level: info, warning or error; people see it of an error alone.
        run: Name of the run.
        fields: What a machine would otherwise have to find in the text, step and metrics say. None and numbers that are
            not finite, which JSON lacks, become null.
    """
    text = " ".join(text.split()) if level == "error" else text
    if not as_json():
        return f"error: {text}" if level == "error" else text
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
    known = {k: None if isinstance(v, float) and v - v != 0 else v for k, v in fields.items()}
    return json.dumps({"time": stamp, "level": level, "run": run, "rank": rank(), **known, "message": text})


def shared_memory() -> str | None:
    """Return where processes of this machine can note what they have said; None where the system has no such place.

    It is this process's own memory, and goes when it ends.
    """
    if not hasattr(os, "memfd_create"):
        return None
    return f"/proc/{os.getpid()}/fd/{os.memfd_create('said')}"


def first_to_say(text: str) -> bool:
    """Note a text where LM_SAID names a place; return whether no other process has noted the same."""
    try:
        with open(os.environ.get("LM_SAID", ""), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if repr(text) in file.read().splitlines():
                return False
            file.write(f"{text!r}\n")
    except OSError:  # nobody else is there
        pass
    return True


def take_over(run: str) -> None:
    """Let what Python's warnings and loggers say come as JSON too, where lines are."""
    if not as_json():
        return

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(line(record.getMessage(), level=record.levelname.lower(), run=run), file=sys.stderr, flush=True)

    for name in ("", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers = [Lines()]
    logging.captureWarnings(True)
    warnings.formatwarning = lambda message, *_, **__: str(message)


class Output:
    """A standard stream that may be lost, `| head` say, while work goes on: what is written to it then is dropped.

    Args:
        stream: The stream; None where the process was started without it.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115
        self.error: OSError | None = None
        """Why a write failed."""

    def __getattr__(self, name: str) -> Any:
        """All else is the stream's own."""
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
        except (OSError, UserError) as error:  # a command's standard output makes the latter of the former
            self.error = error if isinstance(error, OSError) else OSError(*getattr(error.__cause__, "args", ()))
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # what is buffered must go somewhere

    @property
    def unread(self) -> bool:
        """Whether its reader has gone."""
        return self.error is not None and self.error.errno == errno.EPIPE


@contextmanager
def losing_output() -> Iterator[None]:
    """Let standard output and standard error be lost without an error."""
    with redirect_stdout(Output(sys.stdout)), redirect_stderr(Output(sys.stderr)):
        yield
