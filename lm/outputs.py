"""Where a command may write its output: nothing that lm did not write itself is ever replaced."""

import os
from collections.abc import Callable
from pathlib import Path

from lm import storage
from lm.errors import UserError, setting


def check_place(output: Path, *, made: str) -> None:
    """Check that a path can be written to: a new one, or a file or folder, whatever is in it.

    Args:
        output: The path.
        made: What is to be written, in a word or two.

    Raises:
        UserError: It has no name of its own ('', '.', '/'), is a link or a device, or a parent is not a folder.
    """
    if output.name in ("", ".."):
        raise UserError(f"{setting('output')} {str(output)!r}: say the name of a new {made}")
    there = True
    try:
        output.lstat()
    except (FileNotFoundError, NotADirectoryError):
        there = False
    except (OSError, ValueError) as error:  # a name too long
        raise UserError(
            f"{setting('output')} {output}: {getattr(error, 'strerror', error)}: say another name"
        ) from error
    above = storage.nearest(output.parent)
    if not above.is_dir():
        raise UserError(f"{setting('output')} {output}: {above} is {kind(above)}, no folder: say another place")
    if there and (output.is_symlink() or not (output.is_dir() or output.is_file())):
        raise UserError(f"{setting('output')} {output}: it is {kind(output)}: say the name of a new {made}")


def check_free(output: Path, *, made: str, ours: Callable[[Path], bool], overwrite: bool) -> None:
    """Check that a path is free, or has what lm wrote and may be overwritten.

    Args:
        output: The path.
        made: What is to be written, in a word or two.
        ours: Returns whether a path holds such a thing, written by lm.
        overwrite: Whether that may be replaced.

    Raises:
        UserError: It is not free; or see `check_place`.
    """
    check_place(output, made=made)
    if not os.path.lexists(output):
        return
    if not ours(output):
        raise UserError(f"{setting('output')} {output}: it is there already and no {made} of lm's: say another name")
    if not overwrite:
        raise UserError(
            f"{setting('output')} {output}: it is there already: say another name, or {setting('overwrite')}"
        )


def kind(path: Path) -> str:
    """Return what a path is, for a message; of a link, where it leads."""
    if path.is_symlink():
        return f"a link to {os.readlink(path)}{'' if path.exists() else ', which is not there'}"
    if path.is_dir():
        return "a folder"
    return "a file" if path.is_file() else "a device" if path.exists() else "not there"
