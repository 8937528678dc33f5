"""The losses of a run as a drawing of characters, for a terminal."""

from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 64, 12
MARKS = {"train/loss": "·", "val/loss": "o"}  # the later one is on top


def drawing(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return lines that draw the training and the validation loss over the steps; none where there is no loss.

    Args:
        rows: Of metrics.csv.
    """
    curves = {
        name: [(int(row["step"]), float(row[name])) for row in rows if row.get(name) not in (None, "", "nan", "inf")]
        for name in MARKS
    }
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return []
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    for name, curve in curves.items():
        for x, y in curve:
            column = round((x - first) / max(1, last - first) * (WIDTH - 1))
            line = round((high - y) / ((high - low) or 1) * (HEIGHT - 1))
            grid[line][column] = MARKS[name]
    labels = [f"{high:.3f}", *[""] * (HEIGHT - 2), f"{low:.3f}"]
    wide = max(map(len, labels))
    lines = [f"{label:>{wide}} |{''.join(line).rstrip()}" for label, line in zip(labels, grid, strict=True)]
    steps = f"{first}{f'step {last}':>{WIDTH - len(str(first))}}"
    legend = ", ".join(f"{mark} {name}" for name, mark in MARKS.items())
    return [*lines, f"{'':>{wide}} +{'-' * WIDTH}", f"{'':>{wide}}  {steps}", f"{'':>{wide}}  {legend}"]
