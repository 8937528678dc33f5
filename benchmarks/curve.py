"""Draw the training curve of a run from its metrics.csv: pip install -c constraints.txt -e '.[bench]'.

python benchmarks/curve.py --output docs/curve.svg logs/shakespeare-cpu/metrics.csv
"""

import argparse
import csv
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

CURVES = {"train/loss": ("training", "#9db7d5", 1.2), "val/loss": ("validation", "#c0392b", 2.0)}


def read(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the points (step, value) of each curve."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [(int(row["step"]), float(row[name])) for row in rows if row.get(name)] for name in CURVES}


def draw(curves: dict[str, list[tuple[int, float]]], title: str) -> Figure:
    """Return curves over a common step axis, each named at its end."""
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: small, and found by a search
    matplotlib.rcParams["svg.hashsalt"] = "lm"  # the same curve gives the same file
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        label, colour, width = CURVES[name]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=width)
        step, value = points[-1]
        axes.annotate(
            f"{label} {value:.2f}", (step, value), (6, 0), textcoords="offset points", color=colour, va="center"
        )
    axes.set(title=title, xlabel="optimizer steps", ylabel="nats per token")
    axes.set_xlim(left=0)
    axes.margins(x=0)
    axes.grid(axis="y", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Read the table, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    draw(read(options.table), f"{options.table.parent.name}: loss").savefig(options.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
