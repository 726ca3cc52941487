"""Where positions look on a level, and the windows of cells that they read.

Positions are sorted by the block of cells that they look at, so that those of a block read within
one window, and their products with its cells are one product of matrices::

    window (cells, C)  times  columns of fmap1 (C, positions of the block)

A position's *taps* are the cells that it reads, and what belongs to them: two neighbours, the low
and the high, for each displacement and axis, of which each may be those of two displacements.

    taps           0   1   2   3   4   5          radius 2, spacing 1: the low taps are
    displacement  -2  -1   0  +1  +2              0 ... 4, the high ones 1 ... 5
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupycorr.cpu.plan import VECTOR
from cupycorr.cpu.threads import Scratch
from cupycorr.geometry import Pair, ceil_div
from cupycorr.lookup import Lookup

Array = npt.NDArray[Any]
Bin = tuple[int, int, int, int]

BLOCK, ROW_BLOCK = (4, 4), (1, 32)
"""Cells of a block; the second where every position reads one row of cells."""
CHUNK, CHUNK_CELLS = 1 << 12, 1 << 20
"""Most positions that are sorted together, and most products of them with a window's cells."""
WHOLE = 1 << 62
"""In place of `plan.PRODUCT`, where BLAS has one thread."""


class Taps(NamedTuple):
    """The taps along one axis."""

    offsets: tuple[int, ...]
    """Cells from the first tap on."""
    low: slice
    """The taps that displacements have on their low side."""
    high: slice

    @property
    def extent(self) -> int:
        """Cells from the first to the last tap, both included."""
        return self.offsets[-1] + 1


def _taps(radius: int, spacing: int, alone: bool) -> Taps:
    if alone:
        return Taps((0,), slice(0, 1), slice(0, 0))
    if spacing == 1:
        return Taps(tuple(range(2 * radius + 2)), slice(0, -1), slice(1, None))
    offsets = (i * spacing + corner for i in range(2 * radius + 1) for corner in (0, 1))
    return Taps(tuple(offsets), slice(0, None, 2), slice(1, None, 2))


def window_cells(lookup: Lookup) -> int:
    """Return how many cells a window has at most."""
    y, x = lookup.reach
    one = (2 * y + 2 + BLOCK[0] - 1) * (2 * x + 2 + BLOCK[1] - 1)
    return one if y > 0 else max(one, 2 * x + 2 + ROW_BLOCK[1] - 1)


