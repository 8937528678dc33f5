"""A fit of loss against size: floor + Σ factor × x^-exponent, of parameters, of tokens, or of both.

Kaplan et al., "Scaling Laws for Neural Language Models" (2020); Hoffmann et al., "Training Compute-Optimal Large
Language Models" (2022).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXPONENTS = np.geomspace(0.02, 2.0, 30)
FINER = tuple(np.geomspace(1 / width, width, 9) for width in (1.15, 1.03, 1.006))


@dataclass(frozen=True)
class Law:
    """What a loss follows.

    Args:
        floor: The loss of an endless size.
        factors: Of each kind of size.
        exponents: Of each kind of size.
        scales: What each is divided by before.
    """

    floor: float
    factors: tuple[float, ...]
    exponents: tuple[float, ...]
    scales: tuple[float, ...]

    def at(self, sizes: Sequence[float]) -> float:
        """Return the loss of a size, or of one of each kind."""
        parts = zip(self.factors, self.exponents, self.scales, sizes, strict=True)
        return float(self.floor + sum(factor * (size / scale) ** -exponent for factor, exponent, scale, size in parts))


def fit(sizes: Sequence[Sequence[float]], losses: Sequence[float]) -> Law:
    """Return the law nearest to runs, by the squares of what it misses; no factor and no floor is negative.

    Args:
        sizes: Of each run: parameters, or parameters and tokens.
        losses: Of each run.

    Raises:
        ValueError: There are fewer runs than the law has numbers.
    """
    x, y = np.array(sizes, dtype=float), np.array(losses, dtype=float)  # (N, K), (N,)
    if len(y) < 1 + 2 * x.shape[1] or any(len(set(column)) < 3 for column in x.T):
        raise ValueError(f"{len(y)} runs are too few for a law of {1 + 2 * x.shape[1]} numbers")
    scales = np.exp(np.log(x).mean(0))
    least, found, exponents = np.inf, np.zeros(0), (1.0,) * x.shape[1]
    for grid in (EXPONENTS, *FINER):  # each around the best so far
        for factors in itertools.product(grid, repeat=x.shape[1]):
            tried = tuple(np.multiply(exponents, factors) if grid is not EXPONENTS else factors)
            columns = np.c_[np.ones(len(y)), (x / scales) ** -np.array(tried)]  # (N, 1 + K)
            solved = _not_negative(columns, y)
            missed = float(((columns @ solved - y) ** 2).sum())
            if missed < least:
                least, found, best = missed, solved, tried
        exponents = best
    return Law(float(found[0]), tuple(map(float, found[1:])), tuple(map(float, exponents)), tuple(map(float, scales)))


def _not_negative(columns: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the least squares' factors, of those subsets of columns that have none below 0 the best."""
    best, least = np.zeros(columns.shape[1]), np.inf
    for kept in itertools.product((True, False), repeat=columns.shape[1]):
        if not any(kept):
            continue
        factors = np.zeros(columns.shape[1])
        factors[list(kept)] = np.linalg.lstsq(columns[:, kept], y, rcond=None)[0]
        missed = ((columns @ factors - y) ** 2).sum()
        if (factors >= 0).all() and missed < least:
            best, least = factors, missed
        if all(kept) and (factors >= 0).all():
            break
    return best


def interval(sizes: Sequence[Sequence[float]], losses: Sequence[float], size: Sequence[float]) -> tuple[float, float]:
    """Return between what the predictions of a size lie where each run in turn is left out."""
    found = []
    for i in range(len(losses)):
        try:
            law = fit([*sizes[:i], *sizes[i + 1 :]], [*losses[:i], *losses[i + 1 :]])
        except ValueError:
            continue
        found.append(law.at(size))
    return (min(found), max(found)) if found else (float("nan"), float("nan"))
