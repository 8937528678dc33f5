"""Corpora: where text comes from, by name or by path.

A corpus is a `Source`: a cheap fingerprint, and a function that reads its text. To add a named corpus, write a
function that returns a Source and add it to NAMED; for a file format see lm.corpus.formats.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lm import storage
from lm.corpus import formats, generated, source_files
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
    if not os.path.lexists(path):
        raise UserError(f"corpus {corpus}: no such file or folder, and not one of {', '.join(NAMED)}")
    return _from_files(source_files.find([str(path)]))


def left_out(corpus: str) -> str | None:
    """Return a line on the files of a folder that are left out as not text; None where there are none."""
    return None if corpus in NAMED else source_files.left_out([corpus])


def _from_files(paths: list[Path]) -> Source:
    def read() -> str:
        return "\n".join(text for path in paths for text in formats.documents(path, formats.Settings()))

    # the same bytes in another format are another text
    digests = [formats.suffix(path) + storage.sha256(path) for path in paths]
    return Source(hashlib.sha256("".join(digests).encode()).hexdigest(), read)


def _generated(make: Callable[[], str]) -> Source:
    text = make()
    return Source(hashlib.sha256(text.encode()).hexdigest(), lambda: text)


def _python_docs() -> str:
    """Return the language reference inside every Python, about half a megabyte."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def _shakespeare() -> Source:
    digest = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    return _from_files([storage.fetch("tinyshakespeare.txt", SHAKESPEARE, digest)])


def _names() -> Source:
    digest = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"
    return _from_files([storage.fetch("names.txt", NAMES, digest)])


NAMED: dict[str, Callable[[], Source]] = {
    "python-docs": lambda: _generated(_python_docs),
    "shakespeare": _shakespeare,
    "names": _names,
    "arithmetic": lambda: _generated(generated.arithmetic),
    "conversations": lambda: _generated(generated.conversations),
    "names-to-write": lambda: _generated(generated.names_to_write),
    "dates": lambda: _generated(generated.dates),
    "reviews": lambda: _generated(generated.reviews),
    "preferences": lambda: _generated(generated.preferences),
}
