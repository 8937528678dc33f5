"""Where data files live, and downloading a missing one: once, with a timeout and a pinned hash."""

import errno
import fcntl
import hashlib
import os
import pwd
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import URLError
from urllib.request import urlopen

from tqdm import tqdm

from lm.errors import UserError

TIMEOUT = 15.0  # seconds without an answer, after which a download is given up
EMBEDDED = "the corpus python-docs needs no network"


def data_home() -> Path:
    """Return the folder of downloaded data: $LM_DATA_HOME, else ~/.cache/lm.

    Raises:
        UserError: No home folder is known.
    """
    said = os.environ.get("LM_DATA_HOME")
    if not said:
        return default_home()
    with suppress(RuntimeError):  # ~ and no home folder
        return Path(said).expanduser()
    raise UserError(f"LM_DATA_HOME {said}: there is no such home folder: say a whole path")


def default_home() -> Path:
    """Return ~/.cache/lm; if HOME is empty or missing, the system's user database gives the home folder.

    Raises:
        UserError: No home folder is known.
    """
    home = os.environ.get("HOME")
    if not home:
        with suppress(KeyError):
            home = pwd.getpwuid(os.getuid()).pw_dir
    if not home or not home.strip("/") or not home.startswith("/"):
        raise UserError(f"HOME is {home or 'not set'}, no home folder: set HOME, or LM_DATA_HOME to a folder for data")
    return Path(home) / ".cache" / "lm"


def tokens_home() -> Path:
    """Return the folder for prepared token files: in data_home(), or in ~/.cache/lm where that is read-only.

    A folder without any write permission bit counts as read-only even for root, who could write to it.
    """
    for find in (data_home, default_home):
        home = find()
        parent = nearest(home)
        if parent.is_dir() and parent.stat().st_mode & 0o222 and os.access(parent, os.W_OK):
            return home / "tokens"
    raise UserError(f"{data_home()} is not writable: set LM_DATA_HOME to a folder that is")


def nearest(path: Path) -> Path:
    """Return the path, or the nearest of its parents that exists."""
    return next(p for p in (path, *path.parents) if os.path.lexists(p) or not p.name)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # for a file that opens but cannot be read, the system gives no name
        error.filename = str(path)
        raise


def plain(path: Path) -> Path:
    """Return the path of a file to read.

    Raises:
        OSError: It is a pipe or a device, which could keep its reader waiting for ever.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise OSError(errno.EINVAL, "a pipe or a device, which cannot be read twice: say a file", str(path))
    return path


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole(
    path: Path, take_place: Callable[[Path, Path], Any] = os.replace, *, flushed: bool = True
) -> Iterator[IO[bytes]]:
    """Open a new file beside path; once it is written, it takes path's place. After an error it is removed.

    Args:
        path: The file, which is always there whole or not at all.
        take_place: Puts the new file where path is.
        flushed: Whether that holds after a power cut, too, which means waiting for the disk.
    """
    part = part_of(path)
    opened = part.open("xb")  # never overwrites a file
    try:
        with opened as file:
            yield file
            file.flush()
            if flushed:
                os.fsync(file.fileno())
        take_place(part, path)
        if flushed:
            flush(path.parent)
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            part.unlink()
        raise


def part_of(path: Path) -> Path:
    """Return a new name beside path, for a file or folder that is being written."""
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.part")


def parts(folder: Path, name: str) -> list[Path]:
    """Return the unfinished files in a folder: of processes that were killed, or are still writing.

    Args:
        folder: Where they wrote.
        name: What they wrote, a regular expression.
    """
    pattern = re.compile(rf"\.({name})\.[0-9a-f]+\.part")
    return [path for path in folder.glob(".*.part") if pattern.fullmatch(path.name)] if folder.is_dir() else []


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, even after a power cut."""
    with whole(path) as file:
        file.write(data)


def holds_only(folder: Path, names: str) -> bool:
    """Return whether a folder (not a link to one) has only files whose names match a regular expression."""
    return (
        folder.is_dir()
        and not folder.is_symlink()
        and all(re.fullmatch(names, p.name) and p.is_file() and not p.is_symlink() for p in folder.iterdir())
    )


