"""Banded products on the CPU: tiles of matrix products, or one multiplication per displacement.

The core of the NumPy engine. For one pair of phases (`geometry.Phase`), every position m and
displacement p, both two-dimensional::

    volume[p, m] = sum_c map1[c, m] * map2[c, m + p + shift]
    grad1[c, m]  = sum_p volume[p, m] * map2[c, m + p + shift]
    grad2[c, j]  = sum_p volume[p, m] * map1[c, m],   m = j - p - shift

Positions that do not exist contribute nothing. The targets (m in the first two lines, j in the
third) are cut into *tiles*; the *window* of a tile is the block of source positions that it meets.
The matrix of all products of a tile's window with its targets holds the wanted ones on diagonals,
its *band*: a target (row, column) and a displacement (p, q) stand for the source position
(row + p, column + q), counted from the corner of the window::

    source 0   x . .
    source 1   x x .
    source 2   x x x        three targets, three displacements
    source 3   . x x
    source 4   . . x

For the gradients the band is filled, zeros elsewhere, and multiplied with the window. Seen from
the second map displacements run backwards, (row - p + P - 1, column - q + Q - 1): *mirrored*.

Windows are packed with their columns in reverse. Then a step to the next target moves in memory a
little less far than a step to the next displacement, and NumPy, which runs copies along the axis
of the smallest step, copies bands along the targets, in which the volume is contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupycorr.geometry import Band
from cupycorr.parallel import Scratch

Array = npt.NDArray[Any]

BAND_BYTES = 1 << 20
"""Upper limit of the product matrices in work at a time: about a core's second-level cache."""


BAND_TARGETS = 512
"""Targets whose bands are copied at a time, such that their cache lines serve the next one too."""


class Tiling(NamedTuple):
    """Targets per tile, and whether its products are one matrix product or shift by shift."""

    rows: int
    columns: int
    as_matrix: bool


class Tiles(NamedTuple):
    """``count`` tiles along an axis, one after the other, that lie alike in their windows."""

    start: int
    """First target."""
    size: int
    """Targets per tile."""
    count: int
    window: int
    """First source position of the first tile that exists."""
    extent: int
    """Source positions per tile that exist."""
    cut: int
    """Source positions before ``window`` that the tile would meet, were they there."""

    def single(self) -> Iterator[Tiles]:
        """Yield the tiles one by one."""
        for i in range(self.count):
            step = i * self.size
            yield self._replace(start=self.start + step, window=self.window + step, count=1)


def cover(band: Band, size: int) -> list[Tiles]:
    """Cover all targets with tiles of ``size``; the last one may be smaller."""
    found: list[Tiles] = []
    for start in range(0, band.count1, size):
        targets = min(size, band.count1 - start)
        virtual = start + band.shift
        low = max(0, virtual)
        high = min(band.count2, virtual + targets - 1 + band.count_patch)
        tile = Tiles(start, targets, 1, low, max(0, high - low), low - virtual)
        last = found[-1] if found else None
        alike = last and (last.size, last.extent, last.cut) == (targets, tile.extent, 0)
        if last and alike and tile.cut == 0:
            found[-1] = last._replace(count=last.count + 1)
        else:
            found.append(tile)
    return found


class Block(NamedTuple):
    """A column of tiles of one phase pair, and which way round its displacements run."""

    y: Band
    x: Band
    tiling: Tiling
    across: Tiles
    mirrored: bool

    @property
    def target_shape(self) -> tuple[int, int]:
        """Rows and columns of the targets."""
        return self.y.count1, self.across.size

    @property
    def source_shape(self) -> tuple[int, int]:
        """Rows and columns of the windows together."""
        return self.y.count2, self.across.extent

    @property
    def target_columns(self) -> slice:
        """Columns of the phase that the targets lie in."""
        return slice(self.across.start, self.across.start + self.across.size)

    @property
    def source_columns(self) -> slice:
        """Columns of the phase that the windows lie in."""
        return slice(self.across.window, self.across.window + self.across.extent)


def blocks(
    channels: int, y: Band, x: Band, itemsize: int, *, adjoint: bool, mirrored: bool
) -> list[Block]:
    """Cut a phase pair into blocks, for the volume or a gradient (second map: ``mirrored``)."""
    if mirrored:
        y, x = y.mirrored(), x.mirrored()
    tiling = choose_tiling(channels, y, x, itemsize, adjoint)
    return [
        Block(y, x, tiling, tile, mirrored)
        for tiles in cover(x, tiling.columns)
        for tile in tiles.single()
    ]


