"""Banded products on the CPU: tiles of matrix products, or one multiplication per displacement.

The core of the NumPy engine. For one pair of phases (see `geometry.Phase`) and every position m
and displacement p, both two-dimensional::

    volume[n, p, m] = sum_c map1[n, c, m] * map2[n, c, m + p + shift]
    grad1[n, c, m]  = sum_p volume[n, p, m] * map2[n, c, m + p + shift]
    grad2[n, c, j]  = sum_p volume[n, p, m] * map1[n, c, m],   m = j - p - shift

Positions that do not exist contribute nothing, and volume entries without a partner are zero.
A *tile* is a block of targets (m for the first two lines, j for the third); its *window* is the
block of source positions that they meet. The matrix of all products of a tile and its window
holds the wanted ones on its diagonals (the *band*): element (p, m) stands in row m, column m + p.

The functions return *units*: independent pieces of work, each writing its own part of the
result, so that they can run on any thread in any order and give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from cupycorr.geometry import Band

Array = npt.NDArray[np.generic]
Unit = Callable[["Scratch"], None]


class Tiling(NamedTuple):
    """How a phase is cut: targets per tile (rows, columns) and rows per unit of work."""

    rows: int
    columns: int
    unit_rows: int


class Tiles(NamedTuple):
    """``count`` tiles, one below the other, that lie alike in their windows."""

    start: int
    size: int
    count: int
    window: int
    """First source position of the first tile."""
    extent: int
    """Source positions per tile that exist."""
    cut: int
    """Source positions before ``window`` that the tile would meet but do not exist."""


class Scratch:
    """The buffers of one thread, reused from unit to unit."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}
        self._zeroed: object = None

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """Return an uninitialised contiguous array; it lives until the name is taken again."""
        size = 1
        for n in shape:
            size *= n
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size or buffer.dtype != dtype:
            self._buffers[name] = buffer = np.empty(size, dtype)
            self._zeroed = None
        return np.ndarray(shape, dtype, buffer)

    def take_zeroed(self, shape: tuple[int, ...], dtype: np.dtype, layout: object) -> Array:
        """Return an array that is zero, but for cells that this ``layout`` overwrites anyway."""
        array = self.take("band", shape, dtype)
        if self._zeroed != (shape, layout):
            array.fill(0)
            self._zeroed = shape, layout
        return array


# Seconds, measured with float32 on two x86 machines; only ratios matter for the choice.
MULTIPLY_ADD = 2.2e-11
PACKED_BY_BLAS = 4.5e-10
COPIED = 5e-10
COPIED_RUN = 8e-9
CALL = 1.2e-6
BLAS_CALL = 6e-7
UNIT = 3e-5
BAND_BYTES = 1 << 20
PACK_BYTES = 1 << 20
"""Targets for the size of one band matrix and one packed window: within a core's L2 or so."""


