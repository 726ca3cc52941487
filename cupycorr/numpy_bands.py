"""Banded products on the CPU: tiles of matrix products, or one multiplication per displacement.

The core of the NumPy engine. For one pair of phases (`geometry.Phase`), every position m and
displacement p, both two-dimensional::

    volume[p, m] = sum_c map1[c, m] * map2[c, m + p + shift]
    grad1[c, m]  = sum_p volume[p, m] * map2[c, m + p + shift]
    grad2[c, j]  = sum_p volume[p, m] * map1[c, m],   m = j - p - shift

Positions that do not exist contribute nothing. The targets (m in the first two lines, j in the
third) are cut into *tiles*; the *window* of a tile is the block of source positions that it meets.
The matrix of all products of a tile's targets with its window holds the wanted ones on diagonals,
its *band*: a target (row, column) and a displacement (p, q) stand for the source position
(row + p, column + q), counted from the corner of the window::

    target 0   x x x . .
    target 1   . x x x .        three displacements
    target 2   . . x x x

For the gradients the band is filled, zeros elsewhere, and multiplied with the window. Seen from
the second map displacements run backwards, (row - p + P - 1, column - q + Q - 1): *mirrored*.
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


def blocks(channels: int, y: Band, x: Band, itemsize: int, *, mirrored: bool) -> list[Block]:
    """Cut a phase pair into blocks; for the gradient of the second map with ``mirrored``."""
    if mirrored:
        y, x = y.mirrored(), x.mirrored()
    tiling = choose_tiling(channels, y, x, itemsize)
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
    block's target_shape and source_shape; ``volume`` (P, Q, rows, columns) covers the targets and
    is zero where a displacement leads out of the image.
    """
    if not block.tiling.as_matrix:
        for p, q, here, there in _shifts(block, tiles):
            np.einsum("cyx,cyx->yx", targets[here], source[there], out=volume[(p, q, *here[1:])])
        return
    columns, width = block.across.size, block.across.extent
    for part in _within(block, tiles, source.itemsize):
        matrix = scratch.take("matrix", _matrix_shape(block, part), source.dtype)
        before, after = part.cut, part.cut + part.extent
        flat = matrix.reshape(*matrix.shape[:2], -1)
        np.matmul(
            _tile_view(targets, part.start, part, part.size * columns).transpose(0, 2, 1),
            _tile_view(source, part.window, part, part.extent * width),
            out=flat[:, :, before * width : after * width],
        )
        matrix[:, :, :before] = 0
        matrix[:, :, after:] = 0
        rows = volume[:, :, part.start : part.start + part.count * part.size]
        rows = rows.reshape(*rows.shape[:2], part.count, part.size, columns)
        for q, span, band in _band(block, part, matrix):
            rows[:, q, :, :, span] = band


def multiply_adjoint(
    block: Block, tiles: Tiles, volume: Array, source: Array, result: Array, scratch: Scratch
) -> None:
    """Write the gradient with respect to some rows of tiles, from the volume's gradient.

    ``volume`` (P, Q, rows, columns) gives for each displacement and target the value that belongs
    to it; ``source`` and ``result`` (C, rows, columns) are contiguous, of the block's source_shape
    and target_shape. Zeros beside the band are multiplied too, so the result is right only where
    it is finite; `multiply_adjoint_by_shifts` is right everywhere.
    """
    if not block.tiling.as_matrix:
        multiply_adjoint_by_shifts(block, tiles, volume, source, result)
        return
    columns, width = block.across.size, block.across.extent
    for part in _within(block, tiles, source.itemsize):
        layout = (part.size, columns, block.across.cut, block.x.count_patch, block.mirrored)
        matrix = scratch.take_zeroed("band", _matrix_shape(block, part), source.dtype, layout)
        rows = volume[:, :, part.start : part.start + part.count * part.size]
        rows = rows.reshape(*rows.shape[:2], part.count, part.size, columns)
        for q, span, band in _band(block, part, matrix):
            band[...] = rows[:, q, :, :, span]
        flat = matrix.reshape(*matrix.shape[:2], -1)
        existing = flat[:, :, part.cut * width : (part.cut + part.extent) * width]
        np.matmul(
            _tile_view(source, part.window, part, part.extent * width),
            existing.transpose(0, 2, 1),
            out=_tile_view(result, part.start, part, part.size * columns),
        )


