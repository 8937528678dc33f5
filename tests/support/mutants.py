"""Modules of lm with one expression or statement replaced, found in the syntax tree: formatting does not matter."""

import ast
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple


class Mutant(NamedTuple):
    """A change that makes a formula wrong."""

    place: str
    """A module of lm.backprop, or one below lm with its folder, and after a colon the function, where that is said."""
    old: str
    """An expression or a statement that is there exactly once."""
    new: str
    """What stands there instead."""
    name: str
    """What is wrong then."""

    def module(self) -> ModuleType:
        name = self.place.partition(":")[0]
        return importlib.import_module(f"lm.{name}" if "." in name else f"lm.backprop.{name}")

    def changed(self, source: str) -> ast.Module:
        """Return the syntax tree of the module's source, with the change made.

        Raises:
            LookupError: What is to be replaced is not there, or more than once.
        """
        tree = ast.parse(source)
        function = self.place.partition(":")[2]
        scopes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function]
        if len(scopes) != bool(function):
            raise LookupError(f"{self.place} is there {len(scopes)} times")
        old, new = _parsed(self.old, self.new)
        wanted = ast.dump(old)
        found = [
            (parent, field, at)
            for parent in ast.walk(scopes[0] if function else tree)
            for field, value in ast.iter_fields(parent)
            for at, node in enumerate(value if isinstance(value, list) else [value])
            if type(node) is type(old) and ast.dump(node) == wanted
        ]
        if len(found) != 1:
            raise LookupError(f"{self.place} has {len(found)} times: {self.old}")
        parent, field, at = found[0]
        value = getattr(parent, field)
        if isinstance(value, list):
            value[at : at + 1] = new
        else:
            setattr(parent, field, *new)
        return ast.fix_missing_locations(tree)


def _parsed(old: str, new: str) -> tuple[ast.AST, list[Any]]:
    """Return what is to be replaced, and its replacement: two expressions where both are, or else statements."""
    try:
        return ast.parse(old, mode="eval").body, [ast.parse(new, mode="eval").body]
    except SyntaxError:
        (statement,) = ast.parse(old).body
        return statement, ast.parse(new).body


@contextmanager
def broken(mutant: Mutant) -> Iterator[None]:
    """Put a changed module where the right one is, wherever it is used."""
    target = mutant.module()
    file = str(target.__file__)
    source = Path(file).read_text()
    registry: dict[type, Any] = importlib.import_module("lm.backprop.rules")._rules

    def load(code: CodeType) -> None:
        before = dict(vars(target))
        exec(code, vars(target))
        if "_rules" in vars(target):  # the rules of all modules outlive the change of this one
            vars(target)["_rules"] = registry
        users = [module for name, module in sys.modules.items() if name.startswith(("lm.", "tests."))]
        for user in users:  # those, too, that were imported while it was changed
            for name, value in list(vars(user).items()):
                if name in before and value is before[name] and callable(value):
                    setattr(user, name, vars(target)[name])

    changed = compile(mutant.changed(source), file, "exec")
    try:
        load(changed)
        yield
    finally:
        load(compile(source, file, "exec"))