@lru_cache(maxsize=4096)
def choose_tiling(channels: int, y: Band, x: Band, itemsize: int) -> Tiling | None:
    """Choose the cheapest tiling of a phase by a cost model; None if shifts are cheaper."""
    best, best_cost = None, _cost_of_shifts(channels, y, x)
    for columns in _sizes(x.count1):
        across = [cover for cover in _cover(x, 0, x.count1, columns)]
        tiles_x = sum(t.count for t in across)
        window_x = sum(t.count * t.extent for t in across)
        for rows in _sizes(y.count1):
            cells = rows * columns
            width = min(columns + x.count_patch - 1, x.count2)
            if cells * (rows + y.count_patch - 1) * width * itemsize > BAND_BYTES and cells > 1:
                continue
            down = _cover(y, 0, y.count1, rows)
            tiles_y = sum(t.count for t in down)
            window_y = sum(t.count * t.extent for t in down)
            products = cells * window_x * window_y * channels
            packed = channels * (
                cells * tiles_x * tiles_y + window_x * window_y
            )
            copied = channels * (y.count1 * x.count1 + y.count2 * window_x)
            runs = channels * (y.count1 + y.count2) * tiles_x
            band = y.count1 * x.count1 * y.count_patch * x.count_patch
            band_runs = band // columns
            calls = len(down) * tiles_x * 6
            cost = (
                products * MULTIPLY_ADD
                + packed * PACKED_BY_BLAS
                + (copied + band) * COPIED
                + (runs + band_runs) * COPIED_RUN
                + calls * CALL
                + tiles_x * tiles_y * BLAS_CALL
                + tiles_x * UNIT
            )
            if cost < best_cost:
                window_row = channels * width * itemsize
                unit_rows = max(2 * y.count_patch, PACK_BYTES // window_row, rows)
                unit_rows = min(y.count1, -(-unit_rows // rows) * rows)
                best, best_cost = Tiling(rows, columns, unit_rows), cost
    return best


def _cost_of_shifts(channels: int, y: Band, x: Band) -> float:
    displacements = y.count_patch * x.count_patch
    return displacements * (3 * CALL + y.count1 * x.count1 * channels * 5e-10)


@lru_cache(maxsize=256)
def _sizes(count: int) -> tuple[int, ...]:
    """Tile sizes worth trying: those that divide ``count`` positions evenly among tiles."""
    wanted = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128)
    return tuple(sorted({-(-count // -(-count // min(size, count))) for size in wanted}))


def _cover(band: Band, start: int, stop: int, size: int) -> list[Tiles]:
    """Cover the targets [start, stop) with tiles; the last one overlaps the one before it."""
    size = min(size, stop - start)
    found: list[Tiles] = []
    begin = start
    while begin < stop:
        begin = min(begin, stop - size)
        virtual = begin + band.shift
        low = max(0, virtual)
        high = min(band.count2, virtual + size - 1 + band.count_patch)
        tile = Tiles(begin, size, 1, low, max(0, high - low), low - virtual)
        if found:
            last = found[-1]
            regular = begin == last.start + last.count * size
            alike = (last.extent, last.cut) == (tile.extent, tile.cut) == (tile.extent, 0)
            if regular and alike:
                found[-1] = last._replace(count=last.count + 1)
                begin += size
                continue
        found.append(tile)
        begin += size
    return found


class Block(NamedTuple):
    """One unit's targets: some rows of tiles, one column of tiles, and their common window."""

    y: Band
    x: Band
    rows: slice
    window_rows: slice
    down: list[Tiles]
    across: Tiles

    @property
    def columns(self) -> slice:
        return slice(self.across.start, self.across.start + self.across.size)

    @property
    def window_columns(self) -> slice:
        return slice(self.across.window, self.across.window + self.across.extent)


def _blocks(y: Band, x: Band, tiling: Tiling) -> list[Block]:
    blocks = []
    for start in range(0, y.count1, tiling.unit_rows):
        rows = slice(start, min(y.count1, start + tiling.unit_rows))
        down = _cover(y, rows.start, rows.stop, tiling.rows)
        ends = [t.window + (t.count - 1) * t.size + t.extent for t in down]
        window_rows = slice(min(t.window for t in down), max(ends))
        for column in range(0, x.count1, tiling.columns):
            stop = min(x.count1, column + tiling.columns)
            (across,) = _cover(x, column, stop, tiling.columns)
            blocks.append(Block(y, x, rows, window_rows, down, across))
    return blocks


def _band_parts(block: Block, tiles: Tiles, matrix: Array, mirrored: bool):
    """Yield (displacement columns q, target columns, view of the band) with the band's cells.

    ``matrix`` has the shape (tiles, targets, source rows, source columns). The views have the
    axes (p, q, tile, row, column). Where the window is cut off on the left or the right, each
    partly valid q comes by itself.
    """
    across, patch_y, patch_x = block.across, block.y.count_patch, block.x.count_patch
    width = across.extent
    per_tile, per_target, per_row, item = matrix.strides
    sign = -1 if mirrored else 1
    base = (patch_y - 1) * per_row if mirrored else 0
    strides = (
        sign * per_row, sign * item, per_tile, across.size * per_target + per_row,
        per_target + item,
    )

    def part(q: int, count: int, low: int, high: int):
        first = (patch_x - 1 - q if mirrored else q) + low - across.cut
        view = np.ndarray(
            (patch_y, count, matrix.shape[0], tiles.size, high - low),
            matrix.dtype, matrix, base + low * per_target + first * item, strides,
        )
        return slice(q, q + count), slice(low, high), view

    q = 0
    while q < patch_x:
        first = (patch_x - 1 - q if mirrored else q) - across.cut
        low, high = max(0, -first), min(across.size, width - first)
        count = 1
        if low == 0 and high == across.size:
            while q + count < patch_x:
                first -= 1 if mirrored else -1
                if first < 0 or first + across.size > width:
                    break
                count += 1
        if low < high:
            yield part(q, count, low, high)
        else:
            yield slice(q, q + 1), slice(0, 0), None
        q += count


def volume_units(map1: Array, map2: Array, volume: Array, y: Band, x: Band, accumulate_dtype, divisor: int = 1) -> list[Unit]:
    """Return the units of ``volume[n, p, q, my, mx]``; the maps are (n, C, y, x)."""
    channels = map1.shape[1]
    tiling = choose_tiling(channels, y, x, volume.itemsize)
    if tiling is None:
        raise NotImplementedError

    def unit(n: int, block: Block) -> Unit:
        return lambda scratch: _multiply_block(
            map1[n], map2[n], volume[n], block, divisor, scratch
        )

    return [unit(n, block) for n in range(map1.shape[0]) for block in _blocks(y, x, tiling)]


def _multiply_block(map1: Array, map2: Array, volume: Array, block: Block, divisor: int, scratch: Scratch) -> None:
    left, right = _pack(map1, map2, block, volume.dtype, scratch)
    channels, rows, columns = left.shape
    item = left.itemsize
    width = block.across.extent
    for tiles in block.down:
        virtual = tiles.size + block.y.count_patch - 1
        targets = tiles.size * columns
        at_once = max(1, BAND_BYTES // (targets * virtual * width * item))
        for done in range(0, tiles.count, at_once):
            count = min(at_once, tiles.count - done)
            row = tiles.start + done * tiles.size - block.rows.start
            top = tiles.window + done * tiles.size - block.window_rows.start
            matrix = scratch.take("band", (count, targets, virtual * width), volume.dtype)
            lhs = np.ndarray(
                (count, targets, channels), left.dtype, left, row * columns * item,
                (targets * item, item, rows * columns * item),
            )
            rhs = np.ndarray(
                (count, channels, tiles.extent * width), right.dtype, right,
                top * width * item,
                (tiles.size * width * item, right.strides[0], item),
            )
            before = tiles.cut * width
            after = before + tiles.extent * width
            np.matmul(lhs, rhs, out=matrix[:, :, before:after])
            matrix[:, :, :before] = 0
            matrix[:, :, after:] = 0
            matrix = matrix.reshape(count, targets, virtual, width)
            target = volume[:, :, row + block.rows.start:][:, :, :count * tiles.size, block.columns]
            target = target.reshape(*target.shape[:2], count, tiles.size, columns)
            for q, span, view in _band_parts(block, tiles, matrix, mirrored=False):
                if span.start > 0 or view is None:
                    target[:, q, :, :, : span.start] = 0
                if span.stop < columns:
                    target[:, q, :, :, span.stop :] = 0
                if view is not None:
                    if divisor == 1:
                        target[:, q, :, :, span] = view
                    else:
                        np.divide(view, divisor, out=target[:, q, :, :, span])


def _pack(map1: Array, map2: Array, block: Block, dtype, scratch: Scratch):
    source1 = map1[:, block.rows, block.columns]
    source2 = map2[:, block.window_rows, block.window_columns]
    left = scratch.take("left", source1.shape, dtype)
    right = scratch.take("right", source2.shape, dtype)
    np.copyto(left, source1)
    np.copyto(right, source2)
    return left, right
