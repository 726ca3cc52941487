"""Photographs: the largest cost stands at the displacement of what is seen."""

import numpy as np
import pytest

import cupycorr
from cupycorr import Geometry

data = pytest.importorskip("skimage.data")

REDUCTION = 4
"""Pixels of the photograph per pixel of the tests, along each axis."""
WINDOW = 7
TEXTURE = 0.3
"""Norm of a window's deviations from its mean, of gray values from 0 to 1, that is no noise."""


@pytest.fixture(scope="module")
def stereo():
    """Return the left and right view in gray, and the disparity, NaN where it is unknown."""
    left, right, disparity = data.stereo_motorcycle()
    views = [blocks(view @ [0.299, 0.587, 0.114] / 255).mean((1, 3)) for view in (left, right)]
    disparity = np.where(np.isfinite(disparity), disparity, np.nan)
    # The median of a block with an unknown pixel is NaN.
    return *views, np.median(blocks(disparity), axis=(1, 3)) / REDUCTION


def blocks(image):
    rows, columns = (n // REDUCTION for n in image.shape)
    whole = image[: rows * REDUCTION, : columns * REDUCTION]
    return whole.reshape(rows, REDUCTION, columns, REDUCTION)


def features(image):
    """Return the window around each pixel as a unit vector, and the vector's length before.

    The product of two of them is their correlation coefficient: 1 where windows are equal but
    for brightness and contrast, and less everywhere else.
    """
    padded = np.pad(image, WINDOW // 2, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (WINDOW, WINDOW))
    vectors = windows.reshape(*image.shape, WINDOW * WINDOW)
    vectors = vectors - vectors.mean(-1, keepdims=True)
    lengths = np.linalg.norm(vectors, axis=-1)
    return (vectors / (lengths[..., None] + 1e-9)).transpose(2, 0, 1)[None], lengths


def best(cost, geometry):
    """Return the displacement (dy, dx) of the largest cost at every position."""
    flat = cost[0].reshape(-1, *cost.shape[3:]).argmax(0)
    p, q = np.divmod(flat, geometry.patch_size[1])
    dy, dx = (np.array(displacements) for displacements in geometry.displacements)
    return np.stack([dy[p], dx[q]])


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize(
    ("shift", "patch"),
    [
        ((0, 0), {"patch_size": 7}),
        ((0, -5), {"patch_size": (1, 11)}),
        ((3, 0), {"patch_size": (8, 3)}),  # even: from -3 to 4
        ((-4, 6), {"patch_size": 9, "dilation_patch": 2}),
        ((2, -7), {"patch_size": (3, 8), "first_displacement": (0, -7)}),
    ],
)
def test_shifted_image_has_its_largest_cost_at_the_shift(shift, patch, kernel_size, stereo):
    margin, border = 12, WINDOW // 2
    image = stereo[0]
    vectors, lengths = features(image)
    rows, columns = (slice(margin, n - margin) for n in image.shape)
    # What is seen at (y, x) in the first view is seen at (y, x) + shift in the second one.
    moved = np.roll(image, shift, (0, 1))
    geometry = Geometry(kernel_size, padding=kernel_size // 2, **patch)
    cost = cupycorr.correlation(vectors, features(moved)[0], geometry, normalize=True)
    found = best(cost, geometry)[:, rows, columns]
    textured = (lengths > TEXTURE)[rows, columns]
    assert margin > border + max(map(abs, shift))
    assert textured.mean() > 0.5
    assert (found[:, textured] == np.array(shift)[:, None]).all()


def test_disparity_of_a_stereo_pair_is_found_for_most_textured_pixels(stereo):
    left, right, truth = stereo
    (vectors, lengths), (others, _) = features(left), features(right)
    reach = int(np.nanmax(truth)) + 4
    geometry = Geometry(patch_size=(1, reach), first_displacement=(0, 1 - reach))
    found = -best(cupycorr.correlation(vectors, others, geometry), geometry)[1]
    seen_twice = np.arange(left.shape[1]) >= truth  # false where the disparity is unknown
    known = seen_twice & (lengths > TEXTURE)
    agrees = np.abs(found - truth)[known] <= 1
    # Guessing would be right for 3 of 18 disparities, and a volume that is shifted by one
    # displacement for half of the pixels. Windows err at edges of objects and on repeated
    # patterns, for about one pixel in six here.
    assert known.mean() > 0.4
    assert agrees.mean() > 0.7
