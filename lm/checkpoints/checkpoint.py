"""Checkpoints, files or folders: no crash while writing leaves half of one, and reading detects any damage.

A file is a torch.save archive of tensors and plain values, and loads with weights_only=True. Every record of the
archive carries a CRC-32, which `damage` checks.
"""

import pickle
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from lm import outputs, storage
from lm.checkpoints import disk, owned, sharded
from lm.checkpoints.schema import Saved
from lm.errors import UserError, described

FOREIGN = (
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, RuntimeError, EOFError),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)
"""Exceptions that are raised where a checkpoint lacks something, or has another type for it."""


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, whole or not at all; raises UserError where the disk refuses."""
    with replacing(path) as file:
        torch.save(checkpoint, file)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside path; on success it is flushed to the disk and takes path's place.

    Raises:
        UserError: The disk is full, the folder is not writable, or lm did not write what is there; path is unchanged.
    """
    try:
        owned.check(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.whole(path, owned.take_place) as file:
            yield file
    except (OSError, RuntimeError) as error:  # torch's archive writer turns a full disk into a RuntimeError
        raise disk.refusal(path, error) from error


def copy(source: Path, target: Path) -> None:
    """Copy a checkpoint, whole or not at all. A copy, not a link: damage to one must not damage both.

    A folder may be as large as many disks, so its files are hard-linked where possible.
    """
    if source.is_dir():
        sharded.copy(source, target)
        return
    with replacing(target) as file:
        shutil.copyfile(source, file.name)  # within the kernel, where it can


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint file, or None where it is whole.

    Reads all of it: a bit flipped anywhere in the records is found by their checksums.
    """
    if path.is_dir():
        return sharded.damage(path) or _foreign(path)
    if path.is_symlink() and not path.exists():
        return f"it is {outputs.kind(path)}"
    if sharded.holds(path):
        return f"it is a part of the sharded checkpoint {path.parent}: say the folder"
    if path.exists() and not path.is_file():
        return f"it is {outputs.kind(path)}, no file"
    try:
        with zipfile.ZipFile(path) as archive:
            # torch writes none of these; a flipped bit there makes it read a record as something else
            odd = [i.filename for i in archive.infolist() if i.compress_type or i.flag_bits & 1 or i.external_attr]
            torn = odd[0] if odd else _torn(archive)
    except FileNotFoundError:
        return "there is no such file"
    except Exception as error:  # a damaged archive can raise anything
        return f"it is truncated or not a checkpoint ({error})"
    if torn:
        return f"its record {torn} does not match its checksum"
    return _foreign(path)


def _foreign(path: Path) -> str | None:
    """Return why an undamaged file is not a checkpoint of lm's, or None."""
    try:
        peek(path)
    except Exception as error:
        return f"it is no checkpoint of lm ({described(error)})"
    return None


def _torn(archive: zipfile.ZipFile) -> str | None:
    """Return the name of the first record whose checksum is wrong, as testzip does, but on all cores."""

    def check(stream: IO[bytes]) -> str | None:
        try:
            while stream.read(1 << 20):
                pass
        except zipfile.BadZipFile:
            return stream.name
        return None

    with ExitStack() as opened, ThreadPoolExecutor() as pool:
        streams = []
        # all are opened before any is read: from Python 3.12 on, opening one seeks from where the last reading ended
        for record in archive.infolist():
            try:
                streams.append(opened.enter_context(archive.open(record)))
            except zipfile.BadZipFile:
                return record.filename
        return next(filter(None, pool.map(check, streams)), None)


def peek(path: Path) -> Saved:
    """Return what a checkpoint holds; the tensors stay on the disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warnings about other programs' files
        checkpoint = (
            sharded.meta(path) if path.is_dir() else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        )
    return Saved.of(checkpoint, without_tensors=path.is_dir())


def load(path: Path, verified: bool = False) -> dict[str, Any]:
    """Return a checkpoint on the CPU, verified unless it already was; a sharded one as a single file would hold it.

    Raises:
        UserError: It is missing, damaged or not one of ours.
    """
    if not verified:
        verify(path)
    if path.is_dir():
        with of_lm(path):
            return sharded.load_whole(path)
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint


@contextmanager
def of_lm(path: Path) -> Iterator[None]:
    """Turn the exceptions of a checkpoint that lacks something, or has another type for it, into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FOREIGN as error:
        raise UserError(
            f"checkpoint {path}: it is no checkpoint of lm's, or of another version ({described(error)})"
        ) from error


def verify(path: Path) -> Path:
    """Return the path of a whole checkpoint.

    Raises:
        UserError: It is missing, damaged or not one of ours; the newest whole one beside it is named.
    """
    if problem := damage(path):
        if path.is_dir() and (newest := next(iter(newest_first(path)), None)):
            raise UserError(f"checkpoint {path}: it is a run's folder: name one in it, such as {newest}")
        others = (other for other in newest_first(path.parent) if other != path and not damage(other))
        hint = next((f"; {other} is whole" for other in others), "")
        raise UserError(f"checkpoint {path}: {problem}{hint}")
    return path


def newest_first(folder: Path) -> dict[Path, Saved]:
    """Return what a run's readable checkpoints hold, the newest first.

    They are ordered by the start of the run that wrote them, then by step.
    """
    found = {}
    for path in folder.glob("*.ckpt"):
        try:
            if path.is_file() or path.is_dir():  # opening a pipe may wait for ever
                found[path] = peek(path)
        except Exception:  # a damaged file can raise anything; it is no candidate
            continue

    def age(path: Path) -> tuple[float, int, bool, str]:
        return found[path].start, found[path].step, path.name == "last.ckpt", path.name

    return {path: found[path] for path in sorted(found, key=age, reverse=True)}
