"""Draw the training curve of a run from its metrics.csv, as an SVG that needs no library.

python benchmarks/curve.py --output docs/curve.svg logs/shakespeare-cpu/metrics.csv
"""

import argparse
import csv
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 56, 16, 28, 44
COLOURS = {"train/loss": "#9db7d5", "val/loss": "#c0392b"}


def read(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the points (step, value) of each curve."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [(int(row["step"]), float(row[name])) for row in rows if row.get(name)] for name in COLOURS}


def draw(curves: dict[str, list[tuple[int, float]]], title: str) -> str:
    """Return the SVG of curves over a common step axis."""
    points = [point for curve in curves.values() for point in curve]
    last = max(step for step, _ in points)
    low, high = min(value for _, value in points), max(value for _, value in points)

    def at(step: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)
        return f"{x:.1f},{y:.1f}"

    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
    parts = [
        f'{svg} font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{title}</text>',
    ]
    for i in range(5):
        value, step = low + (high - low) * i / 4, last * i // 4
        x, y = at(0, value).split(",")
        parts.append(f'<path d="M{x} {y}H{WIDTH - RIGHT}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end">{value:.2f}</text>')
        x = at(step, low).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">optimizer steps</text>')
    for i, (name, curve) in enumerate(curves.items()):
        line = " ".join(at(*point) for point in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
        y = TOP + 14 + 18 * i
        label = f"{name}, {curve[-1][1]:.3f} at the end"
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{y}" text-anchor="end" fill="{COLOURS[name]}">{label}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Read the table, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.write_text(draw(read(options.table), f"{options.table.parent.name}: loss in nats per token"))


if __name__ == "__main__":
    main()
