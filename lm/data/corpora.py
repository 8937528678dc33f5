"""Corpora: where text comes from, by name or by path.

A corpus is a `Source`: a fingerprint, cheap to take, and a function that reads its text. To add a named corpus, write
a function that returns a Source and enter it in NAMED; a file format, one that reads its text, in READERS.
"""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lm.data import files
from lm.errors import UserError

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
NAMES = "https://raw.githubusercontent.com/karpathy/makemore/master/names.txt"


class Source(NamedTuple):
    """A corpus before it is tokenized."""

    fingerprint: str
    """SHA-256 over what the text is read from."""
    read: Callable[[], str]
    """Reads the whole text."""


def find(corpus: str) -> Source:
    """Return the corpus of that name, or of the file or folder at that path.

    Raises:
        UserError: There is no such name or path, or it cannot be read.
    """
    if corpus in NAMED:
        return NAMED[corpus]()
    path = Path(corpus).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in READERS and p.is_file())
        if not found:
            raise UserError(f"corpus {corpus}: the folder has no {' or '.join(READERS)} file")
        return _from_files(found)
    if path.is_file():
        return _from_files([path])
    raise UserError(f"corpus {corpus}: no such file or folder, and not one of {', '.join(NAMED)}")


def _from_files(paths: list[Path]) -> Source:
    def read() -> str:
        return "\n".join(READERS.get(path.suffix, read_text)(path) for path in paths)

    digests = [path.suffix + files.sha256(path) for path in paths]  # the same bytes read otherwise are another text
    return Source(hashlib.sha256("".join(digests).encode()).hexdigest(), read)


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, its line ends as they are.

    Raises:
        UserError: It is not UTF-8; the offset of the first wrong byte is named.
    """
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}: convert the file to UTF-8"
        ) from error


def read_jsonl(path: Path, key: str = "text") -> str:
    """Read a file of JSON objects, one a line, and join their texts with newlines."""
    texts = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[key]
            text.encode()  # a string, and one without lone surrogates
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f'{path}, line {number}: expected a JSON object with text under "{key}"') from error
        texts.append(text)
    return "\n".join(texts)


def read_parquet(path: Path, key: str = "text") -> str:
    """Read one column of a Parquet file and join its texts with newlines. Needs the extra `parquet`."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'lm[parquet]'") from error
    try:
        columns = pyarrow.parquet.read_schema(path).names
        if key not in columns:
            raise UserError(f'{path} has no column "{key}"; it has {", ".join(columns)}')
        return "\n".join(pyarrow.parquet.read_table(path, columns=[key])[key].to_pylist())
    except (pyarrow.ArrowException, TypeError) as error:  # TypeError: a column of numbers, or of nulls
        raise UserError(f"{path}: not a whole Parquet file with text under {key} ({error})") from error


READERS: dict[str, Callable[[Path], str]] = {
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}


def _generated(make: Callable[[], str]) -> Source:
    text = make()
    return Source(hashlib.sha256(text.encode()).hexdigest(), lambda: text)


def _python_docs() -> str:
    """Return the language reference inside every Python, about half a megabyte."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def _arithmetic() -> str:
    """Return 50,000 sums of two numbers below 1,000, one a line."""
    draw = random.Random(0)
    pairs = ((draw.randrange(1000), draw.randrange(1000)) for _ in range(50_000))
    return "".join(f"{a}+{b}={a + b}\n" for a, b in pairs)


def _shakespeare() -> Source:
    digest = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    return _from_files([files.fetch("tinyshakespeare.txt", SHAKESPEARE, digest)])


def _names() -> Source:
    digest = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"
    return _from_files([files.fetch("names.txt", NAMES, digest)])


NAMED: dict[str, Callable[[], Source]] = {
    "python-docs": lambda: _generated(_python_docs),
    "shakespeare": _shakespeare,
    "names": _names,
    "arithmetic": lambda: _generated(_arithmetic),
}
