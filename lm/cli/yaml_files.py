"""YAML as lm reads it: no duplicate keys, no exploding aliases; top-level holders of anchors are left out."""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from lm.cli.help import SECTIONS
from lm.errors import UserError

LARGEST = 100_000  # values, with aliases expanded; a recipe has some dozens


class Refused(yaml.YAMLError):
    """A text is YAML that lm does not read."""


def use() -> None:
    """Let all parsers read YAML by `parse`."""
    jsonargparse.set_loader("yaml", parse, (yaml.YAMLError,))


_theirs = jsonargparse.get_loader("yaml")


def parse(text: str) -> Any:
    """Return the values of a YAML text, a file's or an option's.

    Raises:
        yaml.YAMLError: It is not YAML, or has a duplicate key or too many values; its cause may be a UserError.
    """
    try:
        node = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if node is not None:
            _size(node, {}, ())
        values = _theirs(text)
    except (RecursionError, ValueError) as error:  # thousands of brackets; numbers of thousands of digits; no Unicode
        raise Refused("nested too deeply" if isinstance(error, RecursionError) else str(error)) from error
    if not isinstance(node, yaml.MappingNode) or node.flow_style:  # an option's value
        return _without_empty(values)
    if isinstance(values, str) and text.strip(": \n") in SECTIONS:  # theirs reads `trainer:` alone as a text
        values = {}
    return _without_holders(values) if isinstance(values, dict) else values


def check_file(path: Path) -> None:
    """Refuse a file that `parse` would refuse, and name it, which parsers do not.

    Raises:
        UserError: It is a pipe or a device, which parsers would wait for; a key is duplicated; aliases expand to
            too much; a section or list is neither; or it says `config`.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(f"--config {path}: a pipe or a device, which cannot be read twice: say a YAML file")
    try:
        values = parse(path.read_text())
        if pipe := next((text for text in _texts(values) if is_pipe(text)), None):
            raise UserError(f"{path}: {pipe}: a pipe or a device, which cannot be read twice: say a file")
        _check_sections(path, values)
    except Refused as error:
        raise UserError(f"{path}: {error}") from error
    except (OSError, ValueError, yaml.YAMLError):
        pass


def _check_sections(path: Path, values: Any) -> None:
    """Refuse what jsonargparse takes as it is, and trips over: a section that is a number, --config inside a file."""
    if not isinstance(values, dict):
        return
    if "config" in values:
        raise UserError(f"{path}: config: a file names no others: say --config once for each")
    for section in SECTIONS:
        if not isinstance(found := values.get(section, {}), dict | str):
            raise UserError(f"{path}: {section}: found {str(found)[:80]}, expected a YAML mapping")
    if not isinstance(found := values.get("source", []), list):
        raise UserError(f"{path}: source: found {str(found)[:80]}, expected a list: source: [FILE, FOLDER]")


def is_pipe(path: str) -> bool:
    """Return whether a path is a named pipe: parsers open any value that may be a file, and wait."""
    with suppress(OSError, ValueError):
        return stat.S_ISFIFO(os.stat(path).st_mode)
    return False


def _texts(values: Any) -> Iterator[str]:
    left = [values]  # not recursive: they may be nested as deeply as Python can recurse
    while left:
        one = left.pop()
        if isinstance(one, dict | list):
            left += one.values() if isinstance(one, dict) else one
        elif isinstance(one, str):
            yield one


def _size(node: yaml.Node, sizes: dict[int, int], above: tuple[int, ...]) -> int:
    """Return how many values a node has, with aliases expanded; each node is visited once."""
    if id(node) in above:
        _refuse(f"line {node.start_mark.line + 1} has an alias of what it is part of: write it out")
    if id(node) not in sizes:
        inside = (*above, id(node))
        total = 1
        if isinstance(node, yaml.MappingNode):
            _no_key_twice(node)
            total += sum(_size(part, sizes, inside) for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(_size(part, sizes, inside) for part in node.value)
        if total > LARGEST:
            _refuse(f"line {node.start_mark.line + 1}: its aliases stand for more than {LARGEST:,} values: use fewer")
        sizes[id(node)] = total
    return sizes[id(node)]


def _no_key_twice(node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if (key.tag, key.value) in lines:
                first = lines[key.tag, key.value]
                _refuse(f"key {key.value} is there twice, in lines {first} and {line}: drop one")
            lines[key.tag, key.value] = line


def _refuse(text: str) -> None:
    raise Refused(text) from UserError(text)


def _without_holders(values: dict[Any, Any]) -> dict[Any, Any]:
    """Return a file's mapping without keys that only hold anchors, and without empty sections."""
    kept = {key: value for key, value in values.items() if not str(key).startswith((".", "x-"))}
    kept = {key: value for key, value in kept.items() if value is not None or key not in SECTIONS}
    whole: dict[Any, Any] = _without_empty(kept)
    return whole


def _without_empty(values: Any) -> Any:
    """Return values without an empty `init_args:`."""
    if isinstance(values, list):
        return [_without_empty(each) for each in values]
    if not isinstance(values, dict):
        return values
    return {key: _without_empty(each) for key, each in values.items() if each is not None or key != "init_args"}
