"""Verifying shards, once per machine: the checksum, and that ids are within the vocabulary.

A shard is verified when it is first opened, so that a run need not read the whole corpus first. An intact one is noted
in LM_DATA_HOME by its path, inode and time of change, so that other ranks, workers and runs need not read it again.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from lm import storage
from lm.corpus.shard_header import HEADER, Header, read_header
from lm.errors import UserError

BLOCK = 8 << 20  # bytes read at a time; whole tokens


def check(path: Path, header: Header) -> None:
    """Verify a shard.

    Args:
        path: The file.
        header: The header it should have.

    Raises:
        UserError: Its checksum is wrong, or an id is not in the vocabulary, or documents start outside of it.
    """
    if read_header(path) != header:
        raise UserError(f"shard {path}: not the one that its manifest names: copy or prepare it again")
    digest, left, largest = hashlib.sha256(), header.tokens * header.itemsize, -1
    starts = b""
    try:
        with path.open("rb") as file:
            file.seek(HEADER)
            while block := file.read(min(left, BLOCK) if left else BLOCK):
                digest.update(block)
                if left:
                    largest = max(largest, int(np.frombuffer(block, f"<u{header.itemsize}").max()))
                    left -= len(block)
                else:
                    starts += block
    except (OSError, ValueError) as error:  # ValueError: it was truncated inside a token
        raise UserError(f"shard {path}: could not be read ({error}): copy or prepare it again") from error
    if digest.digest() != header.checksum:
        raise UserError(f"shard {path}: its checksum is wrong: copy or prepare it again")
    if largest >= header.n_vocab:
        raise UserError(
            f"shard {path}: has id {largest}, its tokenizer's vocabulary has {header.n_vocab}: prepare it again"
        )
    places = np.frombuffer(starts, "<i8")
    if len(places) and (places[0] < 0 or places[-1] >= max(1, header.tokens) or (np.diff(places) < 0).any()):
        raise UserError(f"shard {path}: its documents start outside of it, or out of order: prepare it again")


def check_once(path: Path, header: Header) -> None:
    """Verify a shard, see `check`, unless this machine has done so before."""
    with _alone(path, header) as note:
        if note is None or not note.exists():
            check(path, header)
            remember(path, header)


def remember(path: Path, header: Header) -> None:
    """Note that a shard was verified."""
    with suppress(OSError, UserError):  # read-only: then each process verifies it
        note = _note(path, header)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def _note(path: Path, header: Header) -> Path:
    stat = path.stat()
    what = (os.path.realpath(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, header)
    return storage.tokens_home().with_name("verified") / hashlib.sha256(repr(what).encode()).hexdigest()[:32]


@contextmanager
def _alone(path: Path, header: Header) -> Iterator[Path | None]:
    """Let one process at a time verify a shard; others wait for its result. Yields the path of the shard's note."""
    with path.open("rb") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            note = _note(path, header)
        except (OSError, UserError):
            note = None
        yield note


def shard_sum(path: Path) -> bytes:
    """Return the SHA-256 of what follows a shard's header."""
    with path.open("rb") as file:
        file.seek(HEADER)
        return hashlib.file_digest(file, "sha256").digest()
