"""Images as grey values, and feature maps of them for measurements on real input."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from ..environment import Unavailable, require_pillow

Image = npt.NDArray[np.float32]

ORIENTATIONS = 8
SHORTEST, LONGEST = 2.5, 16.0
"""Wavelengths of the finest and the coarsest filter, in positions of the feature map."""


def load(path: str | Path) -> Image:
    """Read an image as grey values.

    Parameters
    ----------
    path : path
        A file of any format that Pillow reads.

    Returns
    -------
    array (H, W), float32
        Upright, if the file says how the camera was held. Colours become 0.299 R + 0.587 G +
        0.114 B, whatever their opacity, from 0 to 255; grey values of more bits keep their range,
        those that are not finite become 0.

    Raises
    ------
    Unavailable
        If Pillow is missing or the file cannot be read.
    """
    require_pillow()
    from PIL import Image as pillow
    from PIL import ImageOps

    try:
        with pillow.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            grey = upright.mode in ("L", "I", "F") or upright.mode.startswith("I;16")
            colours = upright if grey else upright.convert("RGB")
            values = np.array(colours.convert("F"), np.float32)
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise Unavailable(f"cannot read {path}: {error}") from None
    values[~np.isfinite(values)] = 0
    return values


def load_pair(path1: str | Path, path2: str | Path) -> tuple[Image, Image]:
    """Read two images of equal size as `load` does.

    Raises
    ------
    click.UsageError
        If their sizes differ.
    Unavailable
        As by `load`.
    """
    one, two = load(path1), load(path2)
    if one.shape != two.shape:
        sizes = " and ".join(f"{width} x {height}" for height, width in (one.shape, two.shape))
        raise click.UsageError(f"A and B must have equal sizes, got {sizes} pixels")
    return one, two


def feature_maps(
    image1: Image, image2: Image, channels: int, downscale: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Filter two images into feature maps.

    Parameters
    ----------
    image1, image2 : array (H, W), float32
        Grey values, of equal size.
    channels : int
        Number of channels C.
    downscale : int
        Pixels of the image per position of the map, per axis.

    Returns
    -------
    (array (1, C, H // downscale, W // downscale), the same), float32

    Notes
    -----
    Channel 0 is the image, the others are a fixed bank of quadrature pairs: even and odd log-Gabor
    filters of 8 orientations, at as many wavelengths between 2.5 and 16 positions, in geometric
    progression, as the channels need (D. Field, "Relations between the statistics of natural
    images and the response properties of cortical cells", JOSA A 4(12), 1987). Each channel is
    averaged over downscale x downscale pixels, then brought to mean 0 and variance 1 over both
    images together. Nothing is random: equal images give equal maps.
    """
    height, width = (size // downscale for size in image1.shape)
    if min(height, width, channels) < 1:
        raise Unavailable(
            f"images must hold at least one position of {downscale} x {downscale} pixels and "
            f"one channel, got images of {image1.shape} and {channels} channels"
        )
    maps = np.empty((2, channels, height, width), np.float32)
    # Reflected borders, so that the Fourier transform's wrap-around meets no edge.
    border = int(LONGEST) * downscale
    spectra = [np.fft.rfft2(np.pad(image, border, mode="symmetric")) for image in (image1, image2)]
    padded = (image1.shape[0] + 2 * border, image1.shape[1] + 2 * border)
    for channel, transfer in enumerate(_filters(padded, channels, downscale)):
        for number, spectrum in enumerate(spectra):
            response = np.fft.irfft2(spectrum * transfer, padded)
            inner = response[border:, border:][: height * downscale, : width * downscale]
            blocks = inner.reshape(height, downscale, width, downscale)
            maps[number, channel] = blocks.mean((1, 3))
    maps -= maps.mean((0, 2, 3), keepdims=True)
    spread = maps.std((0, 2, 3), keepdims=True)
    maps /= np.where(spread > 0, spread, 1)
    return maps[:1], maps[1:]


def _filters(
    shape: tuple[int, int], count: int, downscale: int
) -> Iterator[npt.NDArray[np.complex128]]:
    """Yield transfer functions over the frequencies of ``rfft2``: the identity, then pairs."""
    y, x = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])
    radius = np.hypot(y, x)
    radius[0, 0] = 1
    angle = np.arctan2(y, x)
    yield np.ones(radius.shape, np.complex128)
    pairs = ceil((count - 1) / 2)
    scales = max(1, ceil(pairs / ORIENTATIONS))
    wavelengths = downscale * np.geomspace(SHORTEST, LONGEST, scales)
    for pair in range(pairs):
        band = np.exp(-(np.log(radius * wavelengths[pair // ORIENTATIONS]) ** 2) / 0.5)
        band[0, 0] = 0
        turn = angle - np.pi * (pair % ORIENTATIONS) / ORIENTATIONS
        # Only half of the plane is stored: a lobe whose centre lies in the other half shows here
        # as its mirror image, with the opposite sign in the odd filter.
        ahead, behind = (
            np.exp(-(np.angle(np.exp(1j * (turn + half))) ** 2) * 8) for half in (0, np.pi)
        )
        yield band * (ahead + behind) + 0j
        if 2 * pair + 2 < count:
            yield band * (ahead - behind) * 1j
