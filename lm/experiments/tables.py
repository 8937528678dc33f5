"""A run's metrics.csv as curves: of runs that still go on, of damaged and of long ones."""

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROWS = 4_000  # of a longer table, about so many are read, evenly spread: twenty tables of 100,000 rows are seconds
POINTS = 800  # of a curve; each is the mean over an interval of steps


@dataclass
class Table:
    """What a metrics.csv says.

    Args:
        columns: The steps and the values of each column, where it has any.
        rows: How many rows the file has.
        read: How many of them were read.
        damaged: How many rows are no rows of such a table.
    """

    columns: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    rows: int = 0
    read: int = 0
    damaged: int = 0

    def curve(self, *names: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps and values of the first of some columns that is there."""
        empty = np.empty(0)
        return next((self.columns[name] for name in names if name in self.columns), (empty, empty))

    def last(self, *names: str) -> float | None:
        """Return a column's last value."""
        values = self.curve(*names)[1]
        return float(values[-1]) if len(values) else None


def read(path: Path) -> Table:
    """Return what a table says; rows that a kill, a full disk or another program spoiled are counted and left out."""
    try:
        data = path.read_bytes()
    except OSError:
        return Table()
    head, _, body = data.partition(b"\n")
    names = head.decode(errors="replace").strip("\r\ufeff").split(",")
    if not body and names[0] != "step":
        return Table(damaged=1 if data.strip() else 0)
    if names[0] != "step":
        return Table(damaged=1 + body.count(b"\n"))
    lines = body.split(b"\n")
    torn = bool(lines.pop().strip())  # a row without its end may have half a number
    kept = _spread(lines)
    cells, damaged = _cells(kept, len(names))
    values = np.array(cells, dtype=float).reshape(len(cells), len(names))  # (rows, columns)
    return Table(_columns(names, values), len(lines), len(kept), damaged + torn)


def _spread(lines: list[bytes]) -> list[bytes]:
    """Return about ROWS lines: those that have values where most have none, as evaluations do, and some of the rest."""
    if len(lines) <= ROWS:
        return lines
    gaps = [line.count(b",,") for line in b"\n".join(lines).replace(b"\r", b",").split(b"\n")]
    usual = gaps[len(gaps) // 2]
    rare = {i for i, count in enumerate(gaps) if count != usual}
    chosen = {*range(0, len(lines), -(-len(lines) // ROWS)), len(lines) - 1}
    chosen |= {*sorted(rare)[:: max(1, len(rare) // ROWS)]}
    return [lines[i] for i in sorted(chosen)]


def _cells(lines: list[bytes], width: int) -> tuple[list[list[float]], int]:
    """Return rows of numbers, nan where a cell is empty, and how many lines are none."""
    found, damaged = [], 0
    texts = (line.decode(errors="replace").replace("\0", "�") for line in lines)
    for row in csv.reader(texts):
        try:
            numbers = [float(cell) if cell else math.nan for cell in row]
        except ValueError:
            numbers = []
        if len(numbers) == width and numbers[0] >= 0:
            found.append(numbers)
        else:
            damaged += 1
    return found, damaged


def _columns(names: list[str], values: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return each column's steps and finite values, in the order of the steps; a step that is there twice counts once.

    Args:
        names: Of the columns.
        values: All rows (rows, columns).
    """
    found = {}
    for i, name in enumerate(names[1:], start=1):
        there = np.isfinite(values[:, i]) & np.isfinite(values[:, 0])
        if there.any():
            steps, places = np.unique(values[there, 0][::-1], return_index=True)  # of a step, the later row
            found[name] = steps, values[there, i][::-1][places]
    return found


def smoothed(steps: np.ndarray, values: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of a curve over at most so many intervals of steps, and the steps at which these end."""
    if len(steps) <= points:
        return steps, values
    edges = np.linspace(steps[0], steps[-1], points + 1)
    place = np.clip(np.searchsorted(edges, steps, side="left") - 1, 0, points - 1)
    counts = np.bincount(place, minlength=points)
    sums = np.bincount(place, weights=values, minlength=points)
    ends = np.maximum.reduceat(steps, np.searchsorted(place, np.flatnonzero(counts)))
    return ends, sums[counts > 0] / counts[counts > 0]


def seconds(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Return the time that training took until each step, evaluations left out: its tokens over their throughput."""
    steps, tokens = table.curve("train/tokens", "tokens")
    at, speeds = table.curve("train/tokens_per_second", "tokens_per_second")
    if len(steps) == 0 or len(at) == 0:
        return np.empty(0), np.empty(0)
    speed = np.interp(steps, at, np.maximum(speeds, 1e-9))
    return steps, np.cumsum(np.diff(tokens, prepend=0.0).clip(0) / speed)


def at_steps(curve: tuple[np.ndarray, np.ndarray], steps: np.ndarray) -> list[float] | None:
    """Return a curve's values at other steps, between its own by a straight line from 0 on; None of an empty curve."""
    if len(curve[0]) == 0:
        return None
    return [float(x) for x in np.interp(steps, np.r_[0.0, curve[0]], np.r_[0.0, curve[1]])]


def rounded(values: Iterable[float]) -> list[float]:
    """Return numbers to six digits: more would only make a page large."""
    return [float(f"{value:.6g}") for value in values]
