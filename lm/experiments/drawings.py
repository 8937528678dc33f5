"""Drawings of a sweep and of a fit, as SVG: still pictures, for a page that is printed, too."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT, LEFT, BELOW, ABOVE = 500, 240, 62, 34, 22


@dataclass
class Axis:
    """Where values are along a line.

    Args:
        values: All that are drawn; texts stand side by side.
        log: Whether their logarithms are.
        low: Where the least is drawn.
        high: Where the greatest is.
    """

    values: Sequence[Any]
    log: bool
    low: float
    high: float

    def __post_init__(self) -> None:
        """Find the range."""
        self.names = list(dict.fromkeys(map(str, self.values))) if any(map(_is_text, self.values)) else []
        numbers = [self._number(value) for value in self.values] or [0.0]
        self.first, self.last = min(numbers), max(numbers)

    def _number(self, value: Any) -> float:
        if self.names:
            return float(self.names.index(str(value)))
        return math.log10(value) if self.log else float(value)

    def at(self, value: Any) -> float:
        """Return where a value is drawn."""
        if self.first == self.last:
            return (self.low + self.high) / 2
        return self.low + (self._number(value) - self.first) / (self.last - self.first) * (self.high - self.low)

    def marks(self) -> list[tuple[float, str]]:
        """Return what is written along the line: places and texts."""
        if self.names:
            return [(self.at(name), name[:24]) for name in self.names]
        ends = [self.first + i / 4 * (self.last - self.first) for i in range(5)]
        values = [10**end if self.log else end for end in (ends if self.first < self.last else ends[:1])]
        return [(self.at(value), f"{value:.3g}") for value in values]


def _is_text(value: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float)


def _text(x: float, y: float, text: str, how: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{how}">{html.escape(text)}</text>'


def _point(x: float, y: float, said: str) -> str:
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#1f77b4" fill-opacity="0.7">'
    return f"{circle}<title>{html.escape(said)}</title></circle>"


def _svg(width: float, height: float, parts: list[str], title: str) -> str:
    head = (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" aria-label="{html.escape(title)}">'
    )
    return f"<figure>{head}{''.join(parts)}</svg><figcaption>{html.escape(title)}</figcaption></figure>"


def scatter(
    title: str,
    points: Sequence[tuple[Any, float, str]],
    *,
    log_x: bool = False,
    log_y: bool = False,
    line: Sequence[tuple[Any, float]] = (),
) -> str:
    """Return points over an axis, and perhaps a line.

    Args:
        title: Of the figure.
        points: Each with what is said where the mouse is over it.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical one is.
        line: The points of a line.
    """
    across = Axis([x for x, *_ in (*points, *line)], log_x, LEFT, WIDTH - 12)
    up = Axis([y for _, y, *_ in (*points, *line)], log_y, HEIGHT - BELOW, ABOVE)
    parts = [
        f'<path d="M{LEFT} {ABOVE - 8}V{HEIGHT - BELOW + 4}H{WIDTH - 8}" fill="none" stroke="#999"/>',
        *(_text(x, HEIGHT - BELOW + 18, text) for x, text in across.marks()),
        *(_text(LEFT - 6, y + 4, text, "end") for y, text in up.marks()),
    ]
    if line:
        path = " ".join(f"{across.at(x):.1f},{up.at(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="#d62728" stroke-width="1.5"/>')
    parts += [_point(across.at(x), up.at(y), said) for x, y, said in points]
    return _svg(WIDTH, HEIGHT, parts, title)


def rows(title: str, points: Sequence[tuple[str, float, str]]) -> str:
    """Return a figure with a row for each text: for more of them than fit below an axis.

    Args:
        title: Of the figure.
        points: Each with its text, its value, and what is said where the mouse is over it.
    """
    names = list(dict.fromkeys(name for name, *_ in points))
    across, bottom = Axis([value for _, value, _ in points], False, 216, WIDTH - 24), 12 + 22 * len(names)
    parts = [f'<path d="M206 4V{bottom}H{WIDTH - 8}" fill="none" stroke="#999"/>']
    parts += [_text(x, bottom + 18, text) for x, text in across.marks()]
    parts += [_text(198, 20 + 22 * i, name[-34:], "end") for i, name in enumerate(names)]
    parts += [_point(across.at(value), 16 + 22 * names.index(name), said) for name, value, said in points]
    return _svg(WIDTH, bottom + BELOW, parts, title)


def bars(title: str, values: dict[str, float]) -> str:
    """Return a bar for each name; values are shares."""
    parts = []
    for i, (name, value) in enumerate(values.items()):
        y = 8 + 22 * i
        parts.append(f'<rect x="200" y="{y}" width="{max(value, 0) * 240:.1f}" height="16" fill="#1f77b4"/>')
        parts += [
            _text(194, y + 12, name[-34:], "end"),
            _text(206 + max(value, 0) * 240, y + 12, f"{value:.0%}", "start"),
        ]
    return _svg(WIDTH, 12 + 22 * len(values), parts, title)


def parallel(title: str, names: list[str], rows: list[tuple[list[Any], float]], logs: set[str], better: int) -> str:
    """Return a line for each row across an axis for each name; the best rows are dark.

    Args:
        title: Of the figure.
        names: Of the axes.
        rows: A value for each axis, None where it has none; and by what rows are ordered.
        logs: The axes that are logarithmic.
        better: 1 where less is better, -1 where more is.
    """
    width = max(WIDTH, 150 * len(names))
    places = [70 + i * (width - 140) / max(1, len(names) - 1) for i in range(len(names))]
    axes = [
        Axis([row[i] for row, _ in rows if row[i] is not None], name in logs, HEIGHT - BELOW, ABOVE + 12)
        for i, name in enumerate(names)
    ]
    parts = []
    ranked = sorted(rows, key=lambda row: -better * row[1])  # the best is drawn last
    for rank, (row, _) in enumerate(ranked):
        share = (rank + 1) / len(ranked)
        path = " ".join(
            f"{x:.1f},{axis.at(value):.1f}"
            for x, axis, value in zip(places, axes, row, strict=True)
            if value is not None
        )
        colour = "#d62728" if rank == len(ranked) - 1 else "#1f77b4"
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-opacity="{0.1 + 0.9 * share**3:.2f}"/>'
        )
    for x, name, axis in zip(places, names, axes, strict=True):
        parts.append(f'<path d="M{x:.1f} {ABOVE + 8}V{HEIGHT - BELOW + 4}" stroke="#999"/>')
        parts.append(_text(x, 12, name[-24:]))
        parts += [_text(x + 5, y + 4, text, "start") for y, text in axis.marks()]
    return _svg(width, HEIGHT, parts, title)