def chunk_size(lookup: Lookup) -> int:
    """Return how many positions are sorted together at most."""
    return max(1, min(CHUNK, CHUNK_CELLS // window_cells(lookup)))


class Window(NamedTuple):
    """What exists of the cells of one window; without any, ``last`` is 0."""

    cells: Array
    """Whole rows of it, (cells, C); columns that do not exist are zeros, or if there is only one
    row, left out."""
    first: int
    last: int
    """The number of the first of those cells, and of the one behind the last."""
    place: tuple[slice, slice]
    """The rows and columns of the level that exist."""
    inside: slice
    """These columns, among those of the cells."""


class Windows:
    """The windows that some positions read on one level.

    Parameters
    ----------
    coords : array (2, n), float32|float64
        The positions' coordinates x and y, in cells of level 0.
    level : int
        The number of the level.
    size : (int, int)
        Its cells, (h, w).
    lookup : Lookup
        What is looked up.
    one_row : bool
        Whether a second row of cells may be left out where it has no weight.
    product : int
        Most multiply-adds of one product of matrices.
    """

    def __init__(
        self, coords: Array, level: int, size: Pair, lookup: Lookup, one_row: bool, product: int
    ) -> None:
        (reach_y, reach_x), self.size, self._product = lookup.reach, size, product
        self.x, self.weight_x = _cells(coords[0], lookup.pool[1] ** level, reach_x, size[1])
        self.y, self.weight_y = _cells(coords[1], lookup.pool[0] ** level, reach_y, size[0])
        """First cell that each position reads, (n,), and the weight of the high taps."""
        one_row = one_row and reach_y == 0 and not self.weight_y.any()
        self.rows = _taps(lookup.radius[0], lookup.dilation_patch[0], one_row)
        self.columns = _taps(lookup.radius[1], lookup.dilation_patch[1], False)
        block = ROW_BLOCK if one_row else BLOCK
        self.shape = self.rows.extent + block[0] - 1, self.columns.extent + block[1] - 1
        """Rows and columns of a window."""
        # The first cell of a position is at least that of one that lies far outside.
        first_y, first_x = 2 * reach_y + 2, 2 * reach_x + 2
        by, bx = (self.y + first_y) // block[0], (self.x + first_x) // block[1]
        across = int(bx.max()) + 1
        blocks = by * across + bx
        self.order: npt.NDArray[np.intp]
        """The positions, sorted by blocks."""
        # NumPy sorts short integers in linear time.
        short = blocks.astype(np.uint16) if int(blocks.max()) < 1 << 16 else blocks
        self.order = short.argsort(kind="stable")
        at = blocks[self.order]
        starts = np.flatnonzero(np.r_[True, at[1:] != at[:-1]])
        stops = np.r_[starts[1:], at.size]
        top = at[starts] // across * block[0] - first_y
        left = at[starts] % across * block[1] - first_x
        self.bins: list[Bin] = list(
            zip(*(part.tolist() for part in (starts, stops, top, left)), strict=True)
        )
        """Start and stop of each block's positions in that order, first row and column of its
        window."""
        cells = (self.y - by * block[0] + first_y) * self.shape[1]
        cells += self.x - bx * block[1] + first_x
        self.first: npt.NDArray[np.intp] = cells.astype(np.intp)
        """Number of each position's first tap in its window."""

    @property
    def taps_shape(self) -> tuple[int, int, int]:
        """Rows and columns of taps, and positions."""
        return len(self.rows.offsets), len(self.columns.offsets), self.order.size

    def window(
        self, fmap: Array, top: int, left: int, scratch: Scratch, empty: bool = False
    ) -> Window:
        """Return the cells of the window at a row and a column of a level (h, w, C).

        If ``empty``, the cells have no values yet, and are nobody else's.
        """
        (height, width, channels), (rows, columns) = fmap.shape, self.shape
        first, last = max(0, -top), min(rows, height - top)
        begin, end = max(0, -left), min(columns, width - left)
        place = slice(top + first, top + last), slice(left + begin, left + end)
        if first >= last or begin >= end:
            return Window(fmap[:0, 0], 0, 0, (slice(0), slice(0)), slice(0))
        if rows == 1 and not empty:
            return Window(fmap[top, place[1]], begin, end, place, slice(None))
        cells = scratch.take("window", (last - first, columns, channels), fmap.dtype)
        if not empty:
            cells[:, :begin] = 0
            cells[:, end:] = 0
            cells[:, begin:end] = fmap[place]
        flat = cells.reshape(-1, channels)
        return Window(flat, first * columns, last * columns, place, slice(begin, end))

    def values(self, fmap: Array, columns: Array, scratch: Scratch) -> Array:
        """Return the products at each position's taps, (rows, columns, n), positions as given.

        Parameters
        ----------
        fmap : array (h, w, C)
            The level.
        columns : array (C, n)
            The positions' vectors in fmap1, in the order of `order`.
        scratch : Scratch
            Holds the result until this is called again.
        """
        count, dtype = self.order.size, columns.dtype
        products = scratch.take("cells", (self.shape[0] * self.shape[1], count), dtype)
        for start, stop, top, left in self.bins:
            window = self.window(fmap, top, left, scratch)
            products[: window.first, start:stop] = 0
            products[window.last :, start:stop] = 0
            if window.last:
                part = products[window.first : window.last, start:stop]
                self._multiply(window.cells, columns[:, start:stop], part)
        taps = scratch.take("taps", self.taps_shape, dtype)
        index = np.empty(count, np.intp)
        index[self.order] = np.arange(count)
        index += self.first * count
        flat = products.reshape(-1)
        for j, row in enumerate(self.rows.offsets):
            for i, column in enumerate(self.columns.offsets):
                cells = flat[(row * self.shape[1] + column) * count :]
                np.take(cells, index, out=taps[j, i], mode="clip")
        if not is_finite(taps):
            taps[~self._exist(slice(None))] = 0
        return taps

    def interpolate(self, taps: Array, scale: float, out: Array, scratch: Scratch) -> None:
        """Write the cost (PH, PW, n) of the values at the taps, which are lost."""
        careful = not is_finite(taps)
        rows = scratch.take("rows", (taps.shape[0], *out.shape[1:]), taps.dtype)
        across = taps.swapaxes(0, 1), rows.swapaxes(0, 1)
        _mix(self.columns, self.weight_x, 1, *across, careful)
        _mix(self.rows, self.weight_y, scale, rows, out, careful)

    def slopes(self, taps: Array) -> tuple[Array, Array]:
        """Return how the cost, without its scale, changes with x and with y, (PH, PW, n) each."""
        careful = not is_finite(taps)
        change_x = taps[:, self.columns.high] - taps[:, self.columns.low]
        change_y = taps[self.rows.high] - taps[self.rows.low]
        count_y, count_x = change_y.shape[0], change_x.shape[1]
        slope_x, slope_y = np.empty((2, count_y, count_x, taps.shape[2]), taps.dtype)
        _mix(self.rows, self.weight_y, 1, change_x, slope_x, careful)
        across = change_y.swapaxes(0, 1), slope_y.swapaxes(0, 1)
        _mix(self.columns, self.weight_x, 1, *across, careful)
        return slope_x, slope_y

    def shares(
        self, grad: Array, scale: float, part: slice, scratch: Scratch, careful: bool = False
    ) -> Array:
        """Return the adjoint of `interpolate`: the gradient at the taps, (rows, columns, m).

        Parameters
        ----------
        grad : array (PH, PW, n)
            The gradient of the cost, positions as given.
        scale : float
            What costs are multiplied by.
        part : slice
            The positions that are wanted, in the order of `order`, which the result has too.
        scratch : Scratch
            Holds the result until this is called again.
        careful : bool, default False
            Whether weights of 0 make no terms of what is not finite.
        """
        order = self.order[part]
        # A position without a place reads cells that do not exist, with whatever weight.
        weight_y, weight_x = (np.nan_to_num(w[order]) for w in (self.weight_y, self.weight_x))
        grad = grad[:, :, order].astype(weight_x.dtype, copy=False)
        shape = (*self.taps_shape[:2], order.size)
        rows = scratch.take("rows", (shape[0], *grad.shape[1:]), grad.dtype)
        _spread(self.rows, weight_y, scale, grad, rows, careful)
        taps = scratch.take("taps", shape, grad.dtype)
        across = rows.swapaxes(0, 1), taps.swapaxes(0, 1)
        _spread(self.columns, weight_x, 1, *across, careful)
        return taps

    def cells(self, shares: Array, part: slice, scratch: Scratch) -> Array:
        """Return `shares` at their places in the windows, (cells, m), zeros elsewhere."""
        count = shares.shape[2]
        cells = scratch.take("cells", (self.shape[0] * self.shape[1], count), shares.dtype)
        cells.fill(0)
        index, flat = self.first[self.order[part]] * count + np.arange(count), cells.reshape(-1)
        for j, row in enumerate(self.rows.offsets):
            for i, column in enumerate(self.columns.offsets):
                flat[(row * self.shape[1] + column) * count :][index] = shares[j, i]
        return cells

    def adjoint(self, grad: Array, scale: float, fmap: Array, out: Array, scratch: Scratch) -> None:
        """Write the gradient of the columns, (C, n) in the order of `order`.

        Parameters
        ----------
        grad, scale
            As for `shares`.
        fmap : array (h, w, C)
            The level.
        out : array (C, n)
            The result.
        scratch : Scratch
            Memory for what lies between.
        """
        everyone = slice(None)
        cells = self.cells(self.shares(grad, scale, everyone, scratch), everyone, scratch)
        for start, stop, top, left in self.bins:
            window = self.window(fmap, top, left, scratch)
            if window.last:
                part = cells[window.first : window.last, start:stop]
                self._multiply(window.cells.T, part, out[:, start:stop])
            else:
                out[:, start:stop] = 0
        if is_finite(out):
            return
        out.fill(0)
        shares = self.shares(grad, scale, everyone, scratch, careful=True)
        for tap, at, y, x in self._terms(everyone):
            out[:, at] += (shares[tap][at, None] * fmap[y, x]).T

    def add_adjoint(
        self,
        grad: Array,
        scale: float,
        columns: Array,
        bins: list[Bin],
        sums: Array,
        low: int,
        scratch: Scratch,
        careful: bool,
    ) -> None:
        """Add the gradient of some windows to rows of the level's.

        Parameters
        ----------
        grad, scale, careful
            As for `shares`.
        columns : array (C, m)
            The vectors in fmap1 of the positions of these windows, in the order of `order`.
        bins : list
            Some neighbours among `bins`.
        sums : array (rows, w, C)
            What is added to.
        low : int
            The number of its first row.
        scratch : Scratch
            Memory for what lies between.
        """
        begin = bins[0][0]
        part = slice(begin, bins[-1][1])
        shares = self.shares(grad, scale, part, scratch, careful)
        if careful:
            for tap, at, y, x in self._terms(part):
                np.add.at(sums, (y - low, x), (shares[tap][at] * columns[:, at]).T)
            return
        cells = self.cells(shares, part, scratch)
        for start, stop, top, left in bins:
            window = self.window(sums, top - low, left, scratch, empty=True)
            if window.last:
                own = slice(start - begin, stop - begin)
                self._multiply(
                    columns[:, own], cells[window.first : window.last, own].T, window.cells.T
                )
                rows, across = window.place
                target = sums[rows, across]
                target += window.cells.reshape(len(target), -1, len(columns))[:, window.inside]

    def _terms(self, part: slice) -> Iterator[tuple[Pair, Array, Array, Array]]:
        """List tap by tap which positions of a part read an existing cell with some weight.

        Yields the tap, the positions' numbers in that part, and their cells' rows and columns.
        """
        order = self.order[part]
        exist = self._exist(part)
        used_y = _used(self.rows, self.weight_y[order])
        used_x = _used(self.columns, self.weight_x[order])
        for j, row in enumerate(self.rows.offsets):
            for i, column in enumerate(self.columns.offsets):
                at = np.flatnonzero(exist[j, i] & used_y[j] & used_x[i])
                yield (j, i), at, self.y[order[at]] + row, self.x[order[at]] + column

    def _multiply(self, left: Array, right: Array, out: Array) -> None:
        """Multiply two matrices, some rows at a time, so that BLAS uses one thread."""
        rows, terms, columns = *left.shape, right.shape[1]
        most = (VECTOR if columns == 1 else self._product // columns) // terms
        if rows <= most or self._product == WHOLE:
            np.matmul(left, right, out=out)
        elif most < 8 <= columns:
            half = columns // 2
            self._multiply(left, right[:, :half], out[:, :half])
            self._multiply(left, right[:, half:], out[:, half:])
        else:
            # BLAS prefers multiples of 8 rows.
            even = ceil_div(rows, ceil_div(rows, max(1, most)))
            size = min(max(1, most - most % 8), ceil_div(even, 8) * 8)
            count = rows // size
            whole = count * size
            np.matmul(
                left[:whole].reshape(count, size, terms),
                right,
                out=out[:whole].reshape(count, size, columns),
            )
            if whole < rows:
                np.matmul(left[whole:], right, out=out[whole:])

    def _exist(self, part: slice) -> Array:
        """Tell which taps exist, (rows, columns, m); all positions as given, a part sorted."""
        order = slice(None) if part == slice(None) else self.order[part]
        inside = []
        for first, taps, size in zip(
            (self.y[order], self.x[order]), (self.rows, self.columns), self.size, strict=True
        ):
            cells = first + np.array(taps.offsets)[:, None]
            inside.append((cells >= 0) & (cells < size))
        exist: Array = inside[0][:, None] & inside[1]
        return exist


def is_finite(values: Array) -> bool:
    """Tell whether all values are finite, and not huge."""
    flat = values.reshape(-1)
    return bool(np.isfinite(np.dot(flat, flat)))


def _cells(coords: Array, divisor: int, reach: int, size: int) -> tuple[Array, Array]:
    """Return the first cell that each position reads along an axis, and its high taps' weight.

    Far outside all taps are outside, wherever it is; and so is what has no place at all.
    """
    level = np.clip(coords / coords.dtype.type(divisor), -reach - 2, size + reach + 1)
    floor = np.floor(level)
    weight = level - floor
    floor[np.isnan(floor)] = -reach - 2
    return floor.astype(np.int64) - reach, weight


def _used(taps: Taps, weight: Array) -> Array:
    """Tell which taps have any weight, (taps, n)."""
    used = np.zeros((len(taps.offsets), weight.size), bool)
    used[taps.low] |= weight != 1
    used[taps.high] |= weight != 0
    return used


def _mix(taps: Taps, weight: Array, scale: float, values: Array, out: Array, careful: bool) -> None:
    """Interpolate along the first axis: (taps, ..., n) to (displacements, ..., n).

    Values are lost. By a weighted sum of both: the round-off of a difference times a weight is not
    bounded by the weight.
    """
    low, high = _weights(weight, scale)
    np.multiply(values[taps.low], low, out=out)
    if careful:
        out[..., weight == 1] = 0
    if len(taps.offsets) > 1:
        values = values[taps.high]
        values *= high
        if careful:
            values[..., weight == 0] = 0
        out += values


def _spread(
    taps: Taps, weight: Array, scale: float, grad: Array, out: Array, careful: bool
) -> None:
    """Adjoint of `_mix`: (displacements, ..., n) to (taps, ..., n)."""
    low, high = _weights(weight, scale)
    out.fill(0)
    np.multiply(grad, low, out=out[taps.low])
    if careful:
        out[..., weight == 1] = 0
    if len(taps.offsets) > 1:
        part = grad * high
        if careful:
            part[..., weight == 0] = 0
        out[taps.high] += part


def _weights(weight: Array, scale: float) -> tuple[Array, Array]:
    """Return the weights of the low and the high taps, times a scale."""
    one, scale = weight.dtype.type(1), weight.dtype.type(scale)
    return (one - weight) * scale, weight * scale