def multiply_adjoint_by_shifts(
    block: Block, tiles: Tiles, volume: Array, source: Array, result: Array
) -> None:
    """Do the work of `multiply_adjoint` without any product of positions that do not meet."""
    result[:, tiles.start : tiles.start + tiles.count * tiles.size] = 0
    for p, q, here, there in _shifts(block, tiles):
        result[here] += volume[(p, q, *here[1:])] * source[there]


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
    _, targets, rows, width = _matrix_shape(block, tiles)
    at_once = max(1, BAND_BYTES // max(1, targets * rows * width * itemsize))
    for done in range(0, tiles.count, at_once):
        step = done * tiles.size
        yield tiles._replace(
            start=tiles.start + step,
            window=tiles.window + step,
            count=min(at_once, tiles.count - done),
        )


def _matrix_shape(block: Block, tiles: Tiles) -> tuple[int, int, int, int]:
    """Return (tiles, targets, source rows, source columns); rows that do not exist included."""
    rows = tiles.size + block.y.count_patch - 1
    return tiles.count, tiles.size * block.across.size, rows, block.across.extent


def _tile_view(packed: Array, first_row: int, tiles: Tiles, positions: int) -> Array:
    """View a packed map (C, rows, columns) as (tile, C, positions); windows overlap."""
    channel, row, item = packed.strides
    return np.ndarray(
        (tiles.count, packed.shape[0], positions),
        packed.dtype,
        packed,
        first_row * row,
        (tiles.size * row, channel, item),
    )


def _band(block: Block, tiles: Tiles, matrix: Array) -> Iterator[tuple[slice, slice, Array]]:
    """Yield (displacements q, target columns, view) that together are the band of the matrix.

    The views have the axes (p, q, tile, row, column). Displacements for which all columns of the
    tile have a partner come together, the others one by one.
    """
    patch_y, patch_x = block.y.count_patch, block.x.count_patch
    columns, width, cut = block.across.size, block.across.extent, block.across.cut
    per_tile, per_target, per_row, item = matrix.strides
    sign = -1 if block.mirrored else 1
    corner = (patch_y - 1) * per_row if block.mirrored else 0
    strides = (
        sign * per_row,
        sign * item,
        per_tile,
        columns * per_target + per_row,
        per_target + item,
    )
    q = 0
    while q < patch_x:
        first = (patch_x - 1 - q if block.mirrored else q) - cut
        low, high = max(0, -first), min(columns, width - first)
        count = 1
        if low == 0 and high == columns:
            # As far as the last displacement that keeps the whole tile inside its window.
            count += min(patch_x - 1 - q, first if block.mirrored else width - columns - first)
        if low < high:
            shape = (patch_y, count, tiles.count, tiles.size, high - low)
            offset = corner + low * per_target + (first + low) * item
            view = np.ndarray(shape, matrix.dtype, matrix, offset, strides)
            yield slice(q, q + count), slice(low, high), view
        q += count


# Seconds per step, measured in float32; only their ratios matter for the choice.
MULTIPLY_ADD = 2.2e-11
PACKED_BY_BLAS = 4.5e-10
COPIED = 7e-10
COPIED_RUN = 8e-9
CALL = 1.5e-6
SHIFTED_MULTIPLY_ADD = 4.0e-10


@lru_cache(maxsize=4096)
def choose_tiling(channels: int, y: Band, x: Band, itemsize: int) -> Tiling:
    """Choose how to cut a phase pair, by a model of the cost of each possible way.

    Large tiles make efficient matrix products but compute much beside the band; for few channels
    or displacements one multiplication per displacement beats any tile.
    """
    rows = max(1, min(y.count1, (1 << 17) // (itemsize * channels * x.count1)))
    shifts = y.count_patch * x.count_patch
    best = Tiling(rows, x.count1, as_matrix=False)
    best_cost = shifts * (
        3 * CALL * -(-y.count1 // rows) + y.count1 * x.count1 * channels * SHIFTED_MULTIPLY_ADD
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
