"""The table of a checked workbook."""

from collections.abc import Mapping, Sequence
from typing import Any

from lm.course import EXERCISES
from lm.course.check import Answer, judge
from lm.course.student import answer


def lines(rows: Sequence[Answer]) -> list[str]:
    """Return the table of some answers, a line each, and below it what is wrong."""
    width = max(len(row.name) for row in rows)
    text = [f"{'gradient':<{width}}  {'exact':<5}  {'approximate':<11}  {'maxdiff':>8}  {'differences':>11}"]
    for row in rows:
        if row.state == "blank":
            text.append(f"{row.name:<{width}}  to be done")
            continue
        maxdiff, differences = ("–" if one is None else f"{one:.1e}" for one in (row.maxdiff, row.differences))
        marks = f"{_yes(row.exact):<5}  {_yes(row.approximate):<11}  {maxdiff:>8}  {differences:>11}"
        text.append(f"{row.name:<{width}}  {marks}{'' if row.state == 'right' else '  ' + row.message}")
    return text


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def show(name: str, functions: Mapping[str, Any]) -> None:
    """Print the table of what a notebook has so far, or of a file that is run.

    Args:
        name: Of the exercise.
        functions: Where its functions are: `globals()`.
    """
    exercise = EXERCISES[name]
    values = exercise.values()
    rows = []
    for blank in exercise.blanks:
        function = functions.get(blank.name)
        told = answer(function, values) if callable(function) else {"blank": True}
        rows.append(judge(exercise, blank, values, told))
    print("\n".join(lines(rows)))
