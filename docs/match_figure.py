"""Draw README's picture of what ``cupycorr match`` writes, from photographs of scikit-image.

Run as ``python docs/match_figure.py [FILE]``; needs Pillow and scikit-image.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import skimage
from click.testing import CliRunner
from cost_volume_figure import FAINT, INK, SCALE, Canvas
from cupycorr.cli import main as command
from PIL import Image

PICTURE = Path(__file__).with_name("match.png")
MARGIN, GAP, TOP, BELOW = 12, 10, 30, 40
WIDTH, HEIGHT = 264, 178
DEGREES, ZOOM = 6, 1.08
PHOTO_COLOURS = 96


def matched(one, two, *words):
    """Return the picture that the command writes for two images."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder, name)) for name in ("a.png", "b.png", "out.png")]
        for image, path in zip((one, two), paths, strict=False):
            image.save(path)
        outcome = CliRunner().invoke(command, ["match", *paths[:2], "--out", paths[2], *words])
        assert outcome.exit_code == 0, outcome.output
        with Image.open(paths[2]) as picture:
            return picture.convert("RGB")


def turned_and_zoomed(image):
    """Return an image turned clockwise, and zoomed, about its centre."""
    angle = np.deg2rad(DEGREES)
    back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / ZOOM
    centre = np.array(image.size) / 2
    rows = np.column_stack([back, centre - back @ centre])
    return image.transform(
        image.size, Image.Transform.AFFINE, rows.ravel().tolist(), Image.Resampling.BICUBIC
    )


def main(file=PICTURE):
    """Match two pairs of photographs and draw them beside what is found."""
    left, right, cat = (
        Image.open(Path(skimage.data_dir, name)).convert("RGB")
        for name in ("motorcycle_left.png", "motorcycle_right.png", "chelsea.png")
    )
    turned = turned_and_zoomed(cat)
    rows = [
        (
            ("left.png", left),
            ("right.png", right),
            ("match --stereo: disparities", matched(left, right, "--stereo", "--legend")),
        ),
        (
            ("a photograph", cat),
            (f"turned by {DEGREES} degrees, {ZOOM} times as large", turned),
            ("match: flow", matched(cat, turned, "--legend")),
        ),
    ]
    canvas = Canvas(2 * MARGIN + 3 * WIDTH + 2 * GAP, TOP + 2 * HEIGHT + BELOW + MARGIN)
    for row, panels in enumerate(rows):
        y = TOP + row * (HEIGHT + BELOW)
        for column, (title, image) in enumerate(panels):
            x = MARGIN + column * (WIDTH + GAP)
            canvas.text(x, y - 9, title, size=14, fill=INK if column == 2 else FAINT)
            canvas.paste(
                image.resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.LANCZOS), x, y, WIDTH, HEIGHT
            )
    finished(canvas.image.reduce(SCALE)).save(file, optimize=True)


def finished(picture):
    """Give the photographs and the results colours of their own, 256 together."""
    right = MARGIN + 2 * WIDTH + GAP + GAP // 2
    whole, palette = Image.new("P", picture.size), []
    for box, count, dither in (
        ((0, 0, right, picture.height), PHOTO_COLOURS, Image.Dither.NONE),
        ((right, 0, *picture.size), 256 - PHOTO_COLOURS, Image.Dither.FLOYDSTEINBERG),
    ):
        part = picture.crop(box)
        reduced = part.quantize(palette=part.quantize(count), dither=dither)
        first = len(palette) // 3
        whole.paste(reduced.point(lambda index, first=first: index + first), box)
        palette += reduced.getpalette()[: 3 * count]
    whole.putpalette(palette)
    return whole


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
