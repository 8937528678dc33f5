"""Files of two texts a line: tab-separated, or JSON lines with a key for each.

A line is `3 May 1999<TAB>1999-05-03`; or, in a file whose name ends in .jsonl, .jsonl.gz or .jsonl.zst,
`{"source": "3 May 1999", "target": "1999-05-03"}`. The caller says what the two are called.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lm.corpus import conversations, formats, sources
from lm.errors import UserError


class Row(NamedTuple):
    """A line."""

    first: str
    second: str
    place: str
    """Where it is, for messages."""


def read(corpus: str, names: tuple[str, str], given: int) -> tuple[list[Row], int]:
    """Return the lines of a named corpus or of a file, each once, and how many repeat an earlier one.

    Args:
        corpus: Which one.
        names: What the two texts of a line are called, and their keys in JSON lines.
        given: Which of the two a network reads, 0 or 1. It has one answer: with two, it could stand in both splits.

    Raises:
        UserError: It cannot be read, or a line has not both texts, or another answer than an earlier one: says which
            line, and what is expected.
    """
    found: dict[str, Row] = {}
    repeated = 0
    for row in _json(corpus, names) if _is_json(corpus) else _tabs(corpus, names):
        first = found.setdefault(row[given], row)
        if first[:2] != row[:2]:
            line, answer = first.place.rpartition(", ")[2], names[1 - given]
            raise UserError(f"{row.place}: its {names[given]} has another {answer} in {line}: keep one of the two")
        repeated += first is not row
    if not found:
        raise UserError(f"corpus {corpus}: it has no lines: a line is {_form(names)}")
    return [*found.values()], repeated


def _is_json(corpus: str) -> bool:
    return corpus not in sources.NAMED and formats.FORMATS.get(formats.suffix(Path(corpus))) is formats.json_lines


def _json(corpus: str, names: tuple[str, str]) -> Iterator[Row]:
    for row, place in conversations.rows(corpus):
        first, second = (conversations.text_of(row, name, place) for name in names)
        yield Row(first, second, place)


def _tabs(corpus: str, names: tuple[str, str]) -> Iterator[Row]:
    for number, line in enumerate(conversations.lines(corpus), 1):
        place = f"corpus {corpus}, line {number}"
        try:
            text = line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: it is no UTF-8: expected {_form(names)}") from error
        if not text:
            continue
        parts = text.split("\t")
        if len(parts) != 2:
            raise UserError(f"{place}: it has {len(parts) - 1} tabs: expected {_form(names)}")
        for name, part in zip(names, parts, strict=True):
            if not part.strip():
                raise UserError(f"{place}: its {name} is empty: expected {_form(names)}")
        yield Row(parts[0], parts[1], place)


def _form(names: tuple[str, str]) -> str:
    return f"{names[0]}, a tab, {names[1]}"
