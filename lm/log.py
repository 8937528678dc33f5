"""Lines that lm prints while it works: for people, or with LM_LOG=json as JSON, one object a line, for machines."""

import fcntl
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lm.errors import shown


def as_json() -> bool:
    """Return whether lines are to be JSON."""
    return os.environ.get("LM_LOG", "") == "json"


def rank() -> int:
    """Return this process's number in the job, as whoever launched it says: torchrun, SLURM, or lm itself."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


@contextmanager
def naming_options() -> Iterator[None]:
    """Let lines show settings as options of the command line, in this process and in those that it starts."""
    os.environ["LM_NAMES"] = "options"
    try:
        yield
    finally:
        os.environ.pop("LM_NAMES", None)


def line(text: str, *, level: str = "info", run: str | None = None, **fields: Any) -> str:
    """Return a line, without its end.

    Args:
        text: What it says to people; `errors.setting` marks the settings that it names.
        level: info, warning or error; people see it only for errors.
        run: Name of the run.
        fields: What a machine would otherwise parse from the text, such as step and metrics. None and numbers that are
            not finite, which JSON lacks, become null.
    """
    text = shown(text, "--{}") if os.environ.get("LM_NAMES") == "options" else shown(text)
    if level == "error":  # one line, and no name in a foreign file commands the terminal
        text = "".join(one if one.isprintable() else repr(one)[1:-1] for one in " ".join(text.split()))
    if not as_json():
        return f"error: {text}" if level == "error" else text
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
    about = {"time": stamp, "level": level, "run": run, "rank": rank()}
    return json.dumps({**about, **finite(fields), "message": text})


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Return values with null for NaN and infinity, which JSON lacks."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def shared_memory() -> str | None:
    """Return the path of a file in which a machine's processes note what they have said; None where there can be none.

    It is in this process's memory, and is gone when the process ends.
    """
    if not hasattr(os, "memfd_create"):
        return None
    return f"/proc/{os.getpid()}/fd/{os.memfd_create('said')}"


def first_to_say(text: str) -> bool:
    """Note a text in the file that LM_SAID names, if any; return whether no other process has noted the same."""
    try:
        with open(os.environ.get("LM_SAID", ""), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if repr(text) in file.read().splitlines():
                return False
            file.write(f"{text!r}\n")
    except OSError:  # there are no other processes
        pass
    return True


def take_over(run: str) -> None:
    """Print Python's warnings and log records as JSON, too, where lines are JSON."""
    if not as_json():
        return

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(line(record.getMessage(), level=record.levelname.lower(), run=run), file=sys.stderr, flush=True)

    for name in ("", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers = [Lines()]
    logging.captureWarnings(True)
    warnings.formatwarning = lambda message, *_, **__: str(message)
