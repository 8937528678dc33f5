"""The values of a command line: parsed, and checked against the table of bounds before anything is done with them."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lm import bounds
from lm.cli import common, yaml_files
from lm.errors import UserError

PATHS = ("config", "ckpt_path", "init_from", "corpus", "prompt_file")
READ_ONCE = ("prompt", "stop", "prompt_file", "source", "output")
"""Texts, and paths that are checked where they are used."""

DEEP = re.compile(r"(?:[\[{]\s*){100}")
"""More nested brackets than any setting has; a parser would exhaust Python's stack."""

NUMBERS = bounds.BOUNDS.keys() - {*PATHS, "max_time", "val_check_interval"}  # those may be times
BASE_60 = re.compile(r"[-+]?\d+(:\d+)+(\.\d*)?")
"""1:30, which parsers take for the number 90."""


def parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Return a command's options.

    Raises:
        UserError: One is unknown, missing, of a wrong type or out of its bounds.
    """
    prepare(arguments)
    with common.one_line_errors(lambda: parser, arguments):
        options = parser.parse_args(side_by_side(parser, arguments))
    check(options, parser.prog.split()[-1])
    return options


def side_by_side(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    """Return a command's words with the options first, where it takes several other words.

    argparse wants those side by side; people also say `lm solve 1+2 --show_steps 3+4`.
    """
    if not any(one.nargs in ("*", "+") and not one.option_strings for one in parser._actions):
        return arguments
    options, rest = list[str](), list[str]()
    words = iter(arguments)
    for word in words:
        if word == "--":
            return [*options, word, *rest, *words]
        if not word.startswith("-"):
            rest.append(word)
            continue
        action = parser._option_string_actions.get(word)
        if action is None or action.nargs == 0:
            options.append(word)
        elif (value := next(words, None)) is not None:
            options += [word, value]
        else:
            return [*options, *rest, word]  # its value is missing: no other word becomes it
    return [*options, *rest]


def prepare(arguments: list[str]) -> None:
    """Let parsers read YAML by lm's rules, and check the named files before they do.

    Parsers do not say which config has an error, and wait forever for a pipe that nobody writes to.

    Args:
        arguments: The words of the command line.
    """
    yaml_files.use()
    for word, following in pairwise([*arguments, "--"]):
        name, equals, value = word.partition("=")
        value, leaf = value if equals else following, name.split(".")[-1].lstrip("-")
        if leaf in PATHS and not value:
            raise UserError(f"{name} '': it is empty: name a file, or leave the option out")
        if leaf in NUMBERS and BASE_60.fullmatch(value):
            raise UserError(f"{name}: found '{value[:40]}', expected a number in decimal digits")
        if leaf not in READ_ONCE and DEEP.match(value):
            raise UserError(f"{name}: its value is nested too deeply to be one")
        if name in ("-c", "--config"):
            yaml_files.check_file(Path(value))
        elif name.startswith("--") and leaf not in READ_ONCE and yaml_files.is_pipe(value):
            raise UserError(f"{name} {value}: a pipe or a device, which cannot be read twice: say a file")


def check(options: Namespace, command: str = "") -> None:
    """Refuse numbers that are out of bounds, and text with a zero byte, which no file or program takes.

    Args:
        options: What was parsed, possibly a whole recipe.
        command: The command's name, for its own bounds.
    """
    values = options.as_dict()
    for complaint in (*bounds.complaints(values, command), *_zero_bytes(values)):
        name = complaint.partition(" ")[0]
        raise UserError(complaint if "." in name else f"--{complaint}")  # a key of a recipe, or an option


def _zero_bytes(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _zero_bytes(each, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for each in value:
            yield from _zero_bytes(each, path)
    elif isinstance(value, str) and "\0" in value:
        yield f"{path} has a zero byte in it: say it without"
