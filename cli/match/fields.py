"""Displacement fields and disparity maps as files: .flo, .pfm, .npy, and pictures.

Matches that are not known are NaN in arrays and .npy, 1e10 in .flo, infinity in .pfm, and black in
pictures.
"""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from ..environment import Unavailable
from .grids import Field, Floats, strips

Colours = npt.NDArray[np.uint8]
"""Red, green and blue, (..., 3)."""

UNKNOWN_FLOW = 1e10
# Red to the right, then clockwise, and the degrees up to the next one. The eye tells more colours
# apart between red and yellow and between blue and magenta than between the others.
HUES = [
    ((255, 0, 0), 100),
    ((255, 255, 0), 40),
    ((0, 255, 0), 30),
    ((0, 255, 255), 70),
    ((0, 0, 255), 80),
    ((255, 0, 255), 40),
]
# From far to near: viridis, by five of its colours.
RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
ARRAYS = (".flo", ".pfm", ".npy")
"""Suffixes of what is not a picture."""
QUANTILE = 0.99
"""Share of the matches whose length the colours tell, unless a range is given."""


def flo(field: Field) -> bytes:
    """Encode a field (2, H, W) in Middlebury's format for flow.

    Notes
    -----
    The number 202021.25 as float32, width and height as int32, then dx and dy of each pixel as
    float32, row by row, all little-endian; values above 1e9 are unknown (S. Baker et al., "A
    database and evaluation methodology for optical flow", IJCV 92, 2011, and its web site).
    """
    height, width = field.shape[1:]
    vectors = np.where(np.isnan(field), np.float32(UNKNOWN_FLOW), field)
    head = struct.pack("<fii", 202021.25, width, height)
    return head + pairs(vectors).astype("<f4").tobytes()


def pfm(disparity: Floats) -> bytes:
    """Encode a disparity map (H, W) as a portable float map, as Middlebury's stereo data are.

    Notes
    -----
    Lines ``Pf``, width and height, and -1 for little-endian; then float32 from the bottom row to
    the top one. Infinity stands for unknown (D. Scharstein et al., "High-resolution stereo datasets
    with subpixel-accurate ground truth", GCPR 2014, and its web site).
    """
    height, width = disparity.shape
    values = np.where(np.isnan(disparity), np.float32(np.inf), disparity)[::-1]
    return f"Pf\n{width} {height}\n-1\n".encode() + values.astype("<f4").tobytes()


def pairs(field: Field) -> Floats:
    """Return (dx, dy) of each pixel, (H, W, 2): the order of files."""
    return field[::-1].transpose(1, 2, 0)


def lengths(field: Field) -> Floats:
    """Return the lengths of displacements, (H, W)."""
    result: Floats = np.hypot(field[0], field[1])
    return result


def full_range(lengths: Floats) -> float:
    """Return the length up to which colours differ: all but 1 % of the known ones; at least 1."""
    known = lengths[~np.isnan(lengths)]
    return max(1.0, float(np.quantile(known, QUANTILE))) if known.size else 1.0


def wheel(field: Field, full: float) -> Colours:
    """Colour displacements (2, H, W) by their direction, the paler the shorter; (H, W, 3).

    Parameters
    ----------
    field : array (2, H, W), float32
    full : float, pixels
        Length from which on colours are full.

    Notes
    -----
    The picture of flow of S. Baker et al. (IJCV 92, 2011): hue tells the direction, and
    saturation the length, from white on. Red is to the right, yellow down, cyan to the left and
    blue up to the left.
    """
    starts = np.cumsum([0, *(degrees for _, degrees in HUES)])
    stops = [*(colour for colour, _ in HUES), HUES[0][0]]
    picture = np.zeros((*field.shape[1:], 3), np.uint8)
    for part in strips(field.shape):
        dy, dx = field[:, part]
        angle = np.degrees(np.arctan2(dy, dx)) % 360
        saturation = np.minimum(np.hypot(dy, dx) / full, 1)
        known = ~np.isnan(saturation)
        hue = _between(angle[known], starts, stops)
        picture[part][known] = np.rint(255 - saturation[known][:, None] * (255 - hue))
    return picture


