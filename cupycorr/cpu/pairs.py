"""The products of all pairs of positions, for small maps.

Where the patch covers a good part of the maps, the products of all positions in map 1 with all
positions in map 2 cost little more than those that are wanted, and nothing has to be packed::

    pairs[s, t] = sum_c map1[c, s] * map2[c, t]             volume = some cells of pairs
    grad1[c, s] = sum_t map2[c, t] * grad_pairs[s, t]       grad_pairs = the volume's gradient
    grad2[c, t] = sum_s map1[c, s] * grad_pairs[s, t]       in these cells, and zeros

A matrix of pairs lies in memory as *panels* of some columns, one after the other: so few that BLAS
multiplies several rows by them on one thread. Behind it lies one more cell. It is zero for the
displacements that lead out of the map, and takes their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from itertools import product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from cupycorr.cpu.bands import small_products
from cupycorr.cpu.plan import PRODUCT, spans
from cupycorr.cpu.taps import accumulator, store, widen
from cupycorr.cpu.threads import Scratch, Team
from cupycorr.geometry import Axis, Geometry
from cupycorr.layer import Layer

Array = npt.NDArray[Any]
Index = npt.NDArray[np.intp]

COLUMNS = 64
"""A panel has at most so many columns."""
POSITIONS, CHANNELS = PRODUCT // (8 * COLUMNS), PRODUCT // (2 * COLUMNS)
"""Maps have no more than these, so that a product has 8 rows of positions, or 2 of channels."""
CELLS = 1 << 18
"""The volume, counted once for each tap, has no more cells than this."""
WANTED, CELL, CALLS = 8, 150, 3_000_000
"""All pairs may take so many times the multiply-adds that are wanted, where a cell of the volume
counts as ``CELL`` multiply-adds, and ``CALLS`` more for each of the phases that tiles would treat
one by one. Fitted to the time of maps from 4 x 4 to 20 x 32, on one thread."""
UNITS, UNIT_CELLS = 4, 1 << 16
"""Samples are split into at least ``UNITS`` units of at most so many cells, where there are."""


@lru_cache(maxsize=512)
def fit(shape: tuple[int, int, int], geometry: Geometry) -> bool:
    """Tell whether all pairs of maps (C, H, W) take less time than tiles."""
    channels, height, width = shape
    positions = height * width
    volume = prod(geometry.cost_shape((1, *shape))) * geometry.taps
    if positions > POSITIONS or channels > CHANNELS or volume > CELLS:
        return False
    wanted = geometry.multiply_adds((1, *shape))
    phases = prod(geometry.dilation_patch)
    return positions**2 * channels + CELL * volume <= WANTED * wanted + CALLS * phases


def cost(arrays: Mapping[str, Any], layer: Layer, threads: int | None) -> None:
    """Compute the cost volume; the parameters are those of `engine.run`."""
    fmap1, fmap2, out = arrays["fmap1"], arrays["fmap2"], arrays["cost"]
    batch, channels, *size = fmap1.shape
    cells = _cells(layer.geometry, *size)
    with Team(_wanted(fmap1.shape), threads) as team:
        team.work(
            [
                partial(_correlate, fmap1[n], fmap2[n], out[n], cells, layer.divisor(channels))
                for n in _samples(batch, size, UNITS)
            ]
        )


def _wanted(shape: tuple[int, ...]) -> int:
    """Return the wanted multiply-adds for which tiles would take as long."""
    return prod(shape[:2]) * prod(shape[2:]) ** 2 // 4


def _samples(batch: int, size: list[int], units: int) -> tuple[slice, ...]:
    return spans(batch, max(1, min(-(-batch // units), UNIT_CELLS // prod(size) ** 2)))


def _correlate(
    fmap1: Array, fmap2: Array, out: Array, cells: list[Index], divisor: int, scratch: Scratch
) -> None:
    dtype = accumulator(out.dtype)
    one, two = _flat("one", fmap1, dtype, scratch), _flat("two", fmap2, dtype, scratch)
    batch, _, positions = one.shape
    pairs = scratch.take("pairs", (batch, _size(positions)), dtype)
    pairs[:, positions**2] = 0
    for part, panel in _panels(pairs, positions):
        for factor, other, products in small_products(one.swapaxes(1, 2), two[..., part], panel):
            np.matmul(factor, other, out=products)
    sums = scratch.take("sums", (batch, len(cells[0])), dtype)
    pairs.take(cells[0], axis=1, mode="clip", out=sums)
    for tap in cells[1:]:
        sums += pairs.take(tap, axis=1, mode="clip")
    store(out, sums.reshape(out.shape), divisor)


def grads(arrays: Mapping[str, Any], layer: Layer, threads: int | None) -> bool:
    """Compute the gradients; the parameters are those of `engine.run`.

    Return whether they are right: pairs that are not wanted have been multiplied by zero, so a NaN
    or infinity has reached other positions than its own.
    """
    maps, grad_cost = (arrays["fmap1"], arrays["fmap2"]), arrays["grad_cost"]
    batch, channels, *size = maps[0].shape
    results = [
        (arrays[name], maps[1 - i], (layer.geometry, *size, i == 0))
        for i, name in enumerate(("grad_fmap1", "grad_fmap2"))
        if arrays.get(name) is not None
    ]
    finite: list[bool] = []
    with Team(len(results) * _wanted(maps[0].shape), threads) as team:
        team.work(
            [
                partial(
                    _differentiate,
                    grad_cost[n], source[n], out[n], layout, layer.divisor(channels), finite,
                )
                for out, source, layout in results
                for n in _samples(batch, size, UNITS // 2)
            ]
        )  # fmt: skip
    return all(finite)


def _differentiate(
    grad_cost: Array,
    source: Array,
    out: Array,
    layout: tuple[Geometry, int, int, bool],
    divisor: int,
    finite: list[bool],
    scratch: Scratch,
) -> None:
    dtype = accumulator(out.dtype)
    places = _places(*layout)
    flat, upstream = _flat("one", source, dtype, scratch), _flat("up", grad_cost, dtype, scratch)
    batch, _, positions = flat.shape
    pairs = scratch.take_zeroed("full", (batch, _size(positions)), dtype, layout)
    for row, values in zip(pairs, upstream.reshape(batch, -1), strict=True):
        if len(places) == 1:
            cells, where = places[0]
            row[cells] = values[where]
            continue
        row.fill(0)
        for cells, where in places:
            row[cells] += values[where]
    gradient = scratch.take("two", flat.shape, dtype)
    for part, panel in _panels(pairs, positions):
        for factor, other, products in small_products(flat, panel, gradient[..., part]):
            np.matmul(factor, other, out=products)
    finite.append(bool(np.isfinite(gradient.sum())))
    store(out, gradient.reshape(out.shape), divisor)


def _flat(name: str, fmap: Array, dtype: np.dtype[Any], scratch: Scratch) -> Array:
    """Return a map as contiguous (N, C, positions), in the accumulator's dtype."""
    if fmap.dtype != dtype or not fmap.flags.c_contiguous:
        wide = scratch.take(name, fmap.shape, dtype)
        widen(wide, fmap)
        fmap = wide
    return fmap.reshape(*fmap.shape[:2], -1)


