"""YAML as lm reads it: no duplicate keys, no exploding aliases; top-level holders of anchors are left out."""

import os
import re
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


TAG = "tag:yaml.org,2002:"
PLAIN = ("null", "bool", "int", "float", "str", "seq", "map", "merge", "timestamp")
DECEPTIVE = re.compile(r"[-+]?(0[0-7_]*[1-7][0-7_]*|[\d_]+(:\d+)+\.?[\d_]*)")
"""Numbers to base 8 and 60: 010, which is 8, and 1:30, which is 90."""


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
            total += sum(_size(part, sizes, inside) for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(_size(part, sizes, inside) for part in node.value)
        if total > LARGEST:
            _refuse(f"line {node.start_mark.line + 1}: its aliases stand for more than {LARGEST:,} values: use fewer")
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        _check_value(node)
        sizes[id(node)] = total
    return sizes[id(node)]


def _check_keys(node: yaml.MappingNode) -> None:
    """Refuse keys that are no names, or there twice: alike, or through dots, of which the parser keeps the later."""
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag not in (TAG + "str", TAG + "merge"):
            shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
            _refuse(f"line {line}: key {shown or 'null'} is no name: write it in quotes if it is one")
        if key.value in lines:
            _refuse(f"key {key.value} is there twice, in lines {lines[key.value]} and {line}: drop one")
        parts = [path for path in lines if path.startswith(f"{key.value}.")]
        if parts and isinstance(value, yaml.MappingNode):
            _refuse(
                f"key {key.value} is there twice, in lines {lines[parts[0]]} ({parts[0]}) and {line}: write it once"
            )
        lines[key.value] = line
        if any("." in other.value for other, _ in node.value):
            lines |= {f"{key.value}.{path}": at for path, at in _paths(value)}


def _paths(node: yaml.Node) -> Iterator[tuple[str, int]]:
    """Yield the dotted path of each key in a mapping, and its line."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        yield key.value, key.start_mark.line + 1
        yield from ((f"{key.value}.{path}", line) for path, line in _paths(value))


def _check_value(node: yaml.Node) -> None:
    """Refuse tags that ask for more than plain values, and numbers that do not mean what they look like."""
    line = node.start_mark.line + 1
    if node.tag.removeprefix(TAG) not in PLAIN:
        tag = f"!!{node.tag.removeprefix(TAG)}" if node.tag.startswith(TAG) else node.tag
        _refuse(f"line {line}: the tag {tag} is not read here: leave it out, or quote the text")
    if node.tag in (TAG + "int", TAG + "float"):
        if len(node.value) > 1000:
            _refuse(f"line {line}: a number of {len(node.value):,} digits: none is that large")
        if DECEPTIVE.fullmatch(node.value):
            meant = yaml.safe_load(node.value)
            _refuse(f"line {line}: {node.value} is {meant} in YAML: write {meant}, or '{node.value}' for a text")


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
