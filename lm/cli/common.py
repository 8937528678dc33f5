"""What all commands share, and is cheap to import: options, output, errors in one line."""

import json
import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from jsonargparse import ArgumentParser

from lm import log, storage
from lm.errors import UserError, causes


def output(as_json: bool) -> IO[str]:
    """Return where progress goes: standard error where the last line of standard output is to be JSON."""
    return sys.stderr if as_json else sys.stdout


def print_json(values: dict[str, Any]) -> None:
    """Print a result as one line of JSON, which has no NaN or infinity: they become null."""
    print(json.dumps(log.finite(values), allow_nan=False), flush=True)


@contextmanager
def one_line_errors(
    parser: Callable[[], ArgumentParser],
    words: Sequence[str] = (),
    meant: Callable[[str], tuple[list[str], dict[str, list[str]]]] | None = None,
) -> Iterator[None]:
    """Turn what jsonargparse raises into a UserError that names the key, what was found, and the nearest known name.

    Args:
        parser: Returns the parser, once there is one.
        words: The words of the command line.
        meant: Returns what can be meant, given all that was said: names, and classes for keys that take them; the
            parser's own options by default.
    """
    try:
        yield
    except UserError:
        raise
    except (ArgumentError, TypeError, ValueError, KeyError, ImportError, AttributeError) as error:
        for cause in causes(error):
            if isinstance(cause, UserError):  # a constructor's, called while parsing
                raise cause from error
        if not isinstance(error, ArgumentError) and os.environ.get("LM_DEBUG"):
            raise
        from lm.cli import messages  # imported here: most command lines have no error

        names = known_names(parser())
        classes: dict[str, list[str]] = {}
        if meant:
            more, classes = meant(" ".join(f"{one.key} {one.value}" for one in messages.said(words)))
            names = sorted({*names, *more})
        text = str(getattr(error, "message", None) or error)
        raise UserError(messages.explain(text, words, names, classes, parser().prog)) from error


@contextmanager
def text_options(source: list[str]) -> Iterator[None]:
    """Add to an error about a text the setting that helps; at the end, note the files that were left out."""
    from lm.corpus import formats, source_files

    try:
        yield
    except formats.TextError as error:
        raise UserError(f"{error.text}{error.advice}") from error
    for note in (source_files.left_out(source), source_files.not_read(source) if source != ["-"] else None):
        if note:
            print(note, file=sys.stderr)


def known_names(parser: ArgumentParser) -> list[str]:
    """Return the options that a parser knows."""
    return sorted({action.dest for action in parser._actions if not action.dest.endswith("help")})


def need_packages(command: str, *names: str) -> None:
    """Raise a UserError where a package is missing that a command needs beyond lm's own."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise UserError(f"lm {command} needs {' and '.join(missing)}: pip install 'lm[serve]'")


def text_of(option: str, path: Path) -> str:
    """Return the text of the file that an option names.

    Raises:
        UserError: It cannot be read as UTF-8.
    """
    try:
        return storage.plain(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--{option} {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error


def chat_template(path: Path) -> str:
    """Return the text of the file that --chat_template names.

    Raises:
        UserError: It cannot be read, or is no template.
    """
    from jinja2 import TemplateSyntaxError

    from lm.tokenizers.template_process import environment

    text = text_of("chat_template", path)
    try:
        environment().parse(text)
    except TemplateSyntaxError as error:
        raise UserError(f"--chat_template {path}: line {error.lineno}: {error.message}") from error
    except RecursionError as error:
        raise UserError(f"--chat_template {path}: it is nested too deeply") from error
    return text


TOKENIZERS = "char, byte, gpt2, cl100k_base, o200k_base, or the path of a .tiktoken file."
