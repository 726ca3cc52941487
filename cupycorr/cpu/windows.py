"""The windows of cells that positions read on a level, and products with them.

Positions are sorted by the block of cells that they look at, so that those of a block read within
one window, and their products with its cells are one product of matrices::

    window (cells, C)  times  columns of fmap1 (C, positions of the block)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupycorr.cpu.places import Places, is_finite
from cupycorr.cpu.plan import VECTOR
from cupycorr.cpu.threads import Scratch
from cupycorr.geometry import ceil_div
from cupycorr.lookup import Lookup

Array = npt.NDArray[Any]
Bin = tuple[int, int, int, int]

BLOCK, ROW_BLOCK = (4, 4), (1, 32)
"""Cells of a block; the second where every position reads one row of cells."""
CHUNK, CHUNK_CELLS = 1 << 12, 1 << 20
"""Most positions that are sorted together, and most products of them with a window's cells."""
WHOLE = 1 << 62
"""In place of `plan.PRODUCT`, where BLAS has one thread."""


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
    places : Places
        Where they look.
    lookup : Lookup
        What is looked up.
    product : int
        Most multiply-adds of one product of matrices.
    """

    def __init__(self, places: Places, lookup: Lookup, product: int) -> None:
        self.places, self._product = places, product
        (reach_y, reach_x), (y, x) = lookup.reach, (places.y, places.x)
        one_row = len(places.rows.offsets) == 1
        block = ROW_BLOCK if one_row else BLOCK
        self.shape = places.rows.extent + block[0] - 1, places.columns.extent + block[1] - 1
        """Rows and columns of a window."""
        # The first cell of a position is at least that of one that lies far outside.
        first_y, first_x = 2 * reach_y + 2, 2 * reach_x + 2
        by, bx = (y + first_y) // block[0], (x + first_x) // block[1]
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
        cells = (y - by * block[0] + first_y) * self.shape[1]
        cells += x - bx * block[1] + first_x
        self.first: npt.NDArray[np.intp] = cells.astype(np.intp)
        """Number of each position's first tap in its window."""

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
        taps = scratch.take("taps", self.places.shape, dtype)
        index = np.empty(count, np.intp)
        index[self.order] = np.arange(count)
        index += self.first * count
        flat = products.reshape(-1)
        for tap, row, column in self.places.taps():
            cells = flat[(row * self.shape[1] + column) * count :]
            np.take(cells, index, out=taps[tap], mode="clip")
        if not is_finite(taps):
            taps[~self.places.exist()] = 0
        return taps

    def cells(self, grad: Array, scale: float, part: slice, scratch: Scratch) -> Array:
        """Return the gradient at the windows' cells, (cells, m), zeros beside the taps.

        Parameters
        ----------
        grad, scale
            As for `Places.shares`.
        part : slice
            The positions that are wanted, in the order of `order`, which the result has too.
        scratch : Scratch
            Holds the result until this is called again.
        """
        shares = self.places.shares(grad, scale, self.order[part], scratch)
        count = shares.shape[2]
        cells = scratch.take("cells", (self.shape[0] * self.shape[1], count), shares.dtype)
        cells.fill(0)
        index, flat = self.first[self.order[part]] * count + np.arange(count), cells.reshape(-1)
        for tap, row, column in self.places.taps():
            flat[(row * self.shape[1] + column) * count :][index] = shares[tap]
        return cells

    def adjoint(self, grad: Array, scale: float, fmap: Array, out: Array, scratch: Scratch) -> None:
        """Write the gradient of the columns, (C, n) in the order of `order`.

        Parameters
        ----------
        grad, scale
            As for `Places.shares`.
        fmap : array (h, w, C)
            The level.
        out : array (C, n)
            The result.
        scratch : Scratch
            Memory for what lies between.
        """
        cells = self.cells(grad, scale, slice(None), scratch)
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
        shares = self.places.shares(grad, scale, self.order, scratch, careful=True)
        for tap, at, y, x in self.places.terms(self.order):
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
            As for `Places.shares`.
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
        if careful:
            order = self.order[part]
            shares = self.places.shares(grad, scale, order, scratch, careful)
            for tap, at, y, x in self.places.terms(order):
                np.add.at(sums, (y - low, x), (shares[tap][at] * columns[:, at]).T)
            return
        cells = self.cells(grad, scale, part, scratch)
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
