"""The cost volume of absolute differences, its subgradients and its tangent, on the CPU.

With zeros outside the maps, over all taps::

    cost    = sum of |fmap1 - fmap2|              s = sign(fmap1 - fmap2), 0 where equal or NaN
    tangent = sum of s * (tangent1 - tangent2)    grad_fmap1 = sum of s * grad_cost (fmap2: -s)

No matrix product computes this. The engine subtracts blocks of the maps, at several displacements
at a time, and sums them while they are in a cache. Maps are packed with columns of zeros beside
them, so that no block needs a border. Rows of zeros would be too many. A row of one map that meets
no row of the other adds the same terms at every displacement, so its sum is computed once
(``alone``). Many channels come last in memory: then displaced blocks are long runs at any spacing.

The engine trusts its arguments; arrays may have any strides. A uint16 array holds the bits of
bfloat16 numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from cupycorr.cpu.plan import VECTOR, spans
from cupycorr.cpu.taps import accumulator, spread_taps, store, sum_taps
from cupycorr.cpu.threads import Scratch, Team
from cupycorr.geometry import Geometry
from cupycorr.lattice import Lattice, lattices
from cupycorr.layer import Layer

Array = npt.NDArray[Any]
Lattices = tuple[Lattice, Lattice]

BLOCK_ELEMENTS = 1 << 20
"""Differences that are computed at a time. Threads wait for the interpreter between calls, so calls
should be long."""
VOLUME_ELEMENTS = 1 << 19
"""Sums that a thread holds before it stores them, unless one row has more."""
MAP_ELEMENTS = 1 << 22
"""Elements of a map that are packed at a time, unless one sample (for gradients: one channel) has
more."""
CHANNELS_LAST = 16
"""From so many channels on they come last in memory, and a product with ones sums them, which takes
half the time of a sum; above `plan.VECTOR` they are summed."""
CHANNELS_AT_ONCE = 64
"""A unit computes the gradients of at least so many channels, where there are so many."""
SAMPLE_ELEMENTS = 1 << 16
"""A unit computes the gradients of about so many elements of a map at least, and takes several
samples where one has fewer."""
UNITS = 8
"""Work is cut into about so many units, where it has so many parts, to keep some threads busy."""
WORK_OF_TERM = 8
"""A term takes about the time of so many multiply-adds of a matrix product."""


def grads(arrays: Mapping[str, Any], layer: Layer, threads: int | None) -> None:
    """Compute the subgradients; the parameters are those of `engine.run`."""
    fmap1, fmap2, grad_cost = arrays["fmap1"], arrays["fmap2"], arrays["grad_cost"]
    results = [arrays.get("grad_fmap1"), arrays.get("grad_fmap2")]
    geometry = layer.geometry
    batch, channels = fmap1.shape[:2]
    # Channels are independent of one another, as samples are.
    plane = prod(fmap1.shape[2:])
    at_once = max(CHANNELS_AT_ONCE, -(-channels // UNITS))
    at_once = max(1, min(at_once, MAP_ELEMENTS // plane))
    together = max(-(-batch // UNITS), SAMPLE_ELEMENTS // (at_once * plane))
    together = max(1, min(together, _samples((at_once, plane))))
    with Team(_work(fmap1.shape, grad_cost.shape, geometry), threads) as team:
        team.work(
            [
                partial(
                    _differentiate,
                    grad_cost[n],
                    (fmap1[n, part], fmap2[n, part]),
                    [None if grad is None else grad[n, part] for grad in results],
                    layer,
                    layer.divisor(channels),
                )
                for n in spans(batch, together)
                for part in spans(channels, at_once)
            ]
        )


def _work(shape: tuple[int, ...], cost_shape: tuple[int, ...], geometry: Geometry) -> int:
    """Estimate the work, in multiply-adds of a matrix product."""
    positions = min(prod(shape[2:]), prod(cost_shape[3:]) * geometry.taps)
    return WORK_OF_TERM * shape[1] * prod(cost_shape[:3]) * positions


def _samples(shape: tuple[int, ...]) -> int:
    """Return how many samples of this shape to take together."""
    return max(1, MAP_ELEMENTS // prod(shape))


class _Columns(NamedTuple):
    """The columns of packed maps: which displacements need any, and the zeros around the image."""

    patch: slice
    """The horizontal displacements that lead from somewhere into the image."""
    left: int
    width: int
    right: int

    @classmethod
    def of(cls, geometry: Geometry, width: int) -> _Columns:
        """Lay out maps of this width."""
        outputs = geometry.x.output_size(width)
        first = -geometry.padding[1]
        last = first + (outputs - 1) * geometry.stride[1] + geometry.taps_extent[1] - 1
        all_dx = geometry.displacements[1]
        meeting = [q for q, dx in enumerate(all_dx) if first + dx < width and last + dx >= 0]
        shifts = [0, *(all_dx[q] for q in meeting)]
        patch = slice(meeting[0], meeting[-1] + 1) if meeting else slice(0, 0)
        left = max(0, -first - min(shifts))
        return cls(patch, left, width, max(0, last + max(shifts) - width + 1))

    @property
    def total(self) -> int:
        """Number of columns of a packed map."""
        return self.left + self.width + self.right

    def at(self, positions: range, shift: int = 0) -> slice:
        """Return the columns of positions, moved by ``shift``."""
        first = self.left + positions.start + shift
        return slice(first, first + (len(positions) - 1) * positions.step + 1, positions.step)


# The volume, summed over channels.


def cost(arrays: Mapping[str, Any], layer: Layer, threads: int | None) -> None:
    """Compute the cost volume, or its change with "tangent1" and "tangent2" where they are given.

    The parameters are those of `engine.run`.
    """
    names = "fmap1", "fmap2", "tangent1", "tangent2"
    maps = tuple(arrays[name] for name in names if name in arrays)
    out = arrays["cost"]
    batch, channels, *size = maps[0].shape
    geometry, divisor = layer.geometry, layer.divisor(channels)
    dtype, columns = accumulator(out.dtype), _Columns.of(geometry, size[1])
    with Team(_work(maps[0].shape, out.shape, geometry), threads) as team:
        for samples in spans(batch, _samples(maps[0].shape[1:])):
            shape = (samples.stop - samples.start, size[0], columns.total, channels)
            packed = [
                _channels_last(team.arena, f"map {i}", shape, dtype) for i, _ in enumerate(maps)
            ]
            alone = [team.arena.take(f"alone {i}", shape[:3], dtype) for i in (1, 2)]
            team.work(
                [
                    partial(_prepare, maps[i::2], packed[i::2], alone[i], columns, samples, rows)
                    for i in (0, 1)
                    for rows in spans(size[0], -(-size[0] // UNITS))
                ]
            )
            team.work(
                [
                    partial(
                        _sum_rows,
                        packed,
                        alone,
                        out[samples, p, :, rows],
                        _lattices(geometry, size, rows),
                        columns,
                        (dy, geometry.displacements[1]),
                        divisor,
                    )
                    for p, dy in enumerate(geometry.displacements[0])
                    for rows in _rows(geometry, size, shape[0], -(-UNITS // out.shape[1]))
                ]
            )


def _prepare(
    maps: tuple[Array, ...],
    packed: list[Array],
    alone: Array,
    columns: _Columns,
    samples: slice,
    rows: slice,
    scratch: Scratch,
) -> None:
    """Pack rows of one map and of its tangent, and sum what its positions add alone."""
    for fmap, array in zip(maps, packed, strict=True):
        _pack(array[:, rows], fmap[samples, :, rows], columns)
    zero = np.zeros((1, 1, 1, 1), alone.dtype)
    channels = packed[0].shape[3]
    ones_of_channels = np.ones(channels, alone.dtype)
    for _, part, across in _blocks((1, *alone[:, rows].shape, channels)):
        values, *tangents = (array[:, rows][:, part, across] for array in packed)
        terms = _channels_last(scratch, "terms", values.shape, alone.dtype)
        if tangents:
            np.multiply(_sign(values, zero, scratch), tangents[0], out=terms)
        else:
            np.abs(values, out=terms)
        place = alone[:, rows][:, part, across]
        if CHANNELS_LAST <= channels <= VECTOR:
            np.matmul(terms, ones_of_channels, out=place)
        else:
            np.add.reduce(terms, axis=-1, out=place)


def _sum_rows(
    maps: list[Array],
    alone: list[Array],
    out: Array,
    all_lattices: list[Lattices],
    columns: _Columns,
    displacements: tuple[int, range],
    divisor: int,
    scratch: Scratch,
) -> None:
    """Compute rows of the cost volume, (N, PW, rows, OW), at one vertical displacement."""
    _, height, _, channels = maps[0].shape
    (dy, all_dx), patch = displacements, columns.patch
    count = patch.stop - patch.start
    ones_of_channels = np.ones(channels, maps[0].dtype)
    total: Array | None = None
    for y, x in all_lattices:
        volume = scratch.take("volume", (*out.shape[:2], y.size, x.size), maps[0].dtype)
        one, two, both = _meetings(y, height, dy)
        start = columns.at(x.positions)
        shifted = columns.at(x.positions, all_dx[patch.start] if count else 0)
        if _count(both) < y.size or count < len(all_dx):
            volume.fill(0)
            volume[:, :, one] = alone[0][:, None, _pixels(y, one), start]
            others = _displaced(alone[1][:, _pixels(y, two, dy)], shifted, all_dx.step, count)
            volume[:, patch, two] += others.swapaxes(0, 1)
        sums = volume[:, patch, both].swapaxes(0, 1)  # (Q, N, rows, columns), written below
        firsts = [array[None, :, _pixels(y, both), start] for array in maps[0::2]]
        seconds = [
            _displaced(array[:, _pixels(y, both, dy)], shifted, all_dx.step, count)
            for array in maps[1::2]
        ]
        for q, rows, across in _blocks((*sums.shape, channels)):
            ones = [array[:, :, rows, across] for array in firsts]
            twos = [array[q, :, rows, across] for array in seconds]
            shape = np.broadcast_shapes(ones[0].shape, twos[0].shape)
            terms = _channels_last(scratch, "terms", shape, volume.dtype)
            np.subtract(ones[-1], twos[-1], out=terms)
            if len(ones) == 1:
                np.abs(terms, out=terms)
            else:
                np.multiply(terms, _sign(ones[0], twos[0], scratch), out=terms)
            place = sums[q, :, rows, across]
            if CHANNELS_LAST <= channels <= VECTOR:
                np.matmul(terms, ones_of_channels, out=place)
            else:
                np.add.reduce(terms, axis=-1, out=place)
        sums = sum_taps(volume, y, x)
        total = sums if len(all_lattices) == 1 else sums + (0 if total is None else total)
    if total is not None:
        store(out, total, divisor)


# Subgradients.


def _differentiate(
    grad_cost: Array,
    maps: tuple[Array, Array],
    grads: list[Array | None],
    layer: Layer,
    divisor: int,
    scratch: Scratch,
) -> None:
    """Compute the subgradients of some channels of some samples."""
    geometry = layer.geometry
    dtype = accumulator(grad_cost.dtype)
    samples, channels, *size = maps[0].shape
    columns = _Columns.of(geometry, size[1])
    shape = samples, size[0], columns.total, channels
    packed = [_channels_last(scratch, f"map {i}", shape, dtype) for i in (1, 2)]
    sums = [
        None if grad is None else _channels_last(scratch, f"gradient {i}", shape, dtype)
        for i, grad in enumerate(grads)
    ]
    for array, fmap, total in zip(packed, maps, sums, strict=True):
        _pack(array, fmap, columns)
        if total is not None:
            total.fill(0)
    alone = [np.zeros(shape[:3], dtype) for _ in maps]
    for p, dy in enumerate(geometry.displacements[0]):
        for rows in _rows(geometry, size, samples, 1):
            for y, x in _lattices(geometry, size, rows):
                upstream = grad_cost[:, p, :, rows]
                volume = scratch.take("volume", (*upstream.shape[:2], y.size, x.size), dtype)
                spread_taps(volume, upstream, y, x)
                displacements = dy, geometry.displacements[1]
                _add_terms(packed, sums, alone, volume, (y, x), columns, displacements, scratch)
    image = slice(columns.left, columns.left + columns.width)
    zero = np.zeros((1, 1, 1, 1), dtype)
    for array, weight, total, grad in zip(packed, alone, sums, grads, strict=True):
        if total is not None and grad is not None:
            for rows in spans(size[0], max(1, BLOCK_ELEMENTS // prod(shape[2:]))):
                signs = _sign(array[:, rows], zero, scratch)
                total[:, rows] += signs * weight[:, rows, :, None]
            store(grad, total[:, :, image].transpose(0, 3, 1, 2), divisor)


def _add_terms(
    maps: list[Array],
    grads: list[Array | None],
    alone: list[Array],
    volume: Array,
    lattices: Lattices,
    columns: _Columns,
    displacements: tuple[int, range],
    scratch: Scratch,
) -> None:
    """Add what one vertical displacement contributes, given its gradient (N, PW, rows, columns).

    Where only one position exists, the gradient is added to ``alone``.
    """
    (y, x), (dy, all_dx), patch = lattices, displacements, columns.patch
    count = patch.stop - patch.start
    one, two, both = _meetings(y, maps[0].shape[1], dy)
    all_columns = [columns.at(x.positions, dx) for dx in all_dx[patch]]
    start = columns.at(x.positions)
    if _count(both) < y.size or count < len(all_dx):
        rest = volume.copy()
        rest[:, patch, both] = 0
        alone[0][:, _pixels(y, one), start] += rest[:, :, one].sum(1)
        for across, values in zip(all_columns, rest[:, patch].swapaxes(0, 1), strict=True):
            alone[1][:, _pixels(y, two, dy), across] += values[:, two]
    if not count:
        return
    upstream = volume[:, patch, both].swapaxes(0, 1)
    image1, image2 = _pixels(y, both), _pixels(y, both, dy)
    firsts = maps[0][None, :, image1, start]
    seconds = _displaced(maps[1][:, image2], all_columns[0], all_dx.step, count)
    for q, rows, across in _blocks((*upstream.shape, maps[0].shape[3])):
        signs = _sign(firsts[:, :, rows, across], seconds[q, :, rows, across], scratch)
        terms = _channels_last(scratch, "terms", signs.shape, volume.dtype)
        np.multiply(signs, upstream[q, :, rows, across, None], out=terms)
        if grads[0] is not None:
            grads[0][:, image1, start][:, rows, across] += np.add.reduce(terms, axis=0)
        if grads[1] is not None:
            for columns2, term in zip(all_columns[q], terms, strict=True):
                grads[1][:, image2, columns2][:, rows, across] -= term


# Blocks, and where they lie.


def _sign(one: Array, two: Array, scratch: Scratch) -> npt.NDArray[np.int8]:
    """Return the sign of one - two, 0 where a NaN is."""
    shape = np.broadcast_shapes(one.shape, two.shape)
    above, below = (
        _channels_last(scratch, name, shape, np.dtype(np.int8)) for name in ("above", "below")
    )
    np.greater(one, two, out=above.view(np.bool_))
    np.less(one, two, out=below.view(np.bool_))
    return np.subtract(above, below, out=above)


def _channels_last(
    memory: Scratch, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Array:
    """Return an array (..., H, W, C); in memory channels are last where they are many."""
    if shape[-1] >= CHANNELS_LAST:
        return memory.take(name, shape, dtype)
    *others, height, width, channels = shape
    return np.moveaxis(memory.take(name, (*others, channels, height, width), dtype), -3, -1)


def _pack(packed: Array, fmap: Array, columns: _Columns) -> None:
    """Copy a map (N, C, H, W) to an array (N, H, columns, C), with zeros beside it."""
    if fmap.dtype == np.uint16:
        fmap = np.left_shift(fmap, 16, dtype=np.uint32).view(np.float32)
    packed[:, :, : columns.left] = 0
    packed[:, :, columns.left + columns.width :] = 0
    packed[:, :, columns.left : columns.left + columns.width] = fmap.transpose(0, 2, 3, 1)


def _displaced(array: Array, columns: slice, spacing: int, count: int) -> Array:
    """View columns of an array (N, rows, columns, ...) at displacements, (Q, N, rows, ...)."""
    first = array[:, :, columns]
    strides = (spacing * array.strides[2], *first.strides)
    return as_strided(first, (count, *first.shape), strides, writeable=False)


def _rows(geometry: Geometry, size: Sequence[int], samples: int, pieces: int) -> tuple[slice, ...]:
    """Cut the output rows into pieces, more of them where their lattice would be too large."""
    rows, columns = geometry.output_size(*size)
    row = samples * geometry.patch_size[1] * geometry.x.lattice_size(columns)
    return spans(rows, max(1, min(-(-rows // pieces), VOLUME_ELEMENTS // row)))


def _lattices(geometry: Geometry, size: Sequence[int], rows: slice) -> list[Lattices]:
    """Return the lattices that hold the taps of some output rows."""
    y, x = geometry.y, geometry.x
    columns = x.output_size(size[1])
    return list(
        product(lattices(y, size[0], rows.start, rows.stop), lattices(x, size[1], 0, columns))
    )


def _meetings(lattice: Lattice, size: int, shift: int) -> tuple[slice, slice, slice]:
    """Return the lattice indices where one position, the other, and both lie on ``size`` pixels."""
    one, two = lattice.inside(size), lattice.inside(size, shift)
    start = max(one.start, two.start)
    return one, two, slice(start, max(start, min(one.stop, two.stop)))


def _count(part: slice) -> int:
    length: int = part.stop - part.start
    return length


def _pixels(lattice: Lattice, part: slice, shift: int = 0) -> slice:
    """Return the pixels of lattice indices, moved by ``shift``."""
    positions = lattice.positions[part]
    if not positions:
        return slice(0, 0)
    return slice(positions[0] + shift, positions[-1] + shift + 1, positions.step)


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice, slice]]:
    """Cut displaced maps (Q, N, rows, columns, C) into blocks (Q, rows, columns)."""
    patch, samples, rows, columns, channels = shape
    each = samples * channels
    across = max(1, min(columns, BLOCK_ELEMENTS // each, VECTOR // channels))
    across = -(-columns // -(-columns // across))
    together = max(1, min(patch, BLOCK_ELEMENTS // (each * across)))
    down = max(1, BLOCK_ELEMENTS // (each * across * together))
    # Displacements are fastest: they share what they read.
    for row, column, q in product(
        spans(rows, down), spans(columns, across), spans(patch, together)
    ):
        yield q, row, column
