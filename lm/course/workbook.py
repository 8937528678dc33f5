"""Writes an exercise as a commented Python file and as a notebook: the same cells."""

import json
import textwrap
from pathlib import Path
from typing import Any

from torch import Tensor

from lm import storage
from lm.course import EXERCISES
from lm.course.exercise import Blank, Exercise, Values, body
from lm.errors import UserError, setting

Cell = tuple[str, str]
"""markdown or code, and its text."""
TO_DO = "return None  # your line"


def cells(exercise: Exercise, advice: str = "") -> list[Cell]:
    """Return a workbook's cells; the last one says how to check it, and begins with the advice."""
    values = exercise.values()
    first = [
        ("markdown", f"# {exercise.title}\n\n{exercise.story}"),
        ("code", f'import math\n\nimport torch\nfrom torch.nn import functional as F\n\nEXERCISE = "{exercise.name}"'),
    ]
    if exercise.steps:
        text = f"## The forward pass\n\n```python\n{forward(exercise, values)}\n```"
        first.append(("markdown", text + _given(exercise, values)))
    blanks = [cell for blank in exercise.blanks for cell in _blank(exercise, blank, values)]
    last = [
        ("markdown", f"## Check\n\n{advice}The next cell prints the table here and now."),
        ("code", 'if __name__ == "__main__":\n    from lm.course.table import show\n\n    show(EXERCISE, globals())'),
    ]
    return [*first, *blanks, *last]


def forward(exercise: Exercise, values: Values) -> str:
    """Return the forward pass as lines of code, with the shape of each result."""
    lines = []
    for name, step in exercise.steps.items():
        code = body(step)
        shape = f"  # {tuple(values[name].shape)}"
        if step.__name__ == "<lambda>":
            lines.append(f"{name} = {code}{shape}")
        else:  # some lines, of which the last returns
            lines.append(code.replace("return ", f"{name} = ") + shape)
    return "\n".join(lines)


def _given(exercise: Exercise, values: Values) -> str:
    given = {name: one for name, one in values.items() if name not in exercise.steps and name[1:] not in exercise.steps}
    spelled = [
        f"`{name}` {tuple(one.shape)}" if isinstance(one, Tensor) else f"`{name}` = {one}"
        for name, one in given.items()
    ]
    return f"\n\nGiven: {', '.join(spelled)}."


def _blank(exercise: Exercise, blank: Blank, values: Values) -> list[Cell]:
    signature = f"def {blank.name}({', '.join(blank.parameters)}):"
    if blank.expected is not None:
        says, doc = f"### {blank.name}", "See the top of the page."
    else:
        of = values[blank.of]
        readers = exercise.readers(blank.of)
        used = ", ".join(f"`{one}`" for one in readers)
        says = f"### {blank.name}\n\nThe gradient by `{blank.of}`, which is used by {used}."
        doc = f"Return the gradient of the loss by {blank.of}, of shape {tuple(of.shape)}."
    return [("markdown", says), ("code", f'{signature}\n    """{doc}"""\n    {TO_DO}')]


def as_python(exercise: Exercise, advice: str = "") -> str:
    """Return the workbook as Python, its text in comments; editors show its cells."""
    parts = []
    for kind, text in cells(exercise, advice):
        if kind == "markdown":
            parts.append("# %% [markdown]\n" + textwrap.indent(text, "# ", lambda line: True).replace("# \n", "#\n"))
        else:
            parts.append(f"# %%\n{text}")
    return "\n\n".join(parts) + "\n"


def as_notebook(exercise: Exercise, advice: str = "") -> str:
    """Return the workbook as a notebook."""
    made: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(cells(exercise, advice)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"{exercise.name}-{number}", "metadata": {}}
        cell["source"] = text.splitlines(keepends=True)
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = {
        "cells": made,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


def write(folder: Path, advice: str = "") -> list[Path]:
    """Write all workbooks that are not there yet, and return them: what is there is never replaced.

    Args:
        folder: Where to.
        advice: How to check one; NAME stands for a blank of it.

    Raises:
        UserError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{setting('output')} {folder}: {getattr(error, 'strerror', None) or error}") from error
    written = []
    for number, exercise in enumerate(EXERCISES.values()):
        said = advice.replace("NAME", f"{exercise.name}/{exercise.blanks[0].name}")
        for suffix, text in ((".py", as_python), (".ipynb", as_notebook)):
            path = folder / f"{number:02}-{exercise.name}{suffix}"
            if not path.exists():
                storage.write_whole(path, text(exercise, said).encode())
                written.append(path)
    return written
