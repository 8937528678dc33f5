"""The header of a shard, its first 128 bytes."""

import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from lm import storage
from lm.errors import UserError

MAGIC, VERSION = b"LMTOKENS", 1
LAYOUT = struct.Struct("<8sIIQQI32s32s")  # of the header, up to its CRC-32
HEADER = 128  # bytes, padded with zeros


class Header(NamedTuple):
    """The fields of a shard's header."""

    itemsize: int
    """Bytes of a token: 2 or 4."""
    tokens: int
    documents: int
    """How many documents start in it."""
    n_vocab: int
    tokenizer: bytes
    """SHA-256 of the tokenizer's state."""
    checksum: bytes
    """SHA-256 of all that follows the header."""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return HEADER + self.tokens * self.itemsize + self.documents * 8

    def pack(self) -> bytes:
        """Return its 128 bytes."""
        body = LAYOUT.pack(MAGIC, VERSION, *self)
        return (body + struct.pack("<I", zlib.crc32(body))).ljust(HEADER, b"\0")


def read_header(path: Path) -> Header:
    """Return a shard's header, after checking its CRC-32 and the file's size.

    Raises:
        UserError: It is missing, not a shard, of another version, or not as long as its header says.
    """
    try:
        with storage.plain(path).open("rb") as file:
            data = file.read(HEADER)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"shard {path}: {error.strerror}: prepare the corpus again") from error
    body, crc = data[: LAYOUT.size], data[LAYOUT.size : LAYOUT.size + 4]
    if (
        len(data) < HEADER
        or data[:8] != MAGIC
        or crc != struct.pack("<I", zlib.crc32(body))
        or any(data[len(body) + 4 :])
    ):
        raise UserError(f"shard {path}: its header is damaged or none: prepare the corpus again")
    _, version, *fields = LAYOUT.unpack(body)
    header = Header(*fields)
    if version != VERSION or header.itemsize not in (2, 4):
        raise UserError(f"shard {path}: written in version {version} of the format, this lm reads {VERSION}")
    if size != header.size:
        raise UserError(f"shard {path}: has {size} bytes, its header says {header.size}: copy or prepare it again")
    return header
