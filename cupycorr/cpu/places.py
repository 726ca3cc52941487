"""Where positions look on a level, and the interpolation between the cells that they read.

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

from cupycorr.cpu.threads import Scratch
from cupycorr.geometry import Pair
from cupycorr.lookup import Lookup

Array = npt.NDArray[Any]
Order = npt.NDArray[np.intp] | slice
"""Some of the positions, in some order."""
EVERYONE = slice(None)


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


class Places:
    """Where some positions look on one level.

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
    """

    def __init__(
        self, coords: Array, level: int, size: Pair, lookup: Lookup, one_row: bool
    ) -> None:
        (reach_y, reach_x), self.size = lookup.reach, size
        self.x, self.weight_x = _cells(coords[0], lookup.pool[1] ** level, reach_x, size[1])
        self.y, self.weight_y = _cells(coords[1], lookup.pool[0] ** level, reach_y, size[0])
        """First cell that each position reads, (n,), and the weight of the high taps."""
        one_row = one_row and reach_y == 0 and not self.weight_y.any()
        self.rows = _taps(lookup.radius[0], lookup.dilation_patch[0], one_row)
        self.columns = _taps(lookup.radius[1], lookup.dilation_patch[1], False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows and columns of taps, and positions."""
        return len(self.rows.offsets), len(self.columns.offsets), self.x.size

    def taps(self) -> Iterator[tuple[Pair, int, int]]:
        """List the taps: number of row and column, and cells from the first tap on."""
        for j, row in enumerate(self.rows.offsets):
            for i, column in enumerate(self.columns.offsets):
                yield (j, i), row, column

    def flat(self) -> npt.NDArray[np.intp]:
        """Return where each position's first tap is in maps of their own, (n, h, w)."""
        height, width = self.size
        return (np.arange(self.x.size) * height + self.y) * width + self.x

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
        self, grad: Array, scale: float, order: Order, scratch: Scratch, careful: bool = False
    ) -> Array:
        """Return the adjoint of `interpolate`: the gradient at the taps, (rows, columns, m).

        Parameters
        ----------
        grad : array (PH, PW, n)
            The gradient of the cost, positions as given.
        scale : float
            What costs are multiplied by.
        order : slice or array (m,) of int
            The positions that are wanted.
        scratch : Scratch
            Holds the result until this is called again.
        careful : bool, default False
            Whether weights of 0 make no terms of what is not finite.
        """
        # A position without a place reads cells that do not exist, with whatever weight.
        weight_y, weight_x = (np.nan_to_num(w[order]) for w in (self.weight_y, self.weight_x))
        grad = grad[:, :, order]
        shape = (*self.shape[:2], weight_x.size)
        rows = scratch.take("rows", (shape[0], *grad.shape[1:]), grad.dtype)
        _spread(self.rows, weight_y, scale, grad, rows, careful)
        taps = scratch.take("taps", shape, grad.dtype)
        across = rows.swapaxes(0, 1), taps.swapaxes(0, 1)
        _spread(self.columns, weight_x, 1, *across, careful)
        return taps

    def terms(self, order: Order) -> Iterator[tuple[Pair, Array, Array, Array]]:
        """List tap by tap which positions read an existing cell with some weight.

        Yields the tap, the positions' numbers in that order, and their cells' rows and columns.
        """
        exist, y, x = self.exist(order), self.y[order], self.x[order]
        used_y = _used(self.rows, self.weight_y[order])
        used_x = _used(self.columns, self.weight_x[order])
        for (j, i), row, column in self.taps():
            at = np.flatnonzero(exist[j, i] & used_y[j] & used_x[i])
            yield (j, i), at, y[at] + row, x[at] + column

    def exist(self, order: Order = EVERYONE) -> Array:
        """Tell which taps exist, (rows, columns, m)."""
        inside = []
        for first, taps, size in zip(
            (self.y[order], self.x[order]), (self.rows, self.columns), self.size, strict=True
        ):
            cells = first + np.array(taps.offsets)[:, None]
            inside.append((cells >= 0) & (cells < size))
        exist: Array = inside[0][:, None] & inside[1]
        return exist


def by_rows(cost: Array, lookup: Lookup) -> Array:
    """Return a cost, or its gradient, as (N, levels, PH, PW, P) in either order."""
    cost = cost.reshape(*cost.shape[:4], -1)
    return cost.swapaxes(2, 3) if lookup.x_first else cost


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
