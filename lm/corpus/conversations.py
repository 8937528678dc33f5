"""Conversations as JSON lines: read, and checked.

A line is `{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}`, or the short form
of one turn, `{"prompt": "…", "completion": "…"}`. A line of pairs is `{"prompt": "…", "chosen": "…", "rejected": "…"}`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.corpus import formats, sources
from lm.errors import UserError
from lm.tokenizers.chat import ROLES
from lm.tokenizers.templates import Messages


def read(corpus: str) -> list[Messages]:
    """Return the conversations of a named corpus or of a file.

    Raises:
        UserError: It cannot be read, or a line is no conversation: says the line, the role, and what is expected.
    """
    found = [_messages(row, place) for row, place in rows(corpus)]
    if not found:
        raise UserError(f"corpus {corpus}: it has no lines: a conversation is a line of JSON")
    return found


def rows(corpus: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the JSON objects of a named corpus or of a file of JSON lines, each with its place for messages.

    Raises:
        UserError: It cannot be read, or a line is no JSON object.
    """
    for number, line in enumerate(lines(corpus), 1):
        place = f"corpus {corpus}, line {number}"
        try:
            text = line.decode().strip().removeprefix("\ufeff")
            row = json.loads(text) if text else None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: it is no JSON: expected an object in UTF-8, a line each") from error
        if row is not None or text:
            yield _object(row, place), place


def lines(corpus: str) -> Iterator[bytes]:
    """Yield the lines of a named corpus or of a file, compressed or not.

    Raises:
        UserError: It cannot be read.
    """
    path = Path(corpus).expanduser()
    if corpus not in sources.NAMED and path.is_file():
        with formats.opened(path) as (file, _):
            yield from file
        return
    if path.is_dir():
        raise UserError(f"corpus {corpus}: it is a folder: name a file")
    yield from (line.encode() for line in sources.find(corpus).read().splitlines())


def _object(found: Any, place: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UserError(f"{place}: it is {_kind(found)}: expected an object")
    return found


def text_of(row: dict[str, Any], key: str, place: str) -> str:
    """Return the text under a key.

    Raises:
        UserError: There is none, or it is empty.
    """
    found = row.get(key)
    if not isinstance(found, str):
        there = f"its {key} is {_kind(found)}" if key in row else f"it has no {key}"
        raise UserError(f"{place}: {there}: expected a text")
    if not found:
        raise UserError(f"{place}: its {key} is empty: expected a text")
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: its {key} has half of a surrogate pair: expected Unicode") from error
    return found


def _kind(found: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(found), "a number")


def read_pairs(corpus: str) -> list[tuple[Messages, Messages]]:
    """Return the pairs of a named corpus or of a file: conversations with the chosen and with the rejected answer.

    Raises:
        UserError: It cannot be read, or a line has no prompt, chosen and rejected, or two equal answers.
    """
    found: list[tuple[Messages, Messages]] = []
    for row, place in rows(corpus):
        prompt, *answers = (text_of(row, key, place) for key in ("prompt", "chosen", "rejected"))
        if answers[0] == answers[1]:
            raise UserError(f"{place}: chosen and rejected are equal: expected two different answers")
        asked = {"role": "user", "content": prompt}
        chosen, rejected = ([asked, {"role": "assistant", "content": answer}] for answer in answers)
        found.append((chosen, rejected))
    if not found:
        raise UserError(f"corpus {corpus}: it has no lines: a pair is a line of JSON")
    return found


def _messages(row: dict[str, Any], place: str) -> Messages:
    if "messages" not in row:
        if "prompt" not in row:
            listed = ", ".join(map(repr, [*row][:8])) or "nothing"
            raise UserError(f"{place}: it has {listed[:200]}: expected messages, or prompt and completion")
        question, answer = (text_of(row, key, place) for key in ("prompt", "completion"))
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    listed = row["messages"]
    if not isinstance(listed, list):
        raise UserError(f"{place}: its messages are {_kind(listed)}: expected a list")
    messages: list[dict[str, str]] = []
    expected: tuple[str, ...] = ("system", "user")
    for number, found in enumerate(listed, 1):
        at = f"{place}, message {number}"
        message = _object(found, at)
        role = message.get("role")
        if role not in expected:
            shown = role if role in ROLES else repr(role)[:40]
            what = f"its role is {shown}" if "role" in message else f"it has {', '.join(message)[:60]}, and no role"
            raise UserError(f"{at}: {what}: expected {' or '.join(expected)}")
        messages.append({"role": role, "content": text_of(message, "content", f"{at} of the {role}")})
        expected = ("assistant",) if role == "user" else ("user",)
    if not messages or messages[-1]["role"] != "assistant":
        last = f"its last role is {messages[-1]['role']}" if messages else "it has no messages"
        raise UserError(f"{place}: {last}: expected the assistant's answer at the end")
    return messages
