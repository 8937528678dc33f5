from types import SimpleNamespace
from typing import Any

import pytest

from lm.experiments import scaling_page


def runs(*sizes: tuple[int, int]) -> list[Any]:
    """Return runs of so many parameters and tokens, whose losses follow a law of both."""
    return [
        SimpleNamespace(
            name=f"run {i}",
            figures=lambda n=n, d=d: {"parameters": n, "tokens": d, "validation loss": 1 + 40 * n**-0.3 + 90 * d**-0.4},
        )
        for i, (n, d) in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            [(1000, 9000), (1300, 9000), (1600, 9000), (2000, 9000)],
            ["Validation loss by parameters", "4,000 parameters"],
        ),
        (
            [(1000, 9000), (1000, 12_000), (1000, 15_000), (1000, 18_000)],
            ["Validation loss by tokens", "36,000 tokens"],
        ),
        ([(n, d) for n in (1000, 1500, 2000) for d in (9000, 15_000, 20_000)], ["Twice the largest of both"]),
        ([(1000, 9000), (1300, 9000), (1600, 9000), (1999, 9000)], []),  # too near each other for a law
        ([(n, d) for n in (1000, 1500, 1999) for d in (9000, 15_000, 20_000)], []),
        ([(1000, 9000), (1300, 9000), (2000, 9000)], []),  # too few
    ],
)
def test_a_law_is_fitted_to_sizes_that_differ_by_a_factor_of_two(sizes: list[tuple[int, int]], said: list[str]) -> None:
    found = scaling_page.sections(runs(*sizes))
    assert len(found) == bool(said) and all(text in found[0] for text in said)
