"""A report for the terminal: the losses drawn in letters, and the tables."""

from typing import Any

import numpy as np

from lm.experiments import tables
from lm.experiments.page import shown
from lm.experiments.runs import Run, differing

WIDTH, HEIGHT = 72, 16


def text(runs: list[Run], notes: list[str]) -> str:
    """Return a report as lines."""
    found = [run.figures() for run in runs]
    names = [name for name in dict.fromkeys(name for one in found for name in one) if name not in ("command",)]
    parts = [chart(runs)] if any(len(run.table.curve(name)[0]) for run in runs for name in DRAWN) else []
    parts.append(grid([["", *(run.name for run in runs)], *([n, *(one.get(n) for one in found)] for n in names)]))
    if len(runs) > 1:
        rows = [[name, *values] for name, values in differing(runs).items()]
        parts.append(grid([["settings that differ", *(run.name for run in runs)], *rows]) if rows else "")
    last = {run.name: run.samples[-1] for run in runs if run.samples}
    parts += [f"{name}, a sample at step {step}:\n{sample}" for name, (step, sample) in last.items()]
    notes = [*notes, *(f"{run.name}: {note}" for run in runs for note in run.notes)]
    return "\n\n".join(filter(None, [*parts, *(f"note: {note}" for note in notes)]))


DRAWN = ("train/loss", "val/loss")


def chart(runs: list[Run]) -> str:
    """Return training losses (·) and validation losses (a letter for each run) over the steps."""
    curves = [(run.table.curve("train/loss"), "·") for run in runs]
    letters = [chr(ord("A") + i % 26) for i in range(len(runs))]
    curves += [(run.table.curve("val/loss"), letter) for run, letter in zip(runs, letters, strict=True)]
    drawn = [(*tables.smoothed(*curve, points=WIDTH), sign) for curve, sign in curves if len(curve[0])]
    right = max(steps[-1] for steps, _, _ in drawn)
    low, high = (f([f(values) for _, values, _ in drawn]) for f in (np.min, np.max))
    rows = [[" "] * WIDTH for _ in range(HEIGHT)]
    for steps, values, sign in drawn:
        for step, value in zip(steps, values, strict=True):
            x = round(float(step) / max(right, 1) * (WIDTH - 1))
            y = round(float(high - value) / max(high - low, 1e-12) * (HEIGHT - 1))
            rows[y][x] = sign
    lines = [f"{'':>9}│{''.join(row)}".rstrip() for row in rows]
    lines[0], lines[-1] = f"{high:9.4f}│{''.join(rows[0])}".rstrip(), f"{low:9.4f}│{''.join(rows[-1])}".rstrip()
    named = "  ".join(f"{letter} {run.name}" for letter, run in zip(letters, runs, strict=True))
    ends = f"{'':>9}└{'─' * WIDTH}\n{'':>10}0{f'step {int(right):,}':>{WIDTH - 1}}"
    return "\n".join([f"loss: · training, validation {named}", *lines, ends])


def grid(rows: list[list[Any]]) -> str:
    """Return rows in columns; a long cell is cut."""
    if len(rows) == 1:
        rows = [*rows, ["–"] * len(rows[0])]
    cells = [[_cut(one if isinstance(one, str) else shown(one)) for one in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _cut(cell: str) -> str:
    line = " ".join(cell.split())
    return line if len(line) <= 44 else line[:43] + "…"
