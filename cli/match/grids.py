"""Images and displacement fields on a grid of pixels: halve, double, warp and smooth them.

Pixels are points at integer positions; beyond its border an image goes on as its nearest pixel.
Work goes in strips of rows, so that what lies between input and output needs little memory. All
operations are on single elements, so that the strips do not show in the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Image = Floats
"""Grey values (H, W)."""
Field = Floats
"""Displacements (2, H, W) in pixels, dy and dx: what is seen at (y, x) in one image is seen at
(y + dy, x + dx) in the other one."""
Mask = npt.NDArray[np.bool_]

STRIP = 1 << 16
"""Pixels of a strip, of which a processor's cache holds several."""


def strips(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield slices of rows that together cover an array (..., H, W)."""
    rows = max(1, STRIP // max(1, shape[-1]))
    for start in range(0, shape[-2], rows):
        yield slice(start, min(shape[-2], start + rows))


def cut(array: npt.NDArray[Any], rows: range, columns: range) -> npt.NDArray[Any]:
    """Copy a rectangle of an array (..., H, W), which may reach beyond the border."""
    y, x = (np.clip(np.arange(part.start, part.stop), 0, size - 1)
            for part, size in zip((rows, columns), array.shape[-2:], strict=True))  # fmt: skip
    return array.take(y, -2).take(x, -1)


def around(part: slice | range, reach: int) -> range:
    """Return the rows of a strip and ``reach`` more on either side."""
    return range(part.start - reach, part.stop + reach)


def halve(image: Image) -> Image:
    """Return an image of half the size, rounded up.

    Notes
    -----
    Pixel i of the result lies between pixels 2 i and 2 i + 1, and is the mean of 2 i - 1 to 2 i + 2
    with the weights 1, 3, 3, 1, along each axis: a pyramid as of P. Burt and E. Adelson ("The
    Laplacian pyramid as a compact image code", IEEE Trans. Communications 31(4), 1983), with an
    even binomial kernel.
    """
    height, width = (-(-size // 2) for size in image.shape)
    half = np.empty((height, width), np.float32)
    for part in strips(half.shape):
        rows = range(2 * part.start - 1, 2 * part.stop + 1)
        block = cut(image, rows, range(-1, 2 * width + 1))
        half[part] = _every_second(_every_second(block).T).T
    return half


def _every_second(rows: Floats) -> Floats:
    """Weight rows 2 i ... 2 i + 3 by 1, 3, 3, 1."""
    outer, inner = rows[:-3:2] + rows[3::2], rows[1:-2:2] + rows[2:-1:2]
    return np.float32(1 / 8) * outer + np.float32(3 / 8) * inner


def double(field: Field, height: int, width: int) -> Field:
    """Bring displacements from an image's `halve` to the image, (2, height, width).

    They are interpolated linearly between pixels of the half image, and twice as long in pixels
    of the image.
    """
    large = np.empty((2, height, width), np.float32)
    half_width = field.shape[2]
    for part in strips(field.shape):
        block = cut(field, around(part, 1), range(-1, half_width + 1))
        fine = _between(_between(block).swapaxes(1, 2)).swapaxes(1, 2)
        stop = min(height, 2 * part.stop)
        large[:, 2 * part.start : stop] = 2 * fine[:, : stop - 2 * part.start, :width]
    return large


def _between(rows: Floats) -> Floats:
    """Interpolate a quarter before and after each but the first and last of rows (2, h, w)."""
    near, far = np.float32(3 / 4) * rows[:, 1:-1], np.float32(1 / 4) * rows
    pairs = np.stack([near + far[:, :-2], near + far[:, 2:]], 2)
    return pairs.reshape(2, -1, rows.shape[2])


def warp(array: Floats, field: Field) -> Floats:
    """Return an array (..., H, W) as seen along displacements: its value at (y + dy, x + dx).

    Values are interpolated linearly, and beyond the border those of the nearest pixel.
    """
    warped = np.empty(array.shape, np.float32)
    height, width = array.shape[-2:]
    for part in strips(array.shape):
        y, x = np.arange(part.start, part.stop)[:, None], np.arange(width)
        top, bottom, down = _neighbours(y, field[0, part], height)
        left, right, across = _neighbours(x, field[1, part], width)
        upper, lower = (
            (1 - across) * array[..., row, left] + across * array[..., row, right]
            for row in (top, bottom)
        )
        warped[..., part, :] = (1 - down) * upper + down * lower
    return warped


def _neighbours(
    position: npt.NDArray[np.intp], displacement: Floats, size: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Floats]:
    """Return the pixels before and after where displacements lead, and the fraction between."""
    whole = np.floor(displacement)
    before = position + whole.astype(np.intp)
    ends = np.clip(before, 0, size - 1), np.clip(before + 1, 0, size - 1)
    return *ends, displacement - whole


def inside(field: Field) -> Mask:
    """Tell which displacements lead to a position in the image, (H, W)."""
    height, width = field.shape[1:]
    mask = np.empty((height, width), bool)
    for part in strips(mask.shape):
        y = np.arange(part.start, part.stop)[:, None] + field[0, part]
        x = np.arange(width) + field[1, part]
        mask[part] = (y >= 0) & (y <= height - 1) & (x >= 0) & (x <= width - 1)
    return mask


def smooth(field: Field) -> Field:
    """Take medians of rows and then columns of 5 pixels, of dy and of dx, which keeps edges.

    Notes
    -----
    Medians between the steps of an estimate are much of what makes it good: D. Sun, S. Roth and
    M. Black, "Secrets of optical flow estimation and their principles", CVPR 2010.
    """
    result = np.empty_like(field)
    width = field.shape[2]
    for part in strips(field.shape):
        block = cut(field, around(part, 2), range(-2, width + 2))
        result[:, part] = _median(_median(block).swapaxes(1, 2)).swapaxes(1, 2)
    return result


def _median(rows: Floats) -> Floats:
    """Return the median of each five rows that follow one another, of (2, h, w).

    The least and the greatest of four numbers are not the median of five; it is that of the other
    two and the fifth.
    """
    a, b, c, d, e = (rows[:, i : rows.shape[1] - 4 + i] for i in range(5))
    low = np.maximum(np.minimum(a, b), np.minimum(c, d))
    high = np.minimum(np.maximum(a, b), np.maximum(c, d))
    return np.maximum(np.minimum(low, high), np.minimum(np.maximum(low, high), e))
