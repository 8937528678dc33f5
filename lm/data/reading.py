"""Reading text from anywhere, a piece at a time: text files, JSON lines and Parquet, compressed or not.

To add a format, write a function from an open file to its documents and enter it in FORMATS.
"""

import codecs
import errno
import glob
import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from lm.data import outputs
from lm.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BLOCK = 1 << 18  # bytes read at a time
PIECE = 1 << 20  # characters of a long text that are handed on together
LONGEST = 16 * PIECE  # of a piece, where no good place to cut it comes
CUT = re.compile(r"\S(?= )|[^\W\d_](?=\n)")  # a word of every published encoding ends here
REPLACEMENT = "\ufffd"


@dataclass
class Settings:
    """How text is read.

    Args:
        text_key: The key, or the column, of the text in JSON lines and Parquet.
        errors: What is done about bytes that are not UTF-8: strict stops, replace puts U+FFFD and counts.
        format: What files hold: auto goes by their suffix.
        replaced: How many were replaced so far.
    """

    text_key: str = "text"
    errors: Literal["strict", "replace"] = "strict"
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    replaced: int = field(default=0, init=False)


Reader = Callable[[IO[bytes], str, Settings], Iterator[str]]


def text_blocks(file: IO[bytes], name: str, settings: Settings) -> Iterator[str]:
    """Yield the characters of a UTF-8 file, its line ends as they are.

    Raises:
        UserError: It is not UTF-8; the offset of the first wrong byte is named.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(settings.errors)
    offset = 0
    while True:
        block = file.read(BLOCK)
        pending = decoder.getstate()[0]
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise not_utf8(name, error.object[error.start], offset - len(pending) + error.start) from error
        offset += len(block)
        if settings.errors == "replace":
            settings.replaced += text.count(REPLACEMENT) - (pending + block).count(REPLACEMENT.encode())
        if text:
            yield text
        if not block:
            return


def not_utf8(name: str, byte: int, offset: int) -> UserError:
    """Return the error of a byte that is not UTF-8."""
    return UserError(
        f"{name}: not UTF-8: byte 0x{byte:02x} at offset {offset}: convert the file to UTF-8, or let lm prepare "
        "--errors replace put U+FFFD"
    )


def json_lines(file: IO[bytes], name: str, settings: Settings) -> Iterator[str]:
    """Yield the texts of JSON objects, one a line.

    Raises:
        UserError: A line is no JSON object with text under the key; its number is named.
    """
    offset = 0
    for number, line in enumerate(file, 1):
        try:
            decoded = line.decode(errors=settings.errors)
        except UnicodeDecodeError as error:
            raise not_utf8(name, line[error.start], offset + error.start) from error
        offset += len(line)
        settings.replaced += decoded.count(REPLACEMENT) - line.count(REPLACEMENT.encode())
        if not decoded.strip():
            continue
        try:
            text = json.loads(decoded)[settings.text_key]
            text.encode()  # a string, and one without lone surrogates
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, UnicodeEncodeError) and settings.errors == "replace":
                settings.replaced += 1
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            else:
                raise UserError(
                    f'{name}, line {number}: expected a JSON object with text under "{settings.text_key}" '
                    "(--text_key says another key)"
                ) from error
        yield text


def parquet_rows(file: IO[bytes], name: str, settings: Settings) -> Iterator[str]:
    """Yield the rows of one column of a Parquet file. Needs the extra `parquet`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{name}: reading Parquet needs pyarrow: pip install 'lm[parquet]'") from error
    key = settings.text_key
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if key not in table.schema_arrow.names:
            raise UserError(f'{name} has no column "{key}"; it has {", ".join(table.schema_arrow.names)} (--text_key)')
        for batch in table.iter_batches(batch_size=256, columns=[key], use_threads=False):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str):
                    raise UserError(f'{name}: its column "{key}" has {type(text).__name__}, not text (--text_key)')
                yield text
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not a whole Parquet file with text under {key} ({error})") from error


FORMATS: dict[str, Reader] = {".jsonl": json_lines, ".parquet": parquet_rows}
"""By suffix; every other file is one text."""
TEXTS = (".txt", ".md")
COMPRESSED = (".gz", ".zst")


def suffix(path: Path) -> str:
    """Return the suffix that says a file's format, what compressed it left aside."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def reader_of(path: Path, settings: Settings) -> Reader | None:
    """Return what reads a file's documents; None where the file is one text."""
    kind = suffix(path) if settings.format == "auto" else f".{settings.format}"
    return FORMATS.get(kind)


@contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file for reading; yield it decompressed, and as it lies on the disk, whose position shows progress.

    Raises:
        UserError: It cannot be read, or what compressed it was cut short.
    """
    try:
        with path.open("rb") as raw:
            magic = raw.read(4)
            raw.seek(0)
            if magic[:2] == b"\x1f\x8b":
                yield gzip.GzipFile(fileobj=raw), raw  # type: ignore[misc]
            elif magic == b"\x28\xb5\x2f\xfd":
                yield zstd.ZstdFile(raw), raw  # type: ignore[misc]
            else:
                yield raw, raw
    except (EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError) as error:
        raise UserError(f"{path}: its compressed data is damaged or cut short ({error}): get the file again") from error
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror or error})") from error


def pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Yield a long text in pieces of about PIECE characters, cut where no token of a published encoding would reach."""
    text = ""
    for block in blocks:
        text += block
        if len(text) < PIECE:
            continue
        ends = [match.end() for match in CUT.finditer(text, len(text) - (1 << 16))]
        if ends or len(text) >= LONGEST:
            end = ends[-1] if ends else len(text)
            yield text[:end]
            text = text[end:]
    if text:
        yield text


def find(sources: Iterable[str]) -> list[Path]:
    """Return the files that paths, folders and globs stand for, in an order that depends on their names alone.

    In a folder, files of known formats count; a glob or a path takes any file, one of unknown suffix as text.

    Raises:
        UserError: One stands for no file, or goes round in a loop of symbolic links.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source).expanduser()
        try:
            if path.is_dir():
                matches = sorted(p for p in _walk(path, ()) if suffix(p) in (*FORMATS, *TEXTS))
            elif path.exists() or not glob.has_magic(source):
                path.stat()
                matches = [path]
            else:
                matches = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        except OSError as error:
            reason = "a loop of symbolic links" if error.errno == 40 or "loop" in str(error).lower() else error.strerror
            inside = Path(os.fsdecode(error.filename or source))  # of a folder, the file that it is about
            if inside.is_symlink() and error.errno == errno.ENOENT:
                reason = f"it is {outputs.kind(inside)}"
            raise UserError(f"source {inside}: {reason}") from error
        if not matches:
            kinds = ", ".join((*FORMATS, *TEXTS))
            raise UserError(f"source {source}: no file matches" + (f" ({kinds})" if path.is_dir() else ""))
        found |= dict.fromkeys(matches)
    return list(found)


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"source {folder}: a loop of symbolic links leads back to {real}")
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(Path(entry.path), (*above, real))
        else:
            Path(entry.path).stat()  # a link that leads nowhere is an error, not a file less
            yield Path(entry.path)


def documents(path: Path, settings: Settings) -> Iterator[str]:
    """Yield the documents of a file, each whole; a text file is one."""
    reader = reader_of(path, settings)
    with opened(path) as (file, _):
        if reader is None:
            yield "".join(text_blocks(file, str(path), settings))
        else:
            yield from reader(file, str(path), settings)