def multiply(
    block: Block, tiles: Tiles, targets: Array, source: Array, volume: Array, scratch: Scratch
) -> None:
    """Write the products of some rows of tiles into the volume.

    ``targets`` (C, rows, columns) and ``source`` (C, rows, columns) are contiguous arrays of the
    block's target_shape and source_shape, the source's columns in reverse; ``volume`` (P, Q, rows, columns) covers the targets and
    is zero where a displacement leads out of the image.
    """
    if not block.tiling.as_matrix:
        forwards = source[:, :, ::-1]
        for p, q, here, there in _shifts(block, tiles):
            np.einsum("cyx,cyx->yx", targets[here], forwards[there], out=volume[p, q][here[1:]])
        return
    for part in _within(block, tiles, source.itemsize):
        if 0 in (part.extent, block.across.extent):
            volume[:, :, part.start : part.start + part.count * part.size] = 0
            continue
        dense, full, inside = _matrices(block, part, source.dtype, scratch)
        np.matmul(
            _tile_view(source, part.window, part, part.extent).transpose(0, 2, 1),
            _tile_view(targets, part.start, part, part.size),
            out=dense.reshape(part.count, -1, dense.shape[3]),
        )
        if dense.shape != full.shape:
            full[:, *inside] = dense
        full[:, : inside[0].start] = 0
        full[:, inside[0].stop :] = 0
        for values, band in _band(block, part, volume, full):
            values[...] = band


def multiply_adjoint(
    block: Block, tiles: Tiles, volume: Array, source: Array, result: Array, scratch: Scratch
) -> None:
    """Write the gradient with respect to some rows of tiles, from the volume's gradient.

    ``volume`` (P, Q, rows, columns) gives for each displacement and target the value that belongs
    to it; ``source`` and ``result`` (C, rows, columns) are contiguous, of the block's source_shape,
    columns in reverse, and target_shape. Zeros beside the band are multiplied too, so the result is right only where
    it is finite; `multiply_adjoint_by_shifts` is right everywhere.
    """
    if not block.tiling.as_matrix:
        multiply_adjoint_by_shifts(block, tiles, volume, source, result)
        return
    for part in _within(block, tiles, source.itemsize):
        if 0 in (part.extent, block.across.extent):
            result[:, part.start : part.start + part.count * part.size] = 0
            continue
        dense, full, inside = _matrices(block, part, source.dtype, scratch)
        for values, band in _band(block, part, volume, full):
            band[...] = values
        if dense.shape != full.shape:
            dense[...] = full[:, *inside]
        np.matmul(
            _tile_view(source, part.window, part, part.extent),
            dense.reshape(part.count, -1, dense.shape[3]),
            out=_tile_view(result, part.start, part, part.size),
        )


def multiply_adjoint_by_shifts(
    block: Block, tiles: Tiles, volume: Array, source: Array, result: Array
) -> None:
    """Do the work of `multiply_adjoint` without any product of positions that do not meet."""
    forwards = source[:, :, ::-1]
    result[:, tiles.start : tiles.start + tiles.count * tiles.size] = 0
    for p, q, here, there in _shifts(block, tiles):
        result[here] += volume[p, q][here[1:]] * forwards[there]


def _shifts(
    block: Block, tiles: Tiles
) -> Iterator[tuple[int, int, tuple[slice, ...], tuple[slice, ...]]]:
    """Yield (p, q, targets, sources) of each displacement, as indices into packed maps."""
    y, x, across = block.y, block.x, block.across
    first, stop = tiles.start, tiles.start + tiles.count * tiles.size
    every = slice(None)
    for p in range(y.count_patch):
        down = (y.count_patch - 1 - p if block.mirrored else p) + y.shift
        low, high = max(first, -down), min(stop, y.count2 - down)
        if low >= high:
            continue
        for q in range(x.count_patch):
            right = (x.count_patch - 1 - q if block.mirrored else q) - across.cut
            left, end = max(0, -right), min(across.size, across.extent - right)
            if left < end:
                here = (every, slice(low, high), slice(left, end))
                there = (every, slice(low + down, high + down), slice(left + right, end + right))
                yield p, q, here, there