def remove_folder(folder: Path, names: str) -> None:
    """Remove a folder, file by file, if it has only files whose names match a regular expression.

    Raises:
        UserError: It has other files, too.
    """
    if not holds_only(folder, names):
        raise UserError(f"{folder} is in the way and has other files than lm writes there: move it away")
    for path in list(folder.iterdir()):
        path.unlink()
    folder.rmdir()


def replace_folder(part: Path, folder: Path, names: str) -> None:
    """Put a new folder in place of an old one, if any, which may have only files whose names match.

    A folder cannot be replaced atomically: `put_back` repairs what a process killed between the two renames left.

    Raises:
        UserError: The old one has other files, too.
    """
    old = _aside(folder)
    if folder.exists():
        if not holds_only(folder, names):
            raise UserError(f"{folder} is in the way and has other files than lm writes there: move it away")
        if old.exists():
            remove_folder(old, names)
        folder.rename(old)
    try:
        part.rename(folder)
    except OSError:
        put_back(folder, names)
        raise
    flush(folder.parent)
    if old.exists():
        remove_folder(old, names)


def put_back(folder: Path, names: str) -> None:
    """Put back a folder that a killed process had moved aside but not yet replaced."""
    if not os.path.lexists(folder) and holds_only(_aside(folder), names):
        _aside(folder).rename(folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name[:50]}.old.part")


@contextmanager
def folder_made(*folders: Path) -> Iterator[None]:
    """Make folders; at the end, remove the new ones that are empty, so that a refused start leaves nothing."""
    made = [p for folder in folders for p in (folder, *folder.parents) if not os.path.lexists(p)]
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for path in made:  # their files survive a power cut only if they do
            flush(path.parent)
        yield
    finally:
        for path in sorted(set(made), reverse=True):  # inner ones first
            with suppress(OSError):  # it is in use, or was never made
                path.rmdir()


@contextmanager
def alone(path: Path, refusal: str) -> Iterator[None]:
    """Hold an exclusive lock, released even when the process is killed.

    Args:
        path: A folder, or a file, which is made if it is missing: NFS locks only files.
        refusal: The error's text where another process holds it.

    Raises:
        UserError: Another process holds it.
    """
    while True:
        how = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        try:
            descriptor = os.open(path, how, 0o666)
        except OSError as error:
            raise UserError(f"{path} could not be opened ({error.strerror}): make it writable, or remove it") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise UserError(refusal) from error
        except OSError:  # a file system without locks: nothing to hold
            break
        if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
            break
        os.close(descriptor)  # its last holder removed it between the two calls: this lock excludes nobody
    try:
        yield
    finally:
        with suppress(OSError):
            if path.is_file() and not path.stat().st_size:  # what has content is not ours
                path.unlink()
        os.close(descriptor)


def fetch(name: str, url: str, digest: str) -> Path:
    """Return the path of a pinned file in data_home(), downloaded if it is not there yet.

    Args:
        name: The file's name in data_home().
        url: Where it is downloaded from.
        digest: SHA-256 of the whole file, in hexadecimal.

    Raises:
        UserError: It cannot be downloaded, or a file of that name with other contents is in the way.
    """
    target = data_home() / name
    if os.path.lexists(target):
        with suppress(OSError):
            if sha256(target) == digest:
                return target
        raise UserError(f"{target} is not the file that {name} should be (its SHA-256 differs): move it away")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as file:
            _download(url, file, name)
            file.flush()
            if sha256(Path(file.name)) != digest:
                raise UserError(f"{url} gave a file with another SHA-256 than {name} should have: nothing was kept")
    except (OSError, HTTPException) as error:
        reason = error.reason if type(error) is URLError else error
        raise UserError(
            f"{name} is not in {target.parent} and could not be downloaded from {url} ({reason}): put it there; "
            f"{EMBEDDED}"
        ) from error
    return target


def _download(url: str, file: IO[bytes], name: str) -> None:
    with urlopen(url, timeout=TIMEOUT) as response:
        total = int(response.headers.get("Content-Length") or 0) or None
        bar = tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=not sys.stderr.isatty())
        with bar:
            while piece := response.read(1 << 16):
                file.write(piece)
                bar.update(len(piece))
