"""Reading text from anywhere, a piece at a time: text files, JSON lines and Parquet, compressed or not.

To add a format, write a function that yields an open file's documents and add it to FORMATS.
"""

import codecs
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from lm.errors import UserError, setting

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BLOCK = 1 << 18  # bytes read at a time
PIECE = 1 << 20  # characters in a piece of a long text
LONGEST = 16 * PIECE  # characters of a piece in which no good place to cut is found
CUT = re.compile(r"\S(?= )|[^\W\d_](?=\n)")  # every published encoding ends a word here
REPLACEMENT = "\ufffd"


@dataclass
class Settings:
    """How text is read.

    Args:
        text_key: The key, or the column, of the text in JSON lines and Parquet.
        errors: What to do about bytes that are not UTF-8 and rows without text: strict stops; replace puts U+FFFD for
            such bytes and counts them; skip leaves out and counts rows of JSON lines and Parquet that have either, and
            leaves out what it cannot read in a folder.
        format: The files' format; auto goes by their suffix.
        replaced: How many bytes were replaced so far.
        skipped: How many rows were left out so far.
    """

    text_key: str = "text"
    errors: Literal["strict", "replace", "skip"] = "strict"
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    replaced: int = field(default=0, init=False)
    skipped: int = field(default=0, init=False)

    @property
    def unread(self) -> list[str] | None:
        """A new list for unreadable sources, which skip leaves out; None where one is an error."""
        return [] if self.errors == "skip" else None

    @property
    def decoding(self) -> str:
        """How Python's decoder treats invalid bytes."""
        return "replace" if self.errors == "replace" else "strict"


class TextError(UserError):
    """Text that cannot be read as requested.

    Args:
        text: What was found, and where.
        advice: What helps whoever can choose the `Settings`.
    """

    def __init__(self, text: str, advice: str = "") -> None:
        super().__init__(text)
        self.advice = advice


Reader = Callable[[IO[bytes], str, Settings], Iterator[str]]


def text_blocks(file: IO[bytes], name: str, settings: Settings) -> Iterator[str]:
    """Yield the characters of a UTF-8 file, line ends unchanged.

    Raises:
        UserError: It is not UTF-8; the message gives the offset of the first invalid byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(settings.decoding)
    offset = file.tell()
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


def not_utf8(name: str, byte: int, offset: int) -> TextError:
    """Return the error of a byte that is not UTF-8."""
    return TextError(
        f"{name}: not UTF-8: byte 0x{byte:02x} at offset {offset}: convert the file to UTF-8",
        f", or let {setting('errors')} replace put U+FFFD",
    )


def no_text(place: str, found: str) -> TextError:
    """Return the error of a row, or a column, without text."""
    advice = f": say another {setting('text_key')}, or {setting('errors')} skip to leave such rows out"
    return TextError(f"{place}: {found}", advice)


def json_lines(file: IO[bytes], name: str, settings: Settings) -> Iterator[str]:
    """Yield the texts of JSON objects, one a line.

    Raises:
        TextError: A line is not a JSON object with text under the key; the message gives its number.
    """
    offset = file.tell()
    for number, line in enumerate(file, 1):
        try:
            text = _text_of(line, f"{name}, line {number}", settings)
        except UnicodeDecodeError as error:
            if settings.errors != "skip":
                raise not_utf8(name, line[error.start], offset + error.start) from error
            settings.skipped += 1
        except TextError:
            if settings.errors != "skip":
                raise
            settings.skipped += 1
        else:
            if text is not None:
                yield text
        offset += len(line)


def _text_of(line: bytes, place: str, settings: Settings) -> str | None:
    """Return the text of a JSON object; None where the line is empty."""
    decoded = line.decode(errors=settings.decoding)
    settings.replaced += decoded.count(REPLACEMENT) - line.count(REPLACEMENT.encode())
    decoded = decoded.strip().removeprefix("\ufeff")  # files that begin with a BOM may have been joined
    if not decoded:
        return None
    key = settings.text_key
    try:
        row = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        raise no_text(place, f'expected a JSON object with text under "{key}", found no JSON') from error
    text = row.get(key) if isinstance(row, dict) else row
    if not isinstance(row, dict) or not isinstance(text, str):
        found = f"an object of {', '.join(map(repr, [*row][:8])) or 'nothing'}" if isinstance(row, dict) else _kind(row)
        under = f" with {_kind(text)} there" if isinstance(row, dict) and key in row else ""
        raise no_text(place, f'expected a JSON object with text under "{key}", found {found[:200]}{under}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if settings.errors != "replace":
            raise no_text(place, f'the text under "{key}" has half of a surrogate pair') from error
        settings.replaced += 1
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def parquet_rows(file: IO[bytes], name: str, settings: Settings) -> Iterator[str]:
    """Yield the rows of one column of a Parquet file. Needs the extra `parquet`.

    Raises:
        TextError: There is no such column, or a row of it has no text; the message gives its number.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{name}: reading Parquet needs pyarrow: pip install 'lm[parquet]'") from error
    key, number = settings.text_key, 0
    try:
        # without pre_buffer=False, an Arrow thread still reads the file when an error closes it, and aborts
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as table:
            columns = table.schema_arrow.names
            if key not in columns:
                raise no_text(name, f'has no column "{key}"; it has {", ".join(columns[:20]) or "none"}')
            for batch in table.iter_batches(batch_size=256, columns=[key], use_threads=False):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if isinstance(text, str):
                        yield text
                    elif settings.errors == "skip":
                        settings.skipped += 1
                    else:
                        raise no_text(f"{name}, row {number}", f'its column "{key}" has {_kind(text)}, not text')
    except (pyarrow.ArrowException, UnicodeDecodeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f'{name}: not a whole Parquet file with text under "{key}" ({reason})') from error