def _within(block: Block, tiles: Tiles, itemsize: int) -> Iterator[Tiles]:
    """Split tiles such that their matrices stay within BAND_BYTES."""
    targets, sources = tiles.size * block.across.size, _window_size(block, tiles)
    at_once = max(1, BAND_BYTES // (targets * sources[0] * sources[1] * itemsize))
    yield from _split(tiles, at_once)


def _split(tiles: Tiles, at_once: int) -> Iterator[Tiles]:
    for done in range(0, tiles.count, at_once):
        step = done * tiles.size
        yield tiles._replace(
            start=tiles.start + step,
            window=tiles.window + step,
            count=min(at_once, tiles.count - done),
        )


def _window_size(block: Block, tiles: Tiles) -> tuple[int, int]:
    """Return the rows and columns of a tile's window, existing or not."""
    return tiles.size + block.y.count_patch - 1, block.across.size + block.x.count_patch - 1


def _matrices(
    block: Block, tiles: Tiles, dtype: np.dtype[Any], scratch: Scratch
) -> tuple[Array, Array, tuple[slice, slice]]:
    """Return the matrix for the product, the one with room for the whole band, and where it fits.

    Both have the axes (tile, source row, source column, target). The first has only the rows and
    columns that exist; it lies in the second where that has no other columns. The second is zero
    beside its band, but for rows that do not exist.
    """
    rows, columns = _window_size(block, tiles)
    across, targets = block.across, tiles.size * block.across.size
    # Which cells are ever written depends on this, and on the shape.
    layout = (tiles.size, across.cut, across.extent, block.x.count_patch, block.mirrored)
    full = scratch.take_zeroed("full", (tiles.count, rows, columns, targets), dtype, layout)
    last = columns - across.cut
    inside = slice(tiles.cut, tiles.cut + tiles.extent), slice(last - across.extent, last)
    if across.extent == columns:
        return full[:, inside[0]], full, inside
    shape = (tiles.count, tiles.extent, across.extent, targets)
    return scratch.take("dense", shape, dtype), full, inside


def _tile_view(packed: Array, first_row: int, tiles: Tiles, rows: int) -> Array:
    """View a packed map (C, rows, columns) as (tile, C, positions); windows overlap."""
    channel, row, item = packed.strides
    return np.ndarray(
        (tiles.count, packed.shape[0], rows * packed.shape[2]),
        packed.dtype,
        packed,
        first_row * row,
        (tiles.size * row, channel, item),
    )


def _band(
    block: Block, tiles: Tiles, volume: Array, matrix: Array
) -> Iterator[tuple[Array, Array]]:
    """Yield pairs of views: cells of the volume, and where they stand in the matrix's band.

    The axes are (p, q, tile, row, column).
    """
    patch_y, patch_x = block.y.count_patch, block.x.count_patch
    across = block.across.size
    per_tile, per_row, per_column, item = matrix.strides
    # The first target's column stands last; mirrored, its last displacement does.
    corner = (matrix.shape[2] - 1) * per_column
    sign = 1
    if block.mirrored:
        corner += (patch_y - 1) * per_row - (patch_x - 1) * per_column
        sign = -1
    strides = (
        sign * per_row,
        -sign * per_column,
        per_tile,
        per_row + across * item,
        item - per_column,
    )
    for few in _split(tiles, max(1, BAND_TARGETS // (tiles.size * across))):
        shape = (patch_y, patch_x, few.count, tiles.size, across)
        values = volume[:, :, few.start : few.start + few.count * few.size].reshape(shape)
        offset = corner + (few.start - tiles.start) // tiles.size * per_tile
        yield values, np.ndarray(shape, matrix.dtype, matrix, offset, strides)


# Seconds per step, measured in float32; only their ratios matter for the choice.
MULTIPLY_ADD = 2.2e-11
PACKED_BY_BLAS = 4.5e-10
COPIED = 7e-10
COPIED_RUN = 8e-9
CALL = 1.5e-6
SHIFTED = 6e-10
SHIFTED_ADJOINT = 1.8e-9


@lru_cache(maxsize=4096)
def choose_tiling(channels: int, y: Band, x: Band, itemsize: int, adjoint: bool) -> Tiling:
    """Choose how to cut a phase pair, by a model of the cost of each possible way.

    Large tiles make efficient matrix products but compute much beside the band; for few channels
    or displacements one multiplication per displacement beats any tile.
    """
    rows = max(1, min(y.count1, (1 << 17) // (itemsize * channels * x.count1)))
    shifts = y.count_patch * x.count_patch
    shifted = SHIFTED_ADJOINT if adjoint else SHIFTED
    best = Tiling(rows, x.count1, as_matrix=False)
    best_cost = shifts * (
        3 * CALL * -(-y.count1 // rows) + y.count1 * x.count1 * channels * shifted
    )
    for columns in _even_sizes(x.count1):
        across = cover(x, columns)
        for rows in _even_sizes(y.count1):
            down = cover(y, rows)
            extent = max(t.extent for t in across)
            if rows * columns * (rows + y.count_patch - 1) * extent * itemsize > BAND_BYTES:
                continue
            cost = _cost_of_tiles(channels, rows * columns, y, x, down, across)
            if cost < best_cost:
                best, best_cost = Tiling(rows, columns, as_matrix=True), cost
    return best


def _cost_of_tiles(
    channels: int, targets: int, y: Band, x: Band, down: list[Tiles], across: list[Tiles]
) -> float:
    tiles_y, tiles_x = (sum(t.count for t in axis) for axis in (down, across))
    sources_y, sources_x = (sum(t.count * t.extent for t in axis) for axis in (down, across))
    products = targets * sources_y * sources_x
    packed_by_blas = targets * tiles_y * tiles_x + sources_y * sources_x
    packed = y.count1 * x.count1 + y.count2 * sources_x
    band = y.count1 * x.count1 * y.count_patch * x.count_patch
    columns = across[0].size
    partial = sum(min(t.cut + x.count_patch - 1, 2 * x.count_patch) for t in across if t.cut)
    return (
        channels * (products * MULTIPLY_ADD + packed_by_blas * PACKED_BY_BLAS)
        + (channels * packed + band) * (COPIED + COPIED_RUN / columns)
        + (len(down) * (8 * tiles_x + partial)) * CALL
        + tiles_x * 10 * CALL
    )


@lru_cache(maxsize=256)
def _even_sizes(count: int) -> tuple[int, ...]:
    """Return tile sizes to try, each such that its tiles cover ``count`` with little overlap."""
    sizes = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128)
    return tuple(sorted({-(-count // -(-count // min(size, count))) for size in sizes}))
