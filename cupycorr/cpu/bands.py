"""Banded products on the CPU: tiles of matrix products, or one multiplication per displacement.

The core of the NumPy engine. For one pair of phases (`lattice.Phase`), every position m and
displacement p, both two-dimensional::

    volume[p, m] = sum_c map1[c, m] * map2[c, m + p + shift]
    grad1[c, m]  = sum_p volume[p, m] * map2[c, m + p + shift]
    grad2[c, j]  = sum_p volume[p, m] * map1[c, m],   m = j - p - shift

Positions that do not exist contribute nothing. The targets (m in the first two lines, j in the
third) are cut into *tiles*; the *source block* of a tile holds the source positions that it meets.
The matrix of all products of a tile's source block with its targets holds the wanted ones on
diagonals, its *band*: a target (row, column) and a displacement (p, q) stand for the source
position (row + p, column + q), counted from the corner of the source block::

    source 0   x . .
    source 1   x x .
    source 2   x x x        three targets, three displacements
    source 3   . x x
    source 4   . . x

For the gradients the band is filled, zeros elsewhere, and multiplied with the source block. Seen
from the second map displacements run backwards, (row - p + P - 1, column - q + Q - 1): *mirrored*.

Sources are packed with their columns in reverse. Then a step to the next target moves in memory a
little less far than a step to the next displacement, and NumPy, which runs copies along the axis
of the smallest step, copies bands along the targets, in which the volume is contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from types import EllipsisType
from typing import Any

import numpy as np
import numpy.typing as npt

from cupycorr.cpu.plan import VECTOR, Block, Tiles, rows_at_once, spans, split
from cupycorr.cpu.threads import Scratch

Array = npt.NDArray[Any]

BAND_TARGETS = 1024
"""Targets whose bands are copied at a time: so few that the cache still holds the lines that one
displacement has read when the next displacement reads them."""


def multiply(
    blocks: tuple[Block, ...],
    tiles: Tiles,
    n: slice,
    all_targets: list[Array],
    sources: list[Array],
    values: list[Array],
    scratch: Scratch,
) -> None:
    """Write the products of some rows of tiles of all blocks, and of samples n, into the volume.

    Each block has its arrays. Targets and sources (N, tile, C, rows, columns) have the rows and
    columns of the block's target_shape and source_shape, the sources' columns in reverse. For
    matrix products the targets are contiguous, and the sources with rows before channels. Values,
    the volume (N, P, Q, rows, columns), cover all targets of the block; with shifts they must be
    zero where a displacement leads out of the map.
    """
    for number, block in enumerate(blocks):
        targets, source, volume = all_targets[number][n], sources[number][n], values[number][n]
        if not block.as_matrix:
            one, two = targets[:, 0], source[:, 0, ..., ::-1]
            for p, q, here, there in _shifts(block, tiles):
                np.einsum("ncyx,ncyx->nyx", one[here], two[there], out=volume[:, p, q][here])
            continue
        if 0 in (tiles.extent, block.across.extent):
            volume[:, :, :, tiles.targets] = 0
            continue
        dense, full, inside = _matrices(
            "products", len(volume), block, tiles, source.dtype, scratch
        )
        one = _row_view(source, tiles)
        two = _tile_view(targets, tiles.start, tiles, tiles.size)[:, :, :, None]
        for factor, other, out in small_products(one, two, dense):
            np.matmul(factor, other, out=out)
        if dense.shape != full.shape:
            full[:, :, :, inside[0], inside[1]] = dense
            full[:, :, :, : inside[0].start] = 0
            full[:, :, :, inside[0].stop :] = 0
        for cells, band in _band(block, tiles, volume, full):
            cells[...] = band


def multiply_adjoint(
    blocks: tuple[Block, ...],
    tiles: Tiles,
    n: slice,
    values: list[Array],
    sources: list[Array],
    results: list[Array],
    scratch: Scratch,
) -> None:
    """Write the gradients with respect to some rows of tiles, from the volume's gradient.

    Values (N, P, Q, rows, columns) give for each displacement and target what belongs to it.
    Sources and results (N, tile, C, rows, columns) have the rows and columns of the block's
    source_shape, columns in reverse, and target_shape; for matrix products they are contiguous.
    Zeros beside the band are multiplied too, so a result is right only where it is finite;
    `multiply_adjoint_by_shifts` is right everywhere.
    """
    for number, block in enumerate(blocks):
        volume, source, result = values[number][n], sources[number][n], results[number][n]
        if not block.as_matrix:
            multiply_adjoint_by_shifts(block, tiles, volume, source, result, scratch)
            continue
        if 0 in (tiles.extent, block.across.extent):
            result[..., tiles.targets, :] = 0
            continue
        dense, full, inside = _matrices("band", len(volume), block, tiles, source.dtype, scratch)
        for cells, band in _band(block, tiles, volume, full):
            band[...] = cells
        if dense.shape != full.shape:
            dense[...] = full[:, :, :, inside[0], inside[1]]
        one = _tile_view(source, tiles.source, tiles, tiles.extent)
        two = dense.reshape(*dense.shape[:3], -1, dense.shape[5])
        results_of_tiles = _tile_view(result, tiles.start, tiles, tiles.size)
        for factor, other, out in small_products(one, two, results_of_tiles):
            np.matmul(factor, other, out=out)


def small_products(
    one: Array, two: Array, out: Array, *, even: bool = False
) -> list[tuple[Array, Array, Array]]:
    """Cut matrix products (..., M, N) into some that BLAS computes on one thread.

    Each has a few rows (`plan.rows_at_once`). One that has a single row or column is the product
    of a matrix and a vector, which BLAS shares out sooner. With ``even``, all have equally many
    rows where these are not much fewer: one call takes less time than two, if both are short.
    """
    (rows, terms), columns = one.shape[-2:], two.shape[-1]
    size = rows_at_once(terms * columns) if columns > 1 else max(1, VECTOR // terms)
    if 1 < rows <= size:
        return [(one, two, out)]
    if even and rows > 1:
        size = next((n for n in range(size, 2 * size // 3, -1) if rows % n == 0), size)
    whole = rows // size * size if rows > 1 else 0
    products = []
    if whole:
        equal = one[..., :whole, :].reshape(*one.shape[:-2], -1, size, terms)
        place = out[..., :whole, :].reshape(*out.shape[:-2], -1, size, columns)
        products.append((equal, two[..., None, :, :], place))
    at_once = columns if rows - whole > 1 else max(1, VECTOR // terms)
    for part in spans(columns, at_once) if whole < rows else ():
        products.append((one[..., whole:, :], two[..., part], out[..., whole:, part]))
    return products


def multiply_adjoint_by_shifts(
    block: Block, tiles: Tiles, volume: Array, source: Array, result: Array, scratch: Scratch
) -> None:
    """Do the work of `multiply_adjoint` for a block, without products of what does not meet."""
    result[..., tiles.targets, :] = 0
    for number in range(block.across.repeat):
        values = volume[..., number * block.across.size :]
        one, two = result[:, number], source[:, number, ..., ::-1]
        for p, q, here, there in _shifts(block, tiles):
            target = one[here]
            terms = scratch.take("terms", target.shape, target.dtype)
            np.multiply(values[:, p, q, None][here], two[there], out=terms)
            target += terms


_Index = tuple[EllipsisType, slice, slice]


def _shifts(block: Block, tiles: Tiles) -> Iterator[tuple[int, int, _Index, _Index]]:
    """Yield (p, q, targets, sources) of each displacement, as indices into one packed tile."""
    y, x, across = block.y, block.x, block.across
    wanted = tiles.targets
    for p in range(y.count_patch):
        down = (y.count_patch - 1 - p if block.mirrored else p) + y.shift
        low, high = max(wanted.start, -down), min(wanted.stop, y.count2 - down)
        if low >= high:
            continue
        for q in range(x.count_patch):
            right = (x.count_patch - 1 - q if block.mirrored else q) - across.cut
            left, end = max(0, -right), min(across.size, across.extent - right)
            if left < end:
                here = (..., slice(low, high), slice(left, end))
                there = (..., slice(low + down, high + down), slice(left + right, end + right))
                yield p, q, here, there


def _matrices(
    content: str, batch: int, block: Block, tiles: Tiles, dtype: np.dtype[Any], scratch: Scratch
) -> tuple[Array, Array, tuple[slice, slice]]:
    """Return two matrices, dense and full, and the place of the dense one in the full one.

    Both have the axes (N, tile across, tile down, source row, source column, target). The full
    matrix has room for the whole band. The dense matrix is the factor or the result of the product:
    it has only the source rows and columns that exist. Where all of them exist, it is the full one.

    In the full matrix, columns that do not exist are zero for "products"; for a "band" all cells
    beside the band are zero. Rows that do not exist may hold anything.
    """
    across = block.across
    rows, columns = tiles.size + block.y.count_patch - 1, across.size + block.x.count_patch - 1
    # Which cells are ever written depends on this, and on the shape.
    layout = (
        content,
        tiles.size,
        across.cut,
        across.extent,
        block.x.count_patch,
        block.mirrored,
    )
    tile = (batch, across.repeat, tiles.repeat)
    targets = tiles.size * across.size
    full = scratch.take_zeroed("full", (prod(tile), rows, columns, targets), dtype, layout)
    full = full.reshape(*tile, rows, columns, targets)
    last = columns - across.cut
    inside = slice(tiles.cut, tiles.cut + tiles.extent), slice(last - across.extent, last)
    if (tiles.extent, across.extent) == (rows, columns):
        return full, full, inside
    dense = scratch.take("dense", (*tile, tiles.extent, across.extent, targets), dtype)
    return dense, full, inside


def _tile_view(packed: Array, first_row: int, tiles: Tiles, rows: int) -> Array:
    """View packed tiles as (N, tile across, tile down, C, positions); source blocks overlap."""
    batch, across, channels, _, columns = packed.shape
    per_n, per_across, per_channel, per_row, item = packed.strides
    return np.ndarray(
        (batch, across, tiles.repeat, channels, rows * columns),
        packed.dtype,
        packed,
        first_row * per_row,
        (per_n, per_across, tiles.size * per_row, per_channel, item),
    )


def _row_view(packed: Array, tiles: Tiles) -> Array:
    """View packed source blocks as (N, tile across, tile down, row, column, C)."""
    packed = packed.swapaxes(2, 3)  # As it lies in memory.
    batch, across, _, channels, columns = packed.shape
    per_n, per_across, per_row, per_channel, item = packed.strides
    return np.ndarray(
        (batch, across, tiles.repeat, tiles.extent, columns, channels),
        packed.dtype,
        packed,
        tiles.source * per_row,
        (per_n, per_across, tiles.size * per_row, per_row, item, per_channel),
    )


def _band(
    block: Block, tiles: Tiles, volume: Array, matrix: Array
) -> Iterator[tuple[Array, Array]]:
    """Yield pairs of views: cells of the volume, and where they stand in the matrix's band.

    The axes are (N, p, q, tile down, row, tile across, column).
    """
    patch_y, patch_x = block.y.count_patch, block.x.count_patch
    across = block.across
    per_n, per_across, per_down, per_row, per_column, item = matrix.strides
    # The first target's column stands last; mirrored, its last displacement does.
    corner = (matrix.shape[4] - 1) * per_column
    sign = 1
    if block.mirrored:
        corner += (patch_y - 1) * per_row - (patch_x - 1) * per_column
        sign = -1
    strides = (
        per_n,
        sign * per_row,
        -sign * per_column,
        per_down,
        per_row + across.size * item,
        per_across,
        item - per_column,
    )
    for few in split(tiles, max(1, BAND_TARGETS // (tiles.size * across.size * across.repeat))):
        shape = (len(volume), patch_y, patch_x, few.repeat, tiles.size, across.repeat, across.size)
        offset = corner + (few.start - tiles.start) // tiles.size * per_down
        cells = np.ndarray(shape, matrix.dtype, matrix, offset, strides)
        yield volume[:, :, :, few.targets].reshape(shape), cells
