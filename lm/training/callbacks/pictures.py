"""Matrices as labelled pictures: tokens on the axes, a title per panel, a colour bar. Drawn by Pillow.

Shapes: H heads, T time, V vocabulary, N examples, C units.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Pixels = NDArray[np.uint8]  # (height, width, 3)

WHITE, BLUE, RED = (np.array(colour) for colour in ((255, 255, 255), (8, 48, 107), (165, 15, 21)))
TEXT, FONT = (60, 60, 60), 11
MARGIN, BAR = 14, 12  # pixels: around panels, across the colour bar


def attention(weights: Tensor, tokens: Sequence[str]) -> Pixels:
    """Return a picture of how much each token (row) attends to those before it, one panel per head.

    Args:
        weights: (H, T, T), each row sums to one.
        tokens: T texts.
    """
    panels = [matrix(one, tokens, tokens, f"head {i}", 1.0) for i, one in enumerate(weights)]
    return np.asarray(beside([*panels, colour_bar(panels[0].height, "1", "0", signed=False)]))


def dlogits(rows: Tensor, symbols: Sequence[str]) -> Pixels:
    """Return a picture of the gradient of the loss by the logits: red pulls a logit down, blue pushes one up.

    Args:
        rows: (N, V), one prediction per row.
        symbols: V texts.
    """
    largest = max(float(rows.abs().max()), 1e-30)
    title = "gradient of the loss by each logit: red is pulled down, blue up"
    panel = matrix(rows, [str(i) for i in range(len(rows))], symbols, title, largest)
    return np.asarray(beside([panel, colour_bar(panel.height, f"{largest:.1e}", f"-{largest:.1e}", signed=True)]))


def stuck_units(stuck: Tensor, title: str) -> Pixels:
    """Return a picture of which units pass no gradient at which examples: an all-blue column is a dead neuron.

    Args:
        stuck: (N, C), true where a unit is saturated or off.
        title: What is shown.
    """
    units = [str(i) if i % 10 == 0 else "" for i in range(stuck.shape[1])]
    return np.asarray(beside([matrix(stuck.float(), [""] * len(stuck), units, title, 1.0)]))


def matrix(values: Tensor, rows: Sequence[str], columns: Sequence[str], title: str, largest: float) -> Image.Image:
    """Return a picture of one matrix, its rows and columns labelled where there is room."""
    share = (values.detach().float().cpu().numpy() / largest).clip(-1, 1)[..., None]
    colours = WHITE + np.where(share < 0, BLUE - WHITE, (RED if (share < 0).any() else BLUE) - WHITE) * np.abs(share)
    cell = 12 if max(share.shape[:2]) <= 128 else 4
    font, left, top = ImageFont.load_default(FONT), 0, 20
    if cell >= FONT:
        left = 4 + int(max(font.getlength(name) for name in rows))
        top += 4 + int(max(font.getlength(name) for name in columns))
    elif any(columns):
        top += FONT + 4
    picture = Image.fromarray(colours.astype(np.uint8)).resize(
        (share.shape[1] * cell, share.shape[0] * cell), Image.Resampling.NEAREST
    )
    wide = left + max(picture.width, int(font.getlength(title))) + 2
    panel = Image.new("RGB", (wide, top + picture.height + 2), "white")
    panel.paste(picture, (left, top))
    draw = ImageDraw.Draw(panel)
    draw.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=TEXT)
    draw.text((left, 0), title, fill=TEXT, font=font)
    if cell >= FONT:
        for i, name in enumerate(rows):
            draw.text((left - 4, top + i * cell + cell / 2), name, fill=TEXT, font=font, anchor="rm")
        for i, name in enumerate(columns):
            _upwards(panel, name, left + i * cell, top - 3, font)
    else:
        for i, name in enumerate(columns):
            draw.text((left + i * cell, top - 3), name, fill=TEXT, font=font, anchor="ls")
    return panel


def _upwards(panel: Image.Image, name: str, x: int, y: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> None:
    """Write a column's name above it, rotated to read upwards."""
    if not name:
        return
    text = Image.new("RGB", (int(font.getlength(name)) + 1, FONT + 3), "white")
    ImageDraw.Draw(text).text((0, 0), name, fill=TEXT, font=font)
    turned = text.rotate(90, expand=True)
    panel.paste(turned, (x, y - turned.height))


def colour_bar(height: int, high: str, low: str, *, signed: bool) -> Image.Image:
    """Return a colour bar with its ends' values."""
    font = ImageFont.load_default(FONT)
    tall = max(40, height - 60)
    share = np.linspace(1, -1 if signed else 0, tall)[:, None, None]
    colours = WHITE + np.where(share < 0, BLUE - WHITE, (RED if signed else BLUE) - WHITE) * np.abs(share)
    bar = Image.new("RGB", (BAR + 8 + int(max(map(font.getlength, (high, low)))), max(height, tall + 24)), "white")
    top = bar.height - tall - 2
    bar.paste(Image.fromarray(colours.astype(np.uint8)).resize((BAR, tall)), (0, top))
    draw = ImageDraw.Draw(bar)
    draw.rectangle((0, top, BAR, top + tall - 1), outline=TEXT)
    for text, y in ((high, top + 6), ("0", top + tall / 2) if signed else ("", 0), (low, top + tall - 6)):
        draw.text((BAR + 4, y), text, fill=TEXT, font=font, anchor="lm")
    return bar


def beside(panels: Sequence[Image.Image]) -> Image.Image:
    """Return panels side by side."""
    width = sum(one.width + MARGIN for one in panels) + MARGIN
    picture = Image.new("RGB", (width, max(one.height for one in panels) + 2 * MARGIN), "white")
    x = MARGIN
    for one in panels:
        picture.paste(one, (x, MARGIN))
        x += one.width + MARGIN
    return picture
