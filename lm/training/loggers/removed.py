"""What the log files share: whether a file is one, and a note where somebody removed it."""

import sys
from pathlib import Path

from lm import log


class Removed:
    """Says, once in a run, that a log was removed while training went on."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, path: Path) -> None:
        """Say it of a file."""
        if not self._said:
            text = f"note: {path} was removed while training went on: it is made again, earlier lines are lost"
            print(log.line(text, level="warning"), file=sys.stderr, flush=True)
        self._said = True


def is_file(path: Path) -> bool:
    """Return whether a path is a regular file, not a link to one."""
    return path.is_file() and not path.is_symlink()
