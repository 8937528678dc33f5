"""Which checkpoints lm wrote, by their contents: nothing else is ever replaced or removed."""

import os
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from lm import storage
from lm.checkpoints import schema
from lm.errors import UserError

SHARDED = r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|lm\.pt|checksums\.json|\.lm\.pt\..*\.part"
"""The files of a sharded checkpoint."""
_MAGIC, _NAME, _AT = b"PK\x03\x04", b"archive/data.pkl", 30  # how lm's archives begin


def is_ours(path: Path) -> bool:
    """Return whether lm wrote what is there, even if it is damaged by now. A link to a checkpoint is the user's."""
    if path.is_symlink():
        return False
    if path.is_dir():
        return any(path.iterdir()) and storage.holds_only(path, SHARDED)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_AT + len(_NAME))
    if not head.strip(b"\0"):
        return True  # empty or all zeros: a power cut
    if not _MAGIC.startswith(head[: len(_MAGIC)]):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return schema.OURS in torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # damaged, or whole and another program's
        return _NAME.startswith(head[_AT:]) and not _is_whole(path)


def _is_whole(path: Path) -> bool:
    with suppress(Exception), zipfile.ZipFile(path) as archive:
        return archive.testzip() is None
    return False


def is_foreign(path: Path) -> bool:
    """Return whether something is there that lm did not write."""
    return os.path.lexists(path) and not is_ours(path)


def check(path: Path) -> None:
    """Check that a checkpoint may be written to a path: it is free, or has one of lm's.

    Raises:
        UserError: It has something else.
    """
    if is_foreign(path):
        raise UserError(f"{path} is in the way and was not written by lm: move it away")


def remove(path: Path) -> None:
    """Delete a checkpoint, file or folder, or what is left of one.

    Raises:
        UserError: It, or one of the folder's files, was not written by lm.
    """
    if path.is_dir() and not path.is_symlink():
        if not path.name.endswith(".part") and storage.holds_only(path, SHARDED):
            part = path.with_name(f".{path.name}.old.part")  # frees its name, even if deletion fails half-way
            if os.path.lexists(part):
                remove(part)
            path = path.rename(part)
        storage.remove_folder(path, SHARDED)
    else:
        check(path)
        path.unlink(missing_ok=True)


def take_place(part: Path, path: Path) -> None:
    """Replace path by part, a file or a folder.

    A folder cannot be replaced atomically: `sharded.recover` finishes what a process killed between two renames has
    left.

    Raises:
        UserError: lm did not write what is there.
    """
    check(path)
    old = path.with_name(f".{path.name}.old.part")
    if path.is_dir() or (path.exists() and part.is_dir()):
        if os.path.lexists(old):
            remove(old)
        path.rename(old)
    try:
        part.replace(path)
    except OSError:
        if os.path.lexists(old):
            old.rename(path)
        raise
    storage.flush(path.parent)
    if os.path.lexists(old):
        with suppress(OSError, UserError):  # the new one is there; the next start, or save, removes what is left
            remove(old)
