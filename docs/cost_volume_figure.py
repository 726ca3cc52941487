"""Draw README's picture of a cost volume, from a stereo pair that scikit-image brings.

Run as ``python docs/cost_volume_figure.py [FILE]``; needs Pillow and scikit-image.
"""

import sys
from pathlib import Path

import numpy as np
import skimage
from PIL import Image, ImageDraw, ImageFont

import cupycorr

PICTURE = Path(__file__).with_name("cost_volume.png")
# Of the photographs, which are taken at half their size.
POSITION = (179, 219)
WINDOW = 5
GEOMETRY = cupycorr.Geometry(
    kernel_size=7, padding=3, patch_size=(1, 33), first_displacement=(0, -32)
)

SCALE = 2  # everything is drawn at twice its size, then halved
MARGIN, GAP, TOP, BOTTOM = 20, 23, 40, 44
BAR = 11
STRIP_ROWS = WINDOW + GEOMETRY.taps_extent[0] - 1  # all that one position compares
INK, FAINT, MARK, COLD = (32, 36, 44), (104, 112, 124), (255, 122, 0), (120, 146, 178)
# From far to near: viridis, by five of its colours.
COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def features(photograph):
    """Return the window around every pixel as a map (1, C, H, W) of vectors of about unit length.

    Each colour is without its mean, so that products compare what is seen but for its brightness.
    """
    image = np.asarray(photograph, np.float32) / 255
    border = (WINDOW // 2, WINDOW // 2)
    padded = np.pad(image, (border, border, (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (WINDOW, WINDOW), (0, 1))
    windows = windows - windows.mean((3, 4), keepdims=True)
    vectors = windows.reshape(*image.shape[:2], -1).transpose(2, 0, 1)
    flat = 0.1  # length of a vector that is mostly noise
    return (vectors / np.sqrt((vectors**2).sum(0) + flat**2))[None]


def colours(share):
    """Return the colour, (..., 3) from 0 to 255, of shares from 0 to 1."""
    stops = np.linspace(0, 1, len(COLOURS))
    channels = (np.interp(share, stops, channel) for channel in zip(*COLOURS, strict=True))
    return np.stack(tuple(channels), -1).round().astype(np.uint8)


class Canvas:
    """A picture whose coordinates are those of the finished one."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self.draw = ImageDraw.Draw(self.image)

    def paste(self, image, x, y, width, height):
        size = width * SCALE, height * SCALE
        self.image.paste(image.resize(size, Image.Resampling.NEAREST), (x * SCALE, y * SCALE))

    def box(self, left, top, right, bottom, **style):
        style["width"] = SCALE * style.get("width", 0)
        corners = (left * SCALE, top * SCALE, right * SCALE - 1, bottom * SCALE - 1)
        self.draw.rectangle(corners, **style)

    def text(self, x, y, words, *, size=15, fill=FAINT, anchor="ls"):
        font = ImageFont.load_default(size * SCALE)
        self.draw.text((x * SCALE, y * SCALE), words, fill, font, anchor)

    def finished(self):
        return self.image.reduce(SCALE).quantize(256, dither=Image.Dither.NONE)


def mark(canvas, x, y, reach):
    """Frame a square around a point, such that it shows on any ground."""
    for colour, more, width in (("white", 2, 5), (MARK, 1, 3)):
        r = reach + more
        canvas.box(x - r, y - r, x + r, y + r, outline=colour, width=width)


def bars(canvas, x, top, cost, strip):
    """Draw the costs of one position above the pixels of the second map that they belong to."""
    best, count, height = int(cost.argmax()), len(cost), 104
    highest, lowest = cost.max(), min(0, cost.min())
    unit = height / (highest - lowest)
    ground = round(top + highest * unit)
    for i, value in enumerate(cost):
        ends = sorted((ground, round(ground - value * unit)))
        left = x + i * BAR
        fill = MARK if i == best else COLD
        canvas.box(left + 1, ends[0], left + BAR - 1, max(ends[1], ends[0] + 1), fill=fill)
    canvas.box(x, ground, x + count * BAR, ground + 1, fill=INK)
    below = top + height + 8
    canvas.paste(strip, x, below, count * BAR, STRIP_ROWS * BAR)
    mark(canvas, x + best * BAR + BAR / 2, below + STRIP_ROWS * BAR / 2, STRIP_ROWS * BAR / 2 - 3)
    return below + STRIP_ROWS * BAR


def main(file=PICTURE):
    """Compute the cost volume and draw it."""
    photographs = [
        Image.open(Path(skimage.data_dir, f"motorcycle_{side}.png")).convert("RGB")
        for side in ("left", "right")
    ]
    left, right = (photograph.reduce(2) for photograph in photographs)
    cost = cupycorr.correlation(features(left), features(right), GEOMETRY)[0, 0]
    displacements = np.array(GEOMETRY.displacements[1])
    best = displacements[cost.argmax(0)]

    width, height = left.size
    panels = [MARGIN + i * (width + GAP) for i in range(3)]
    canvas = Canvas(2 * MARGIN + 3 * width + 2 * GAP, TOP + height + BOTTOM)
    bottom = TOP + height
    row, column = POSITION

    titles = (
        "fmap1, and a position (y, x) in it",
        f"its cost, at {len(displacements)} displacements dx",
        "where the cost is largest, at every position",
    )
    inset = (width - len(displacements) * BAR) // 2
    for x, title in zip((panels[0], panels[1] + inset, panels[2]), titles, strict=True):
        canvas.text(x, TOP - 13, title, size=18, fill=INK)

    canvas.paste(photographs[0], panels[0], TOP, width, height)
    mark(canvas, panels[0] + column + 0.5, TOP + row + 0.5, 5)
    canvas.text(panels[0], bottom + 22, "photograph: Middlebury stereo benchmark 2014")

    x = panels[1] + inset
    around = STRIP_ROWS // 2
    corners = (column + displacements[0], row - around, column + 1, row + around + 1)
    below = bars(canvas, x, TOP, cost[:, row, column], right.crop(corners))
    for i, anchor, words in (
        (0, "lt", f"dx = {displacements[0]}"),
        (int(cost[:, row, column].argmax()), "mt", f"{best[row, column]}"),
        (len(displacements) - 1, "rt", "0"),
    ):
        edge = {"l": 0, "m": BAR / 2, "r": BAR}[anchor[0]]
        fill = MARK if anchor == "mt" else FAINT
        canvas.text(x + i * BAR + edge, below + 4, words, anchor=anchor, fill=fill)
    canvas.text(x, bottom + 22, "above the pixels of fmap2 at (y, x + dx)")

    share = best / displacements[0]
    canvas.paste(Image.fromarray(colours(share)), panels[2], TOP, width, height)
    mark(canvas, panels[2] + column + 0.5, TOP + row + 0.5, 5)
    ramp, ramp_width = panels[2] + 86, width - 86 - 118
    canvas.text(panels[2], bottom + 22, "dx = 0, far")
    canvas.paste(
        Image.fromarray(colours(np.linspace(0, 1, 256)[None])), ramp, bottom + 10, ramp_width, 13
    )
    canvas.text(panels[2] + width, bottom + 22, f"dx = {displacements[0]}, near", anchor="rs")
    canvas.finished().save(file, optimize=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
