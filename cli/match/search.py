"""Dense matching of two images by their cost volume.

1. *Features*: the census transform, 24 comparisons per pixel of values -1, 0 and 1.
2. *Search*: their cost volume, summed over a window; the largest cost at each position, and the
   vertex of the parabola through it and its neighbours.
3. *Steps*: for stereo one search over all disparities. For flow a search at reduced size; by what
   it found the second image is warped back, for a short search at twice the size, and so on.
4. *Check*: what is found from A to B must lead back from B to A, and the neighbours must agree;
   where a window shows but one grey value, nothing is known.

All sums in a cost volume are of small integers, hence exact: the result does not depend on how the
images are cut into tiles, on the number of threads, or on the order in which an engine sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import ceil, isqrt, prod
from typing import NamedTuple

import numpy as np

import cupycorr
from cupycorr import Geometry

from .grids import (
    Field,
    Floats,
    Image,
    Mask,
    around,
    cut,
    double,
    halve,
    inside,
    smooth,
    strips,
    warp,
)

CENSUS_RADIUS = 3
CENSUS = [
    (y, x) for y, x in product(range(-CENSUS_RADIUS, CENSUS_RADIUS + 1), repeat=2) if (y + x) % 2
]
"""The neighbours that a pixel is compared with, as on the other colour of a chessboard."""
COARSEST_REACH = 4
"""Displacements on either side that the first search for a flow tries, in pixels of its size."""
COARSEST_SIZE = 16
"""Pixels of the shorter side below which images are not halved."""
FINER_REACH = 2
REFINEMENTS = 2
"""Searches at full size that follow the first one there, over single pixels."""
TOLERANCE = 1.0
"""Pixels by which a way back may miss its start, and neighbours may differ."""
NEIGHBOURHOOD = 4
"""Radius of the square in which half of the pixels must agree."""
TILE_BYTES = 32 << 20
"""Size of the costs and features of one tile."""

BYTES_PER_PIXEL, BYTES = 48, 160 << 20
"""Memory that matching takes for each pixel, and in all, besides its tiles."""

Advance = Callable[[int], None]
"""Called with the number of costs that have been computed since the last call."""
Correlate = Callable[[Floats, Floats, Geometry], Floats]
"""A function that computes a cost volume; all give the same."""


class Step(NamedTuple):
    """One search: how often the images are halved before, and what is compared."""

    halvings: int
    geometry: Geometry


Plan = tuple[list[Step], list[Step]]
"""The searches from the first image into the second one, and from the second into the first."""


def stereo_steps(shape: tuple[int, ...], reach: int, window: int) -> Plan:
    """Plan the search for disparities from 0 to ``reach``, from left to right and back."""
    reach = min(reach, max(1, shape[1] - 1))
    there, back = (
        Geometry(window, (1, reach + 1), padding=(0, -reach), first_displacement=(0, first))
        for first in (-reach, 0)
    )
    return [Step(0, there)], [Step(0, back)]


def flow_steps(shape: tuple[int, ...], reach: int, window: int) -> Plan:
    """Plan the searches for a flow of up to ``reach`` pixels along each axis, there and back.

    Parameters
    ----------
    shape : (int, int)
        Height and width of the images.
    reach : int, pixels
        What the first search covers, as far as the images do; the others correct it by little.
    window : int
        Size of the window, odd.
    """
    halvings = 0
    while reach > COARSEST_REACH << halvings and min(shape) >= COARSEST_SIZE << (halvings + 1):
        halvings += 1
    reaches = [(halvings, ceil(reach / 2**halvings))]
    reaches += [(level, FINER_REACH) for level in range(halvings - 1, -1, -1)]
    reaches += [(0, 1)] * REFINEMENTS
    steps = []
    for level, radius in reaches:
        # No displacement is longer than the image.
        y, x = (min(radius, max(1, -(-size >> level) - 1)) for size in shape)
        steps.append(Step(level, Geometry(window, (2 * y + 1, 2 * x + 1), padding=(-y, -x))))
    return steps, steps


def count_costs(shape: tuple[int, ...], plan: Plan) -> int:
    """Return how many costs a plan computes on images of a shape."""
    return sum(
        prod(_halved(shape, step)) * prod(step.geometry.patch_size)
        for steps in plan
        for step in steps
    )


def memory(shape: tuple[int, ...], plan: Plan) -> int:
    """Return how many bytes matching takes at most, the images included."""
    tile = max(_tile_bytes(shape, step) for steps in plan for step in steps)
    return BYTES + tile + BYTES_PER_PIXEL * prod(shape)


def _tile_bytes(shape: tuple[int, ...], step: Step) -> int:
    """Return the size of the costs and features of one tile, with its margins."""
    tile = next(tiles(_halved(shape, step), step.geometry))
    pixels, wide = (
        prod(len(around(part, reach)) for part, reach in zip(tile, reaches, strict=True))
        for reaches in ((0, 0), _margins(step.geometry))
    )
    return 4 * (pixels * prod(step.geometry.patch_size) + 2 * len(CENSUS) * wide)


def _halved(shape: tuple[int, ...], step: Step) -> list[int]:
    """Return the size of images of a shape when a step takes them."""
    return [-(-size >> step.halvings) for size in shape]


def _margins(geometry: Geometry) -> list[int]:
    """Return the pixels around a tile that windows and displacements reach, (y, x)."""
    return [k // 2 - p for k, p in zip(geometry.kernel_size, geometry.padding, strict=True)]


def pyramid(image: Image, halvings: int) -> list[Image]:
    """Return an image at its full size, at half of that, and so on."""
    levels = [image]
    for _ in range(halvings):
        levels.append(halve(levels[-1]))
    return levels


def match(
    image1: Image,
    image2: Image,
    plan: Plan,
    advance: Advance = lambda _: None,
    correlate: Correlate = cupycorr.correlation,
) -> Field:
    """Find where the pixels of one image are seen in another one.

    Parameters
    ----------
    image1, image2 : array (H, W), float32
        Grey values, finite.
    plan : (list of Step, list of Step)
        `flow_steps` or `stereo_steps` of the images' shape.
    advance : callable
        Called with numbers of costs, `count_costs` in all.
    correlate : callable
        Computes the cost volume of two NumPy arrays as one.

    Returns
    -------
    array (2, H, W), float32
        dy and dx in pixels. NaN where the window shows nothing or the match is not `consistent`,
        and where there are not enough `agreeing` neighbours.
    """
    there, back = plan
    levels = max(step.halvings for step in there + back)
    one, two = pyramid(image1, levels), pyramid(image2, levels)
    field, seen = estimate(one, two, there, advance, correlate)
    backward, _ = estimate(two, one, back, advance, correlate)
    del one, two
    np.copyto(field, np.nan, where=~agreeing(field, seen & consistent(field, backward)))
    return field


def estimate(
    pyramid1: list[Image],
    pyramid2: list[Image],
    steps: list[Step],
    advance: Advance,
    correlate: Correlate,
) -> tuple[Field, Mask]:
    """Search step by step, each time from where the step before has led; see `search`."""
    first, *others = steps
    field, seen = search(
        pyramid1[first.halvings], pyramid2[first.halvings], first.geometry, advance, correlate
    )
    field = smooth(field)
    for halvings, geometry in others:
        one, two = pyramid1[halvings], pyramid2[halvings]
        if field.shape[1:] != one.shape:
            field = double(field, *one.shape)
        correction, seen = search(one, warp(two, field), geometry, advance, correlate)
        field += correction
        field = smooth(field)
    return field, seen


def search(
    image1: Image,
    image2: Image,
    geometry: Geometry,
    advance: Advance = lambda _: None,
    correlate: Correlate = cupycorr.correlation,
) -> tuple[Field, Mask]:
    """Find the displacements of largest cost between two images' features.

    Parameters
    ----------
    image1, image2 : array (H, W), float32
    geometry : Geometry
        The window and the displacements. Its negative padding crops the margins that displacements
        need, so that outputs are pixels of the tile.
    advance : callable
        Called with the number of costs after each tile.
    correlate : callable
        As for `match`.

    Returns
    -------
    array (2, H, W), float32
        The displacements.
    array (H, W), bool
        Where some cost is positive: windows without texture have none.
    """
    field, seen = np.empty((2, *image1.shape), np.float32), np.empty(image1.shape, bool)
    margins = _margins(geometry)
    for tile in tiles(image1.shape, geometry):
        area = [around(part, margin) for part, margin in zip(tile, margins, strict=True)]
        cost = correlate(features(image1, *area), features(image2, *area), geometry)[0]
        field[:, tile[0], tile[1]], largest = best(cost, geometry)
        seen[tile] = largest > 0
        advance(cost.size)
    return field, seen


def tiles(shape: Sequence[int], geometry: Geometry) -> Iterator[tuple[slice, slice]]:
    """Cut an image into tiles whose arrays take about `TILE_BYTES`, but for their margins.

    They are square, but as wide as displacements reach while they stay higher than the window, so
    that margins do not outweigh them.
    """
    height, width = shape
    pixels = max(1, TILE_BYTES // (4 * (prod(geometry.patch_size) + 2 * len(CENSUS))))
    wide = min(-geometry.padding[1], pixels // (2 * geometry.kernel_size[0]))
    columns = min(width, max(isqrt(pixels), wide))
    rows = min(height, max(1, pixels // columns))
    for y, x in product(range(0, height, rows), range(0, width, columns)):
        yield slice(y, min(height, y + rows)), slice(x, min(width, x + columns))


def features(image: Image, rows: range, columns: range) -> Floats:
    """Return the census transform of a part of an image, 0 beyond the border.

    Returns
    -------
    array (1, 24, len(rows), len(columns)), float32
        1 where a neighbour is brighter than the pixel, -1 where it is darker, and 0 otherwise.

    Notes
    -----
    The product of two such vectors is the number of equal comparisons less that of unequal ones:
    24 less twice the Hamming distance where no grey values are equal. R. Zabih and J. Woodfill,
    "Non-parametric local transforms for computing visual correspondence", ECCV 1994; of the costs
    compared by H. Hirschmüller and D. Scharstein ("Evaluation of stereo matching costs on images
    with radiometric differences", PAMI 31(9), 2009) the best overall.
    """
    block = cut(image, *(around(part, CENSUS_RADIUS) for part in (rows, columns)))
    centre, *neighbours = (
        block[CENSUS_RADIUS + y :, CENSUS_RADIUS + x :][: len(rows), : len(columns)]
        for y, x in [(0, 0), *CENSUS]
    )
    maps = np.empty((1, len(CENSUS), len(rows), len(columns)), np.float32)
    for plane, neighbour in zip(maps[0], neighbours, strict=True):
        brighter, darker = neighbour > centre, neighbour < centre
        np.subtract(brighter.view(np.int8), darker.view(np.int8), out=plane)
    height, width = image.shape
    for edge in (slice(0, max(0, -rows.start)), slice(max(0, height - rows.start), None)):
        maps[:, :, edge] = 0
    for edge in (slice(0, max(0, -columns.start)), slice(max(0, width - columns.start), None)):
        maps[..., edge] = 0
    return maps


def best(cost: Floats, geometry: Geometry) -> tuple[Field, Floats]:
    """Find the displacement of the largest cost at each position, to a fraction of a pixel.

    Parameters
    ----------
    cost : array (PH, PW, h, w), float32
    geometry : Geometry
        Whose displacements the first two axes are, one pixel apart.

    Returns
    -------
    array (2, h, w), float32
        Of equal costs that of the shortest displacement wins. Displacements at the edge of the
        patch stay whole numbers.
    array (h, w), float32
        The largest cost.

    Notes
    -----
    Along each axis the parabola through a maximum c and its neighbours a and b has its vertex at
    (a - b) / (2 (a - 2 c + b)) from it (Q. Tian and M. Huhns, "Algorithms for subpixel
    registration", CVGIP 35, 1986).
    """
    size = geometry.patch_size
    flat = cost.reshape(-1, *cost.shape[2:])
    vectors = np.array(list(product(*geometry.displacements)))
    largest = np.full(flat.shape[1:], -np.inf, np.float32)
    winner = np.zeros(flat.shape[1:], np.intp)
    for index in np.argsort((vectors**2).sum(1), kind="stable"):
        np.copyto(winner, index, where=flat[index] > largest)
        np.maximum(largest, flat[index], out=largest)
    field = vectors.T.astype(np.float32)[:, winner]
    places = np.unravel_index(winner, size)
    for axis, step in enumerate((size[1], 1)):
        inner = (places[axis] > 0) & (places[axis] < size[axis] - 1)
        before, after = (
            np.take_along_axis(flat, np.where(inner, winner + way, winner)[None], 0)[0]
            for way in (-step, step)
        )
        curvature = before - 2 * largest + after
        np.divide(before - after, 2 * curvature, out=before, where=curvature < 0)
        field[axis] += np.where(inner & (curvature < 0), before, 0)
    return field, largest


def bound(field: Field, reach: int) -> None:
    """Bound displacements along each axis, in place.

    Searches at full size may lead a little beyond what the first one covered. Up to a pixel beyond
    ``reach`` a displacement becomes that; farther it is no match.
    """
    beyond = (np.abs(field) >= reach + 1).any(0)
    np.clip(field, -reach, reach, out=field)
    field[:, beyond] = np.nan


def consistent(field: Field, backward: Field) -> Mask:
    """Tell where going along a displacement and back along that found there leads to the start.

    Pixels that the other image does not show fail, as what they lead to has a better match
    (P. Fua, "A parallel stereo algorithm that produces dense depth maps and preserves image
    features", Machine Vision and Applications 6, 1993). The way may miss by `TOLERANCE`.
    """
    miss = warp(backward, field)
    miss += field
    mask = inside(field)
    mask &= np.hypot(miss[0], miss[1], out=miss[0]) <= TOLERANCE
    return mask


def agreeing(field: Field, mask: Mask) -> Mask:
    """Tell where half of the neighbourhood is in the mask and has about the same displacement.

    This leaves out the small patches that match by accident both ways. The neighbourhood is the
    part of a square that lies in the image, and about the same means within `TOLERANCE` along each
    axis.
    """
    reach, (height, width) = NEIGHBOURHOOD, mask.shape
    result = np.zeros_like(mask)
    inside_y, inside_x = (
        np.minimum(np.arange(n), reach) + 1 + np.minimum(np.arange(n)[::-1], reach)
        for n in mask.shape
    )
    for part in strips(mask.shape):
        rows = part.stop - part.start
        block = np.full((2, rows + 2 * reach, width + 2 * reach), np.nan, np.float32)
        source = slice(max(0, part.start - reach), min(height, part.stop + reach))
        first = source.start - part.start + reach
        np.copyto(
            block[:, first : first + source.stop - source.start, reach : reach + width],
            field[:, source],
            where=mask[source],
        )
        votes = np.zeros((rows, width), np.uint8)
        for y, x in product(range(2 * reach + 1), repeat=2):
            apart = block[:, y : y + rows, x : x + width] - field[:, part]
            near = np.abs(apart, out=apart) <= TOLERANCE
            votes += near[0] & near[1]
        result[part] = mask[part] & (2 * votes >= inside_y[part, None] * inside_x)
    return result