FORMATS: dict[str, Reader] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_lines,
    ".parquet": parquet_rows,
}
"""By lower-case suffix; every other file is one text."""
TEXTS = (".txt", ".md")
IN_FOLDERS = (*(kind for kind in FORMATS if kind != ".json"), *TEXTS)  # a .json is as often settings
COMPRESSED = (".gz", ".zst")


def suffix(path: Path) -> str:
    """Return the suffix that tells a file's format, without the compression's."""
    compressed = path.suffix.lower() in COMPRESSED
    return (Path(path.stem) if compressed else path).suffix.lower()


def reader_of(path: Path, settings: Settings) -> Reader | None:
    """Return what reads a file's documents; None where the file is one text."""
    kind = suffix(path) if settings.format == "auto" else f".{settings.format}"
    return FORMATS.get(kind)


@contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file for reading; yield it decompressed, and the raw file, whose position shows progress.

    A byte order mark at its beginning is skipped.

    Raises:
        UserError: It cannot be read, is in UTF-16 or UTF-32, or its compressed data is truncated.
    """
    try:
        with path.open("rb") as raw:
            magic = raw.read(4)
            raw.seek(0)
            file: IO[bytes] = raw
            if magic[:2] == b"\x1f\x8b":
                file = gzip.GzipFile(fileobj=raw)  # type: ignore[assignment]
            elif magic == b"\x28\xb5\x2f\xfd":
                file = zstd.ZstdFile(raw)  # type: ignore[assignment]
            begin = file.read(4)
            if begin[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or begin == codecs.BOM_UTF32_BE:
                raise UserError(f"{path}: in UTF-16 or UTF-32, as its first bytes say: convert the file to UTF-8")
            file.seek(len(codecs.BOM_UTF8) if begin.startswith(codecs.BOM_UTF8) else 0)
            yield file, raw
    except (EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError) as error:
        raise UserError(f"{path}: its compressed data is damaged or cut short ({error}): get the file again") from error
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror or error})") from error


def pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Yield a long text in pieces of about PIECE characters, cut where no published encoding's token would cross."""
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


def documents(path: Path, settings: Settings) -> Iterator[str]:
    """Yield the documents of a file, each whole; a text file is one."""
    reader = reader_of(path, settings)
    with opened(path) as (file, _):
        if reader is None:
            yield "".join(text_blocks(file, str(path), settings))
        else:
            yield from reader(file, str(path), settings)
