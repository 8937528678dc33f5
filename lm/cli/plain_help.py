"""How an option is explained: what it takes, its bounds and its default; jsonargparse alone shows Python's types."""

from argparse import SUPPRESS, Action
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from lm import bounds

PLACEHOLDERS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


class PlainHelp(DefaultHelpFormatter):
    """Writes `--top_k N … (at least 1) [50]` where the type is a simple one.

    It overrides two private methods of argparse, for which argparse's own formatters are made.
    """

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        return PLACEHOLDERS.get(_kind(action)) or super()._get_default_metavar_for_optional(action)

    def _get_help_string(self, action: Action) -> str:
        kind = _kind(action)
        if action.default is SUPPRESS or not (kind in (*PLACEHOLDERS, bool, None) or get_origin(kind) is Literal):
            return super()._get_help_string(action)
        notes = ["needed"] * action.required + _range(self._prog.split()[-1], action.dest)
        text = f"{action.help or ''} ({'; '.join(notes)})" if notes else action.help or ""
        if kind is None or action.default in (None, ""):
            return text
        return f"{text} [{str(action.default).lower() if kind is bool else '%(default)s'}]"


def make_parser(command: str, description: str) -> ArgumentParser:
    """Return the parser of a command that takes no recipe; its options are still to be added."""
    parser = ArgumentParser(
        prog=f"lm {command}", description=description, formatter_class=PlainHelp, exit_on_error=False
    )
    parser.allow_abbrev = False
    return parser


def _kind(action: Action) -> Any:
    """Return the type that an option takes, of "or null" the other; None where it has none, as a flag."""
    kind = getattr(action, "_typehint", action.type)
    parts = [part for part in get_args(kind) if part is not NoneType]
    return parts[0] if len(parts) == 1 and NoneType in get_args(kind) else kind


def _range(command: str, name: str) -> list[str]:
    """Return the bounds of a number, where it has any that say something."""
    *above, leaf = name.split(".")
    owner = bounds.SECTIONS.get(above[0]) if above else command
    bound = bounds.bound(owner, leaf) if owner else None  # of a class, the parser does not know which one
    return [str(bound)] if bound and bound.low > -(2**63) else []
