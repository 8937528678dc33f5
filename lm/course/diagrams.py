"""Diagrams drawn by Pillow: boxes and arrows, bars, points with names."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lm.training.callbacks.pictures import FONT, MARGIN, TEXT, Pixels, beside

BLUE, RED, PALE = (8, 48, 107), (165, 15, 21), (235, 241, 248)
ROW, WIDTH = 26, 190  # of a box, with the room around it


def _canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw, ImageFont.FreeTypeFont]:
    picture = Image.new("RGB", (width, height), "white")
    font = ImageFont.load_default(FONT)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return picture, ImageDraw.Draw(picture), font


def passes(shapes: Mapping[str, Sequence[int]], readers: Mapping[str, Sequence[str]]) -> Pixels:
    """Return the forward pass as boxes from top to bottom, and the backward pass beside it, from bottom to top.

    Args:
        shapes: Of each tensor, in the order of the forward pass.
        readers: The tensors that are made of each one; where they are several, their gradients are added.
    """
    picture, draw, font = _canvas(2 * WIDTH + 330, ROW * len(shapes) + 2 * MARGIN + ROW)
    left, right = MARGIN, MARGIN + WIDTH + 60
    draw.text((left, MARGIN), "forward, downwards", fill=BLUE, font=font)
    draw.text((right, MARGIN), "backward, upwards", fill=RED, font=font)
    for i, (name, shape) in enumerate(shapes.items()):
        top = 2 * MARGIN + 8 + ROW * i
        size = " x ".join(map(str, shape)) or "()"
        for x, label, colour in ((left, name, BLUE), (right, f"d{name}", RED)):
            draw.rectangle((x, top, x + WIDTH, top + ROW - 8), fill=PALE, outline=colour)
            draw.text((x + 6, top + 3), label, fill=colour, font=font)
            draw.text((x + WIDTH - 6, top + 9), size, fill=TEXT, font=font, anchor="rm")
        parts = [f"d{one}" for one in readers.get(name, ())]
        if parts:
            said = f"from {' + '.join(parts)}"
            draw.text((right + WIDTH + 8, top + 3), said, fill=RED if len(parts) > 1 else TEXT, font=font)
    return np.asarray(picture)


def bars(values: Mapping[str, float], title: str, *, best: float | None = None) -> Pixels:
    """Return a bar for each value, its number behind it; a line marks the best one.

    Args:
        values: By name; at most 0, or all at least 0.
        title: What is shown.
        best: Where the line is.
    """
    longest = max([abs(value) for value in values.values()] + [abs(best or 0.0), 1e-30])
    picture, draw, font = _canvas(600, ROW * len(values) + 3 * MARGIN)
    left, scale = 210, 300 / longest
    draw.text((MARGIN, MARGIN), title, fill=TEXT, font=font)
    for i, (name, value) in enumerate(values.items()):
        top = 2 * MARGIN + 8 + ROW * i
        draw.text((left - 8, top + 8), name[-34:], fill=TEXT, font=font, anchor="rm")
        draw.rectangle((left, top, left + abs(value) * scale, top + ROW - 10), fill=BLUE)
        draw.text((left + abs(value) * scale + 6, top + 8), f"{value:.2f}", fill=TEXT, font=font, anchor="lm")
    if best is not None:
        x = left + abs(best) * scale
        draw.line((x, 2 * MARGIN, x, picture.height - MARGIN), fill=RED, width=2)
    return np.asarray(picture)


def points(places: Tensor, names: Sequence[str], title: str) -> Pixels:
    """Return names at their places (N, 2) in the plane."""
    size = 520
    picture, draw, font = _canvas(size, size)
    draw.text((MARGIN, MARGIN), title, fill=TEXT, font=font)
    low, high = places.amin(0), places.amax(0)
    scaled = (places - low) / (high - low).clamp(min=1e-12)  # each axis from 0 to 1
    for (x, y), name in zip(scaled.tolist(), names, strict=True):
        draw.text((40 + x * (size - 80), size - 40 - y * (size - 90)), name, fill=BLUE, font=font, anchor="mm")
    return np.asarray(picture)


def fusion_tree(symbols: Sequence[str], fuse: int) -> Pixels:
    """Return the tree that fuses so many neighbours at each level, above its symbols."""
    depth, count = 0, len(symbols)
    while fuse**depth < count:
        depth += 1
    cell, high = 44, 60
    picture, draw, font = _canvas(cell * count + 2 * MARGIN, high * (depth + 1) + 2 * MARGIN)

    def at(level: int, i: int) -> tuple[float, float]:
        return MARGIN + cell * fuse**level * (i + 0.5), picture.height - MARGIN - 16 - high * level

    for level in range(depth + 1):
        for i in range(count // fuse**level):
            x, y = at(level, i)
            if level < depth:
                draw.line((x, y - 10, at(level + 1, i // fuse)[0], at(level + 1, i // fuse)[1] + 10), fill=TEXT)
            draw.ellipse((x - 12, y - 12, x + 12, y + 12), fill=PALE, outline=BLUE)
            draw.text((x, y), symbols[i] if level == 0 else str(fuse**level), fill=BLUE, font=font, anchor="mm")
    return np.asarray(picture)


def together(panels: Sequence[Image.Image]) -> Pixels:
    """Return panels side by side."""
    return np.asarray(beside(panels))
