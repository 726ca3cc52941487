"""The products of all pairs of positions, for small maps.

Where the patch covers a good part of the maps, the products of all positions in map 1 with all
positions in map 2 cost little more than those that are wanted, and nothing has to be packed::

    pairs[s, t] = sum_c map1[c, s] * map2[c, t]             volume = some cells of pairs
    grad1[c, s] = sum_t map2[c, t] * grad_pairs[s, t]       grad_pairs = the volume's gradient
    grad2[c, t] = sum_s map1[c, s] * grad_pairs[s, t]       in these cells, and zeros

A matrix of pairs is cut into *panels* of some columns: so few that BLAS multiplies several rows by
them on one thread. A panel has the rows from the first to the last that meet one of its columns.
Panels lie in memory one after the other. Behind them lies one more cell. It is zero for the
displacements that lead out of the map, and takes their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupycorr.cpu.bands import small_products
from cupycorr.cpu.plan import PRODUCT, spans
from cupycorr.cpu.taps import accumulator, spread_taps, store, sum_taps, widen
from cupycorr.cpu.threads import CACHE_LINE, Scratch, Team
from cupycorr.geometry import Axis, Geometry
from cupycorr.lattice import Lattice, lattices
from cupycorr.layer import Layer

Array = npt.NDArray[Any]
Index = npt.NDArray[np.intp]

COLUMNS = 64
"""A panel has at most so many columns, or twice as many where that is all of them."""
ROWS = CACHE_LINE // 4
"""Panels begin with a multiple of so many rows, where the other matrix begins a cache line."""
POSITIONS, CHANNELS = PRODUCT // (4 * COLUMNS), PRODUCT // (2 * COLUMNS)
"""Maps have no more than these, so that a product has 4 rows of positions, or 2 of channels."""
CELLS = 1 << 18
"""The volume, on the lattice that holds all taps, has no more cells than this."""
WANTED, CELL, PANEL, CALLS = 16, 100, 800_000, 6_000_000
"""All pairs may take so many times the multiply-adds that are wanted. A cell of the volume counts
as ``CELL`` multiply-adds, and a panel as ``PANEL``. Tiles cost ``CALLS`` more for each of the
phases that they treat one by one. Fitted to the time of a thousand maps from 4 x 4 to 32 x 32, on
one thread and on two."""
UNIT_CELLS = 1 << 19
"""A unit has at most so many cells of the pairs, unless one sample has more."""


@lru_cache(maxsize=512)
def fit(shape: tuple[int, int, int], geometry: Geometry) -> bool:
    """Tell whether all pairs of maps (C, H, W) take less time than tiles."""
    channels, height, width = shape
    axes = geometry.y, geometry.x
    outputs = geometry.output_size(height, width)
    if any(axis.is_sparse(count) for axis, count in zip(axes, outputs, strict=True)):
        return False
    lattice = [axis.lattice_size(count) for axis, count in zip(axes, outputs, strict=True)]
    volume = prod(geometry.patch_size) * prod(lattice)
    if height * width > POSITIONS or channels > CHANNELS or volume > CELLS:
        return False
    panels = _panels(geometry, height, width)
    effort = panels[-1].stop * channels + CELL * volume + PANEL * len(panels)
    phases = prod(axes[0].phases + axes[1].phases)
    return effort <= WANTED * geometry.multiply_adds((1, *shape)) + CALLS * phases


class Panel(NamedTuple):
    """Some columns of the pairs, and where they lie in memory."""

    rows: slice
    columns: slice
    start: int
    """The cell of its first row and column."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def stop(self) -> int:
        """The cell behind its last row and column."""
        return self.start + prod(self.shape)

    def of(self, pairs: Array) -> Array:
        """Return the panel in pairs of several samples, as (N, row, column)."""
        return pairs[:, self.start : self.stop].reshape(len(pairs), *self.shape)


