"""`lm health`: whether a container does what it was started for; Dockerfile's HEALTHCHECK."""

from http.client import HTTPException
from itertools import pairwise
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from jsonargparse import ArgumentParser

from lm.cli import values
from lm.errors import CheckError

TIMEOUT = 5.0  # seconds


def health(arguments: list[str]) -> None:
    """Run `lm health`.

    Raises:
        CheckError: The server does not answer.
    """
    parser = ArgumentParser(
        prog="lm health",
        description="Say whether a server answers. A container that serves nothing is as healthy as its process.",
        exit_on_error=False,
    )
    parser.add_argument("--url", type=str | None, default=None, help="Who is asked; by default process 1 if it serves.")
    url = values.parse(parser, arguments).url or served_by(Path("/proc/1/cmdline"))
    if url is None:
        print("nothing is served here")
        return
    try:
        with urlopen(url, timeout=TIMEOUT) as answer:
            print(f"{url}: {answer.status}")
    except (URLError, OSError, ValueError, HTTPException) as error:
        raise CheckError(f"{url}: {getattr(error, 'reason', error)}") from error


def served_by(command_line: Path) -> str | None:
    """Return the address that a process serves; None where it is not a server.

    Args:
        command_line: The process's words, each ended by a zero byte.
    """
    words = command_line.read_bytes().decode().split("\0")
    if "serve" not in words:
        return None
    options = dict(pairwise(words)) | dict(word.split("=", 1) for word in words if "=" in word)
    return f"http://127.0.0.1:{options.get('--port', '8000')}/health"
