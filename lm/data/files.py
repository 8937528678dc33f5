"""Where data files live, and how one that is missing is had: once, with a timeout, under a pinned hash."""

import fcntl
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.error import URLError
from urllib.request import urlopen

from tqdm import tqdm

from lm.errors import UserError

TIMEOUT = 15.0  # seconds without an answer, after which a download is given up
EMBEDDED = "the corpus python-docs needs no network"


def data_home() -> Path:
    """Return the folder of downloaded data: $LM_DATA_HOME, else ~/.cache/lm."""
    return Path(os.environ.get("LM_DATA_HOME") or "~/.cache/lm").expanduser()


def tokens_home() -> Path:
    """Return the folder for prepared token files: in data_home(), or in ~/.cache/lm where that is read-only.

    A folder whose write bits are all off is left alone even by root, who could write it all the same.
    """
    candidates = [data_home(), Path("~/.cache/lm").expanduser()]
    for home in candidates:
        parent = next(p for p in (home, *home.parents) if p.exists())
        if parent.stat().st_mode & 0o222 and os.access(parent, os.W_OK):
            return home / "tokens"
    raise UserError(f"{candidates[0]} is not writable: set LM_DATA_HOME to a folder that is")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, even where the machine stops."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    flush(part)
    part.replace(path)
    flush(path.parent)


@contextmanager
def alone(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock that no other process can have meanwhile; a process that dies, however, leaves none behind.

    Args:
        path: A folder, or a file that is made where it is missing: NFS locks files only.
        refusal: What is said where another process holds it.

    Raises:
        UserError: Another process holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise UserError(refusal) from error
        except OSError:  # a file system without locks: nothing to hold
            break
        if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
            break
        os.close(descriptor)  # the file went with its last holder between the two calls: that lock keeps nobody out
    try:
        yield
    finally:
        if path.is_file():
            path.unlink(missing_ok=True)
        os.close(descriptor)


def fetch(name: str, url: str, digest: str) -> Path:
    """Return the path of a pinned file in data_home(), downloaded if it is not there yet.

    Args:
        name: The file's name in data_home().
        url: Where it is downloaded from.
        digest: SHA-256 of the whole file, in hexadecimal.

    Raises:
        UserError: It cannot be had, or a file of that name with other contents is in the way.
    """
    target = data_home() / name
    if target.exists():
        if sha256(target) == digest:
            return target
        raise UserError(f"{target} is not the file that {name} should be (its SHA-256 differs): move it away")
    part = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{name}.", delete=False) as file:
            part = Path(file.name)
            _download(url, file, name)
        if sha256(part) != digest:
            raise UserError(f"{url} gave a file with another SHA-256 than {name} should have: nothing was kept")
        part.replace(target)
    except (OSError, HTTPException) as error:
        reason = error.reason if type(error) is URLError else error
        raise UserError(
            f"{name} is not in {target.parent} and could not be downloaded from {url} ({reason}): put it there; "
            f"{EMBEDDED}"
        ) from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return target


def _download(url: str, file: IO[bytes], name: str) -> None:
    with urlopen(url, timeout=TIMEOUT) as response:
        total = int(response.headers.get("Content-Length") or 0) or None
        bar = tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=not sys.stderr.isatty())
        with bar:
            while piece := response.read(1 << 16):
                file.write(piece)
                bar.update(len(piece))
