"""What all commands share and costs nothing to import: options, output, errors in one line."""

import difflib
import json
import math
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from jsonargparse import ArgumentParser

from lm.errors import UserError


def output(as_json: bool) -> IO[str]:
    """Return where progress goes: standard error where the last line of standard output is to be JSON."""
    return sys.stderr if as_json else sys.stdout


def print_json(values: dict[str, Any]) -> None:
    """Print a result as one line of JSON, which has no NaN or infinity: they become null."""
    print(json.dumps(finite(values), allow_nan=False), flush=True)


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Return values with null for what JSON has no word for."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


@contextmanager
def one_line_errors(
    parser: Callable[[], ArgumentParser], names: Callable[[ArgumentParser], list[str]] | None = None
) -> Iterator[None]:
    """Turn what jsonargparse raises into a UserError that names the key, what was found, and the nearest known name.

    Args:
        parser: Returns the parser, once it is there.
        names: Returns the names that can be meant; the parser's options by default.
    """
    try:
        yield
    except UserError:
        raise
    except (ArgumentError, TypeError, ValueError, KeyError, ImportError, AttributeError) as error:
        if cause := _cause(error):
            raise cause from error
        if not isinstance(error, ArgumentError) and os.environ.get("LM_DEBUG"):
            raise
        known = (names or known_names)(parser())
        raise UserError(explain(str(getattr(error, "message", None) or error), known)) from error


@contextmanager
def text_options(source: list[str]) -> Iterator[None]:
    """Add to an error in a text the option that mends it, and say which files of a folder are left out."""
    from lm.data import reading

    try:
        yield
    except reading.TextError as error:
        raise UserError(f"{error}{error.option}") from error
    if note := reading.left_out(source):
        print(note, file=sys.stderr)


def known_names(parser: ArgumentParser) -> list[str]:
    """Return the options that a parser knows."""
    return sorted({action.dest for action in parser._actions})


def _cause(error: BaseException | None) -> UserError | None:
    """Return the UserError among an error's causes: one that a constructor raised while it was being parsed."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = error.__cause__ or error.__context__
    return None


UNKNOWN = (  # how jsonargparse says that a name is not known
    r"[Kk]ey ['\"]([\w.]+)['\"] is not expected",
    r"[Uu]nrecognized arguments: --([\w.]+)",
    r"[Oo]ption ['\"]([\w.]+)['\"] is not",
    r"No action for key ['\"]([\w.]+)['\"]",
    r"does not accept nested key ['\"]([\w.]+)['\"]",
)


def explain(message: str, names: list[str]) -> str:
    """Return one line for a parser's message.

    Args:
        message: What jsonargparse says, possibly over many lines; of nested problems the innermost counts.
        names: Known option and key names, for suggestions.
    """
    text = " ".join(message.split())
    for pattern in UNKNOWN:
        if found := re.findall(pattern, text):
            return f"unknown option or key {found[0]}{suggestion(found[0], names)}"
    if missing := re.findall(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        return f"class_path {'.'.join(missing[0])}: no such class{suggestion(missing[0][1], names)}"
    if missing := re.findall(r"No module named '([\w.]+)'", text):
        return f"class_path: there is no module {missing[0]} to import"
    if denied := re.findall(r"Importing '([\w.]+)' is not allowed", text):
        return f"class_path {denied[0]}: it is not allowed here, as it could run any code: name a class of your own"
    if file := re.findall(r"File does not exist: '?([^']+)'?", text):
        return f"{file[-1]}: no such file"
    if empty := re.findall(r"(?:Problems parsing config|Unable to (?:load|parse)[^:]*): (.*)", text):
        return f"the config is no YAML mapping: {empty[0][:300]}"
    if "Unexpected config:" in text:
        return "the config is empty or no YAML mapping: see configs/quickstart.yaml"
    if re.search(r"init_args=Namespace\(net=None", text):
        return "no network is said: give a recipe, --config configs/quickstart.yaml, or --model.init_args.net CLASS"
    value = re.search(r"(?:Got|Given) value: (.+?)\.?(?= Given | Got value| - |$)", text)
    if value and (keys := re.findall(r"Parser key \"([\w.]+)\"", text)):
        kinds = re.findall(r"Expected an? <(?:class|enum) '([\w.]+)'>", text)
        kinds += [choice for choices in re.findall(r"Literal\[(.+?)\]", text) for choice in choices.split(", ")]
        expected = " or ".join(dict.fromkeys(kind for kind in kinds if kind not in ("NoneType", "dict", "Namespace")))
        return f"{keys[-1]}: found {value[1]!r}, expected {expected or 'another type'}: see --help"
    return text if len(text) < 600 else text[:600] + " …"


def suggestion(found: str, names: list[str]) -> str:
    """Return a hint at the known name that is nearest to a wrong one."""
    last = found.split(".")[-1]
    near = difflib.get_close_matches(found, names, n=1) or difflib.get_close_matches(
        last, [name.split(".")[-1] for name in names], n=1
    )
    return f": did you mean {near[0]}?" if near else ": see --help"


TOKENIZERS = "char, byte, gpt2, cl100k_base, o200k_base, or the path of a .tiktoken file."
