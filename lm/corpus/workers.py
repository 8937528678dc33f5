"""Encoding in parallel: batches of documents to tokens, returned in order."""

import hashlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm import tokenizers
from lm.corpus import shards
from lm.errors import UserError, setting, stops_wait


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    split: str | None
    """None for a whole document, whose split follows from its hash."""
    starts: bool
    ends: bool


class DocumentBatch(NamedTuple):
    """Pieces that are encoded together."""

    pieces: list[Piece]
    place: tuple[int, int, int, int]
    """Where reading resumes: the file, how many of its pieces are done, replaced bytes and skipped rows before it."""
    position: int
    """Bytes read so far of all files, as on disk (compressed)."""
    replaced: int
    skipped: int


class Encoded(NamedTuple):
    """A batch, encoded."""

    ids: dict[str, bytes]
    starts: dict[str, np.ndarray]
    documents: int
    bytes: int


def split_of(digest: bytes, val_fraction: float, test_fraction: float) -> str:
    """Return the split of a document from a hash of its content: equal documents share a split, in any order."""
    share = int.from_bytes(digest) / 2 ** (8 * len(digest))
    if share < test_fraction:
        return "test"
    return "val" if share < test_fraction + val_fraction else "train"


@dataclass(frozen=True)
class Encode:
    """What a worker does with a batch.

    Args:
        folder: Where tokenizer.json is.
        identity: Its hash.
        dtype: Integer type of the stored ids.
        val_fraction: Share for validation.
        test_fraction: Share for testing.
    """

    folder: str
    identity: str
    dtype: str
    val_fraction: float
    test_fraction: float

    def __call__(self, batch: DocumentBatch) -> Encoded:
        """Return the tokens of a batch, each document's under its split."""
        tokenizer = _tokenizer(self.folder, self.identity)
        ids: dict[str, list[np.ndarray]] = {}
        starts: dict[str, list[int]] = {}
        lengths = dict.fromkeys(shards.SPLITS, 0)
        size = 0
        for text, split, begins, ends in batch.pieces:
            data = text.encode()
            size += len(data)
            if split is None:
                digest = hashlib.blake2b(data, digest_size=8).digest()
                split = split_of(digest, self.val_fraction, self.test_fraction)
            if begins:
                starts.setdefault(split, []).append(lengths[split])
            made = tokenizer.encode(text).astype(self.dtype)
            if ends and tokenizer.eot is not None:
                made = np.append(made, np.array(tokenizer.eot, self.dtype))
            ids.setdefault(split, []).append(made)
            lengths[split] += len(made)
        return Encoded(
            {split: np.concatenate(parts).tobytes() for split, parts in ids.items()},
            {split: np.array(starts.get(split, []), np.int64) for split in ids},
            sum(piece.starts for piece in batch.pieces),
            size,
        )


@lru_cache(1)
def _tokenizer(folder: str, identity: str) -> tokenizers.Tokenizer:
    # the hash is part of the key: one process may prepare a folder twice, with different tokenizers
    return tokenizers.load_tokenizer(Path(folder) / "tokenizer.json")


@contextmanager
def ordered(
    encode: Callable[[DocumentBatch], Encoded], batches: Iterable[DocumentBatch], workers: int
) -> Iterator[Iterator[tuple[DocumentBatch, Encoded]]]:
    """Yield an iterator of batches with their encodings, in order, encoding only a few ahead."""
    if workers == 1:
        yield ((batch, encode(batch)) for batch in batches)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_follow_parent)

    def results() -> Iterator[tuple[DocumentBatch, Encoded]]:
        waiting: deque[tuple[DocumentBatch, Future[Encoded]]] = deque()
        for batch in batches:
            with stops_wait():  # the first call starts the processes
                waiting.append((batch, pool.submit(encode, batch)))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()

    try:
        yield results()
    except BrokenProcessPool as error:
        raise UserError(
            f"{setting('workers')}: a process that encodes has ended, for want of memory perhaps: say fewer, and give "
            "the same command again: it goes on from there; a program that calls this needs "
            '`if __name__ == "__main__":`'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Leave signals to the parent, and end when it ends, however it does."""
    for signum in (signal.SIGINT, signal.SIGHUP):  # a terminal sends these to all; a failing pool sends SIGTERM
        signal.signal(signum, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def end_with_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
