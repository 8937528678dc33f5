"""Draw a page's table of over-optimisation: pip install -c constraints.txt -e '.[bench]'.

python benchmarks/optimism_curve.py --output docs/optimism.svg docs/posttraining.md
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib
from figures import cells
from matplotlib.figure import Figure

HEAD = ["policy", "divergence", "learned reward", "true reward"]
COLOURS = {"PPO": "#2c6fbb", "DPO": "#c0392b"}


class Point(NamedTuple):
    """A policy: of which kind, how far it went, and what it gained."""

    kind: str
    divergence: float
    learned: float
    true: float


def read(page: Path) -> list[Point]:
    """Return the rows of the page's table."""
    lines = page.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|") and cells(line) == HEAD)
    points = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        name, *values = cells(line)
        points.append(Point(name.split(",")[0], *map(float, values)))
    return points


def draw(points: list[Point]) -> Figure:
    """Return both rewards over the divergence, a pair of curves for each kind, from the fine-tuned network on."""
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: small, and found by a search
    matplotlib.rcParams["svg.hashsalt"] = "lm"  # the same table gives the same file
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    start = points[0]
    for kind, colour in COLOURS.items():
        curve = [start, *(point for point in points if point.kind == kind)]  # from the strongest penalty to the weakest
        far = [point.divergence for point in curve]
        axes.plot(far, [p.true for p in curve], "o-", color=colour, markersize=4, label=f"{kind}: true reward")
        axes.plot(far, [p.learned for p in curve], "o:", color=colour, markersize=3, label=f"{kind}: learned reward")
    axes.set(xlabel="divergence from the fine-tuned network, nats", ylabel="reward")
    axes.grid(axis="y", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Read the table, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    draw(read(options.page)).savefig(options.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
