"""What a floor does without: a command that needs no training waits for no Lightning, preparation for no torch.

And below the front door, nothing knows of the command line's options: an error names settings.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lm import cli
from tests.conftest import ROOT, parser_of

BELOW = [path for path in (ROOT / "lm").rglob("*.py") if path.parent.name != "cli"]
OPTION = re.compile(r"(?<![\w-])(?<!docker run )--[a-z]")  # docker's own are no options of lm

WITHOUT = {
    "lightning": (
        "lm.generation",
        "lm.checkpoints.safetensors",
        "lm.cli.sample",
        "lm.cli.export",
        "lm.cli.chat",
        "lm.cli.serve",
    ),
    "torch": ("lm.corpus.prepare", "lm.corpus.token_cache", "lm.corpus.tokenizer_training", "lm.cli.prepare"),
}


@pytest.mark.parametrize("package", WITHOUT)
def test_starts_without(package: str) -> None:
    code = f"import sys, {', '.join(WITHOUT[package])}; sys.exit({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def texts(path: Path) -> Iterator[ast.Constant]:
    """Yield a module's strings, and the fixed parts of its f-strings; docstrings may explain the command line."""
    tree = ast.parse(path.read_text())
    docs = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs:
            yield node


def test_below_the_front_door_no_text_names_an_option() -> None:
    assert len(BELOW) > 90
    found = [f"{path}:{text.lineno}" for path in BELOW for text in texts(path) if OPTION.search(str(text.value))]
    assert not found, "say errors.setting('name'), which lm writes as --name"


def test_what_messages_name_is_an_option() -> None:
    calls = re.compile(r"""\bsetting\(["']([^"']*)["']\)""")
    named = {name for path in BELOW for name in calls.findall(path.read_text())}
    options = {
        option for command in cli.COMMANDS for one in parser_of(command)._actions for option in one.option_strings
    }
    assert len(named) > 10 and {f"--{name}" for name in named} <= options
