"""A user's own rules: a Python file, named on the command line, that registers them."""

import importlib.util
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from lm import backprop
from lm.backprop.rules import registered
from lm.cli import parsing
from lm.errors import CommandError, UserError

BACKPROP = Path(str(backprop.__file__)).parent


def load(path: Path) -> list[str]:
    """Run a file of rules; return the names of the types that now have one from it.

    A rule takes the place of ours for layers of exactly its type.

    Raises:
        UserError: It cannot be read, raises an error, or registers nothing.
    """
    if not path.is_file():
        raise UserError(f"--rules {path}: there is no such file: name a Python file with functions under @rule(Layer)")
    before = registered()
    loader = SourceFileLoader("rules_of_the_user", str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    try:
        loader.exec_module(importlib.util.module_from_spec(spec))
    except SyntaxError as error:
        raise UserError(f"--rules {path}: line {error.lineno}: {error.msg}: mend the file") from error
    except (Exception, SystemExit) as error:
        text = str(error).splitlines()[0] if str(error) else ""
        raise UserError(f"--rules {path}: {type(error).__name__}: {text}: mend the file") from error
    new = [kind.__qualname__ for kind, one in registered().items() if before.get(kind) is not one]
    if not new:
        raise UserError(f"--rules {path}: it registers no rule: decorate functions with lm.backprop.rule, with (Layer)")
    return new


@contextmanager
def blamed(path: Path | None) -> Iterator[None]:
    """Turn what is raised in a backward pass with a user's rules into a UserError: they may do anything.

    Raises:
        UserError: See there.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if path is None or not any(Path(one.filename).parent == BACKPROP for one in frames):
            raise
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UserError(f"--rules {path}: {text}: lm gradients --rules {path} compares its rules") from error


class WithRules(parsing.FromWeights):
    """Parses a recipe that may have gradients by the user's own rules."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the file of rules."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--rules",
            type=Path | None,
            default=None,
            help="A Python file whose rules, functions under @lm.backprop.rule(Layer), are used instead of ours.",
        )

    def before_instantiate_classes(self) -> None:
        """Load the rules."""
        if self.config.rules is not None:
            load(self.config.rules)
