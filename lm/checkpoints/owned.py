"""Which checkpoints lm wrote, by their contents: nothing else is ever replaced or removed."""

import functools
import itertools
import os
import re
import sys
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from lm import log, storage
from lm.checkpoints import schema
from lm.errors import UserError

SHARDED = r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|lm\.pt|checksums\.json|\.lm\.pt\..*\.part"
"""The files of a sharded checkpoint."""
_RUNS = r"(last|best|step=\d+(-\d+)?)\.ckpt"  # the names that a run gives, and those of what it has not finished:
_NAMES = rf"{_RUNS}|\.{_RUNS}\.([0-9a-f]+|new|old|copy)\.part|\.probe\.[0-9a-f]+"
_MAGIC, _NAME, _AT = b"PK\x03\x04", b"archive/data.pkl", 30  # how lm's archives begin


def is_ours(path: Path) -> bool:
    """Return whether lm wrote what is there, as its contents prove. A link to a checkpoint is the user's."""
    folder = path.is_dir()
    if path.is_symlink() or (folder and not storage.holds_only(path, SHARDED)):
        return False
    file = path / "lm.pt" if folder else path
    if not file.is_file():
        return False
    found = file.stat()
    stamp = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return _has_a_runs_contents(file, folder, stamp)


@functools.lru_cache(maxsize=32)
def _has_a_runs_contents(file: Path, folder: bool, stamp: tuple[int, ...]) -> bool:
    """Return what a file proves. A save asks several times; the stamp tells one content from the next."""
    with suppress(Exception), warnings.catch_warnings():  # another program's file can raise anything
        warnings.simplefilter("ignore")
        contents = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        schema.Saved.of(contents, schema.FITTED, without_tensors=folder)
        return True
    return False


def is_left(path: Path) -> bool:
    """Return whether a kill or a power cut may have left this of a checkpoint, under a name that a run gives."""
    if path.is_symlink() or not re.fullmatch(_NAMES, path.name):
        return False
    if path.is_dir():
        return storage.holds_only(path, SHARDED) and any((path / name).exists() for name in ("lm.pt", "checksums.json"))
    return path.is_file() and (_is_zeros(path) or _is_damaged(path))


def _is_zeros(path: Path) -> bool:
    """Return whether a file is empty or has only zeros."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return not any(block.strip(b"\0") for block in iter(lambda: file.read(1 << 20), b""))


def _is_damaged(path: Path) -> bool:
    """Return whether a file begins as lm's archives do, and its end is missing or one of its checksums is wrong.

    Where all are wrong, a program wrote it without any.
    """
    with path.open("rb") as file:
        head = file.read(_AT + len(_NAME))
    if not (_MAGIC.startswith(head[: len(_MAGIC)]) and _NAME.startswith(head[_AT:])):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            whole = {_is_whole(archive, name) for name in archive.namelist()}
            return whole == {True, False}
    except Exception:
        return True


def _is_whole(archive: zipfile.ZipFile, record: str) -> bool:
    with suppress(Exception), archive.open(record) as stream:
        while stream.read(1 << 20):
            pass
        return True
    return False


def is_foreign(path: Path) -> bool:
    """Return whether something is there that lm did not write."""
    return os.path.lexists(path) and not (is_ours(path) or is_left(path))


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
        if not path.name.endswith(".part"):
            check(path)
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

    What is damaged, so that nothing proves that it is lm's, is set aside. A folder cannot be replaced atomically:
    `sharded.recover` finishes what a process killed between two renames has left.

    Raises:
        UserError: lm did not write what is there.
    """
    if os.path.lexists(path) and not is_ours(path):
        check(path)
        if not _is_zeros(path):
            _set_aside(path)
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


def _set_aside(path: Path) -> None:
    names = (f"{path.name}.damaged{number}" for number in itertools.chain([""], itertools.count(2)))
    aside = next(new for name in names if not os.path.lexists(new := path.with_name(name)))
    path.rename(aside)
    tqdm.write(log.line(f"note: {path} is damaged: it is kept as {aside}", level="warning"), file=sys.stderr)