def ramp(disparity: Floats, full: float) -> Colours:
    """Colour disparities (H, W) from 0, dark, to ``full`` pixels, bright; (H, W, 3)."""
    picture = np.zeros((*disparity.shape, 3), np.uint8)
    stops = np.linspace(0, full, len(RAMP))
    for part in strips(disparity.shape):
        values = disparity[part]
        known = ~np.isnan(values)
        picture[part][known] = np.rint(_between(values[known], stops, RAMP))
    return picture


def _between(values: Floats, stops: npt.NDArray[Any], colours: npt.ArrayLike) -> npt.NDArray[Any]:
    """Interpolate colours, which stand at ascending stops; (n, 3)."""
    channels = np.asarray(colours, float).T
    return np.stack([np.interp(values, stops, channel) for channel in channels], -1)


def add_legend(picture: Colours, full: float, stereo: bool) -> None:
    """Draw what the colours mean into the lower right corner of a picture.

    The wheel of all directions up to ``full`` pixels; for stereo disparities from 0 to ``full``.
    """
    radius = min(picture.shape[:2]) // 8
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float32)
    if stereo:
        legend = ramp((x + radius)[-radius // 2 :] * np.float32(full / max(1, 2 * radius)), full)
        shown = np.ones_like(legend, bool)
    else:
        legend = wheel(np.stack([y, x]) * np.float32(full / max(1, radius)), full)
        shown = (np.hypot(y, x) <= radius)[..., None]
    height, width = legend.shape[:2]
    np.copyto(picture[-height:, -width:], legend, where=shown)


def refuse(path: Path, stereo: bool) -> None:
    """Refuse a file whose format cannot hold what is asked for.

    Raises
    ------
    click.UsageError
        If its suffix stands for no format of fields or of pictures in colour.
    """
    suffix = path.suffix.lower()
    wrong, right = (".flo", ".pfm") if stereo else (".pfm", ".flo")
    if suffix == wrong:
        kind = "a disparity map" if stereo else "a flow"
        raise click.UsageError(f"--out {path}: {kind} must be {right}, .npy or a picture")
    if suffix not in (right, ".npy") and suffix not in _picture_suffixes():
        raise click.UsageError(
            f"--out {path}: the suffix must be {right}, .npy or a picture's that Pillow writes, "
            f"such as .png, got {suffix!r}"
        )
    if suffix not in ARRAYS:
        try:
            _picture(suffix, np.zeros((8, 8, 3), np.uint8))
        except (OSError, ValueError) as error:
            raise click.UsageError(f"--out {path}: {error}") from None


def _picture_suffixes() -> set[str]:
    from PIL import Image

    formats = Image.registered_extensions()
    return {suffix for suffix, name in formats.items() if name in Image.SAVE}


def encode(suffix: str, field: Field, *, stereo: bool, full: float, legend: bool) -> bytes:
    """Encode displacements, or for stereo disparities, in the format of a suffix.

    Parameters
    ----------
    suffix : str
        Of a file, in small letters.
    field : array (2, H, W), float32
        NaN where unknown. For stereo the disparity is -dx.
    stereo : bool
    full : float, pixels
        Length of the fullest colour.
    legend : bool
        Whether pictures show what colours mean.

    Raises
    ------
    Unavailable
        If the format cannot hold the picture.
    """
    if suffix == ".flo":
        return flo(field)
    disparity = np.subtract(0, field[1])
    if suffix == ".pfm":
        return pfm(disparity)
    if suffix == ".npy":
        file = BytesIO()
        np.save(file, disparity if stereo else pairs(field))
        return file.getvalue()
    picture = ramp(disparity, full) if stereo else wheel(field, full)
    if legend:
        add_legend(picture, full, stereo)
    try:
        return _picture(suffix, picture)
    except (OSError, ValueError) as error:
        raise Unavailable(f"cannot encode a picture as {suffix}: {error}") from None


def _picture(suffix: str, colours: Colours) -> bytes:
    from PIL import Image

    file = BytesIO()
    Image.fromarray(colours).save(file, Image.registered_extensions()[suffix])
    return file.getvalue()
