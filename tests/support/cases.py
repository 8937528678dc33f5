"""Which cases of a test run every time."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def often(cases: Iterable[Any], chosen: int | Callable[[Any], bool] = 1) -> list[Any]:
    """Return cases for `parametrize`: those that are not chosen are slow, `make test-slow` runs them.

    Args:
        cases: Values, or tuples of values.
        chosen: How many of the first run every time; or says it of each.
    """
    marked = []
    for number, case in enumerate(cases):
        fast = number < chosen if isinstance(chosen, int) else chosen(case)
        values = case if isinstance(case, tuple) else (case,)
        marked.append(pytest.param(*values, marks=[] if fast else [pytest.mark.slow]))
    return marked