class Layout(NamedTuple):
    """Where the cells of the volume lie among the pairs."""

    panels: list[Panel]
    cells: Index
    """The cell of the pairs for each cell of the volume on its lattices."""
    y: Lattice
    x: Lattice

    @property
    def outside(self) -> int:
        """The cell of displacements that lead out of the map."""
        return self.panels[-1].stop

    @property
    def size(self) -> int:
        """The cells of one sample, up to a whole cache line."""
        return (self.outside // ROWS + 1) * ROWS


def cost(arrays: Mapping[str, Any], layer: Layer, threads: int | None) -> None:
    """Compute the cost volume; the parameters are those of `engine.run`."""
    fmap1, fmap2, out = arrays["fmap1"], arrays["fmap2"], arrays["cost"]
    batch, channels, *size = fmap1.shape
    layout = _layout(layer.geometry, *size)
    with Team(_wanted(fmap1.shape), threads) as team:
        team.work(
            [
                partial(_correlate, fmap1[n], fmap2[n], out[n], layout, layer.divisor(channels))
                for n in _samples(batch, layout, team.size)
            ]
        )


def _wanted(shape: tuple[int, ...]) -> int:
    """Return the wanted multiply-adds for which tiles would take as long."""
    return prod(shape[:2]) * prod(shape[2:]) ** 2 // 4


def _samples(batch: int, layout: Layout, units: int) -> tuple[slice, ...]:
    """Split the samples into few units; no result depends on their number."""
    return spans(batch, max(1, min(-(-batch // units), UNIT_CELLS // layout.size)))


def _correlate(
    fmap1: Array, fmap2: Array, out: Array, layout: Layout, divisor: int, scratch: Scratch
) -> None:
    dtype = accumulator(out.dtype)
    one, two = _flat("one", fmap1, dtype, scratch), _flat("two", fmap2, dtype, scratch)
    pairs = scratch.take("pairs", (len(one), layout.size), dtype)
    pairs[:, layout.outside] = 0
    for panel in layout.panels:
        factors = one[..., panel.rows].swapaxes(1, 2), two[..., panel.columns]
        for factor, other, products in small_products(*factors, panel.of(pairs), even=True):
            np.matmul(factor, other, out=products)
    shape = (*out.shape[:3], layout.y.size, layout.x.size)
    direct = shape == out.shape and divisor == 1 and out.dtype == dtype and out.flags.c_contiguous
    volume = out if direct else scratch.take("volume", shape, dtype)
    pairs.take(layout.cells, axis=1, mode="clip", out=volume.reshape(len(one), -1))
    if not direct:
        store(out, sum_taps(volume, layout.y, layout.x), divisor)


def grads(arrays: Mapping[str, Any], layer: Layer, threads: int | None) -> bool:
    """Compute the gradients; the parameters are those of `engine.run`.

    Return whether they are right: pairs that are not wanted have been multiplied by zero, so a NaN
    or infinity has reached other positions than its own.
    """
    maps, grad_cost = (arrays["fmap1"], arrays["fmap2"]), arrays["grad_cost"]
    batch, channels, *size = maps[0].shape
    dtype, divisor = accumulator(grad_cost.dtype), layer.divisor(channels)
    results = [
        (arrays[name], maps[1 - i], (layer.geometry, *size, i == 0))
        for i, name in enumerate(("grad_fmap1", "grad_fmap2"))
        if arrays.get(name) is not None
    ]
    clean: list[bool] = []
    with Team(len(results) * _wanted(maps[0].shape), threads) as team:
        volume = grad_cost
        if layer.geometry.taps > 1 or grad_cost.dtype != dtype or not grad_cost.flags.c_contiguous:
            y, x = _lattices(layer.geometry, *size)
            volume = team.arena.take("volume", (*grad_cost.shape[:3], y.size, x.size), dtype)
            samples = spans(batch, -(-batch // team.size))
            team.work([partial(spread_taps, volume[n], grad_cost[n], y, x) for n in samples])
        team.work(
            [
                partial(_differentiate, volume[n], source[n], out[n], which, divisor, clean)
                for out, source, which in results
                for n in _samples(batch, _layout(*which), -(-team.size // len(results)))
            ]
        )
    return all(clean)


def _differentiate(
    volume: Array,
    source: Array,
    out: Array,
    which: tuple[Geometry, int, int, bool],
    divisor: int,
    clean: list[bool],
    scratch: Scratch,
) -> None:
    layout, flat = _layout(*which), _flat("one", source, volume.dtype, scratch)
    pairs = scratch.take_zeroed("full", (len(flat), layout.size), volume.dtype, which)
    values, places = volume.reshape(len(flat), -1), _places(*which, len(flat))
    if places.of_all is not None:
        values.take(places.of_all, axis=1, mode="clip", out=pairs)
        values = np.zeros((), values.dtype)
    elif places.of_some is not None:
        values = values.take(places.of_some, axis=1, mode="clip")
    pairs.reshape(-1)[places.cells] = values.reshape(-1)
    direct = divisor == 1 and out.dtype == volume.dtype and out.flags.c_contiguous
    gradient = out if direct else scratch.take("gradient", out.shape, volume.dtype)
    result = gradient.reshape(flat.shape)
    for panel in layout.panels:
        factors, place = (flat[..., panel.rows], panel.of(pairs)), result[..., panel.columns]
        for factor, other, products in small_products(*factors, place, even=True):
            np.matmul(factor, other, out=products)
    # An infinity times zero is NaN, and a maximum is NaN if one of its values is.
    clean.append(not np.isnan(result.max()))
    if not direct:
        store(out, gradient, divisor)


def _flat(name: str, fmap: Array, dtype: np.dtype[Any], scratch: Scratch) -> Array:
    """Return a map as contiguous (N, C, positions), in the accumulator's dtype."""
    if fmap.dtype != dtype or not fmap.flags.c_contiguous:
        wide = scratch.take(name, fmap.shape, dtype)
        widen(wide, fmap)
        fmap = wide
    return fmap.reshape(*fmap.shape[:2], -1)


@lru_cache(maxsize=16)
def _layout(geometry: Geometry, height: int, width: int, transposed: bool = False) -> Layout:
    """Lay the pairs out. Rows are positions in map 1, or in map 2 if ``transposed``."""
    panels = _panels(geometry, height, width, transposed)
    # The cell of a row and a column is starts[column] + row * steps[column].
    counts = [panel.shape[1] for panel in panels]
    origins = [
        panel.start - panel.rows.start * count - panel.columns.start
        for panel, count in zip(panels, counts, strict=True)
    ]
    steps = np.repeat(counts, counts)
    starts = np.arange(height * width) + np.repeat(origins, counts)
    y, x = _lattices(geometry, height, width)
    meetings = zip(_meetings(geometry.y, y, height), _meetings(geometry.x, x, width), strict=True)
    one, two = (
        np.where((rows | columns) < 0, -1, rows * width + columns)
        for rows, columns in ((r[:, None, :, None], c[:, None, :]) for r, c in meetings)
    )
    row, column = (two, one) if transposed else (one, two)
    cells = np.where((row | column) < 0, panels[-1].stop, starts[column] + row * steps[column])
    return Layout(panels, cells.ravel(), y, x)


class _Places(NamedTuple):
    """How to fill the pairs of some samples from a volume.

    Take the cell ``of_all`` of the volume for each cell of a sample's pairs, and clear ``cells`` of
    all samples' pairs. Or, if ``of_all`` is None, put into ``cells`` the cells ``of_some`` of the
    volume, or all of them.
    """

    cells: Index
    of_some: Index | None = None
    of_all: Index | None = None


@lru_cache(maxsize=16)
def _places(geometry: Geometry, height: int, width: int, transposed: bool, batch: int) -> _Places:
    layout = _layout(geometry, height, width, transposed)
    samples = np.arange(batch)[:, None] * layout.size
    inside = np.flatnonzero(layout.cells != layout.outside)
    if 2 * len(inside) >= len(layout.cells):
        return _Places((samples + layout.cells).ravel())
    cells = layout.cells[inside]
    if layout.size > 2 * len(inside):
        return _Places((samples + cells).ravel(), inside)
    of_all = np.full(layout.size, -1)
    of_all[cells] = inside
    return _Places((samples + np.flatnonzero(of_all < 0)).ravel(), None, of_all)


def _panels(geometry: Geometry, height: int, width: int, transposed: bool = False) -> list[Panel]:
    y, x = _lattices(geometry, height, width)
    reaches = zip(
        _reach(geometry.y, y, height, transposed),
        _reach(geometry.x, x, width, transposed),
        strict=True,
    )
    first, last = ((y[:, None] * width + x).ravel() for y, x in reaches)
    positions = height * width
    panels: list[Panel] = []
    for columns in spans(positions, (1 + (positions <= 2 * COLUMNS)) * COLUMNS):
        stop = min(positions, max(1, int(last[columns].max()) + 1))
        start = max(0, min(int(first[columns].min()), stop - 1)) // ROWS * ROWS
        panels.append(Panel(slice(start, stop), columns, panels[-1].stop if panels else 0))
    return panels


def _reach(axis: Axis, lattice: Lattice, size: int, transposed: bool) -> tuple[Index, Index]:
    """Return the first and the last row that meets each column, along one axis."""
    first, last = np.full(size, size), np.full(size, -1)
    one, two = _meetings(axis, lattice, size)
    row, column = (two, one) if transposed else (one, two)
    inside = (one | two) >= 0
    np.minimum.at(first, column[inside], row[inside])
    np.maximum.at(last, column[inside], row[inside])
    return first, last


def _lattices(geometry: Geometry, height: int, width: int) -> tuple[Lattice, Lattice]:
    """Return the lattices that hold all taps."""
    (y,), (x,) = (
        lattices(axis, size, 0, axis.output_size(size))
        for axis, size in ((geometry.y, height), (geometry.x, width))
    )
    return y, x


def _meetings(axis: Axis, lattice: Lattice, size: int) -> tuple[Index, Index]:
    """Return the positions in both maps, (displacement, lattice position); -1 outside a map."""
    one = np.array(lattice.positions)
    displacements = axis.first_displacement + np.arange(axis.patch_size) * axis.dilation_patch
    two = one + displacements[:, None]
    one, two = (np.where((p >= 0) & (p < size), p, -1) for p in (one, two))
    return np.broadcast_to(one, two.shape), two