def _panels(pairs: Array, positions: int) -> Iterator[tuple[slice, Array]]:
    """Yield the columns of each panel, and the panel as (N, row, column)."""
    for part in spans(positions, COLUMNS):
        panel = pairs[:, part.start * positions : part.stop * positions]
        yield part, panel.reshape(len(pairs), positions, part.stop - part.start)


def _size(positions: int) -> int:
    """Return the cells of all panels and one more, up to a whole cache line."""
    return (positions**2 // 16 + 1) * 16


@lru_cache(maxsize=32)
def _cells(geometry: Geometry, height: int, width: int, transposed: bool = False) -> list[Index]:
    """Return, for each tap, which cell of the pairs each cell of the volume stands for.

    Rows of the pairs are positions in map 1, or in map 2 if ``transposed``.
    """
    positions = height * width
    all_cells = []
    for meeting in _meetings(geometry, height, width):
        row, column = meeting[::-1] if transposed else meeting
        start = column // COLUMNS * COLUMNS
        cell = start * positions + row * np.minimum(COLUMNS, positions - start) + column - start
        all_cells.append(np.where((row | column) < 0, positions**2, cell).ravel())
    return all_cells


@lru_cache(maxsize=32)
def _places(
    geometry: Geometry, height: int, width: int, transposed: bool
) -> list[tuple[Index, Index | slice]]:
    """Return, for each tap, cells of the pairs, and the cells of the volume that stand for them."""
    places: list[tuple[Index, Index | slice]] = []
    for cells in _cells(geometry, height, width, transposed):
        inside = np.flatnonzero(cells < (height * width) ** 2)
        few = 2 * len(inside) < len(cells)
        places.append((cells[inside], inside) if few else (cells, slice(None)))
    return places


def _meetings(geometry: Geometry, height: int, width: int) -> list[tuple[Index, Index]]:
    """Return the positions in both maps, (PH, PW, OH, OW) for each tap; -1 outside a map."""
    found = []
    for i, j in product(range(geometry.kernel_size[0]), range(geometry.kernel_size[1])):
        rows, columns = _axis_meetings(geometry.y, height, i), _axis_meetings(geometry.x, width, j)
        one, two = (
            np.where((y | x) < 0, -1, y * width + x)
            for y, x in zip(
                [p[:, None, :, None] for p in rows], [p[:, None, :] for p in columns], strict=True
            )
        )
        found.append((one, two))
    return found


def _axis_meetings(axis: Axis, size: int, tap: int) -> list[Index]:
    """Return the positions in both maps, (displacement, output); -1 outside a map."""
    one = np.arange(axis.output_size(size)) * axis.stride - axis.padding + tap * axis.dilation
    displacements = axis.first_displacement + np.arange(axis.patch_size) * axis.dilation_patch
    two = one + displacements[:, None]
    both = np.broadcast_to(one, two.shape), two
    return [np.where((p >= 0) & (p < size), p, -1) for p in both]
