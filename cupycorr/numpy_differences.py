"""The cost volume of absolute differences, its subgradients and its tangent, on the CPU.

With zeros outside the maps, over all taps of the windows::

    cost    = sum of |fmap1 - fmap2|              s = sign(fmap1 - fmap2), 0 where equal or NaN
    tangent = sum of s * (tangent1 - tangent2)    grad_fmap1 = sum of s * grad_cost (fmap2: -s)

There is no matrix product in this: displacement by displacement, blocks of the maps are subtracted
that stay in the cache until they are summed. What a position adds that meets nothing is the same
for all displacements; it is worked out once, so that blocks need no border. Channels, where they
are many, come last in memory: then displaced blocks are long runs, whatever the spacings.

The engine trusts its arguments; arrays may have any strides. A uint16 array holds the bits of
bfloat16 numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from cupycorr.geometry import Geometry, Lattice
from cupycorr.numpy_plan import spans
from cupycorr.numpy_windows import accumulator, spread_taps, store, sum_taps
from cupycorr.parallel import Scratch, workers

Array = npt.NDArray[Any]
Part = tuple[slice, slice, slice]  # all samples, rows, columns
Lattices = tuple[Lattice, Lattice]

BLOCK_ELEMENTS = 1 << 14
"""Differences that are computed at a time."""
VOLUME_ELEMENTS = 1 << 19
"""Sums that a thread holds before it stores them, unless one row has more."""
MAP_ELEMENTS = 1 << 22
"""Samples are taken together while one of their maps has no more elements than this."""
CHANNELS_LAST = 16
"""Channels from which on they come last in memory."""
UNITS = 8
"""Pieces that work is cut into where it can be: enough for some threads."""
WORK_OF_TERM = 8
"""The time that a term takes, in multiply-adds of a matrix product."""


def forward(
    fmap1: Array,
    fmap2: Array,
    cost: Array,
    geometry: Geometry,
    *,
    divisor: int = 1,
    threads: int | None = None,
) -> None:
    """Compute the cost volume; the parameters are those of `numpy_engine.forward`."""
    _sum_volume((fmap1, fmap2), cost, geometry, divisor, threads)


def tangent(
    fmap1: Array,
    fmap2: Array,
    tangent1: Array,
    tangent2: Array,
    cost: Array,
    geometry: Geometry,
    *,
    divisor: int = 1,
    threads: int | None = None,
) -> None:
    """Compute how the cost volume changes with the maps.

    Parameters
    ----------
    tangent1, tangent2 : array (N, C, H, W), of the maps' dtype
        The changes of the maps.
    cost : array (N, PH, PW, OH, OW), of the maps' dtype
        Where the change of the cost volume is written.
    fmap1, fmap2, geometry, divisor, threads
        As for `numpy_engine.forward`.
    """
    _sum_volume((fmap1, fmap2, tangent1, tangent2), cost, geometry, divisor, threads)


def backward(
    grad_cost: Array,
    fmap1: Array,
    fmap2: Array,
    grad_fmap1: Array | None,
    grad_fmap2: Array | None,
    geometry: Geometry,
    *,
    divisor: int = 1,
    threads: int | None = None,
) -> None:
    """Compute the subgradients; the parameters are those of `numpy_engine.backward`."""
    grads = [grad_fmap1, grad_fmap2]
    if 0 in fmap1.shape:
        for grad in grads:
            if grad is not None:
                grad.fill(0)
        return
    batch, channels = fmap1.shape[:2]
    # Channels are independent of one another, as samples are.
    at_once = max(CHANNELS_LAST, -(-channels // UNITS))
    with workers(_work(fmap1.shape, grad_cost.shape, geometry), threads) as (run, _):
        run(
            [
                partial(
                    _differentiate,
                    grad_cost[n],
                    (fmap1[n, part], fmap2[n, part]),
                    [None if grad is None else grad[n, part] for grad in grads],
                    geometry,
                    divisor,
                )
                for n in spans(batch, _samples((at_once, *fmap1.shape[2:])))
                for part in spans(channels, at_once)
            ]
        )


def _work(shape: tuple[int, ...], cost_shape: tuple[int, ...], geometry: Geometry) -> int:
    """Estimate the work, in multiply-adds of a matrix product."""
    positions = min(prod(shape[2:]), prod(cost_shape[3:]) * geometry.window_taps)
    return WORK_OF_TERM * shape[1] * prod(cost_shape[:3]) * positions


def _samples(shape: tuple[int, ...]) -> int:
    """Return how many samples of this shape to take together."""
    return max(1, MAP_ELEMENTS // prod(shape))


# The volume, summed over channels.


def _sum_volume(
    maps: tuple[Array, ...], cost: Array, geometry: Geometry, divisor: int, threads: int | None
) -> None:
    """Compute the cost volume of two maps, or its tangent from two maps and their tangents."""
    batch, channels, *size = maps[0].shape
    if 0 in maps[0].shape:
        cost.fill(0)
        return
    dtype = accumulator(cost)
    with workers(_work(maps[0].shape, cost.shape, geometry), threads) as (run, arena):
        for samples in spans(batch, _samples(maps[0].shape[1:])):
            arena.reset()
            shape = (samples.stop - samples.start, *size, channels)
            packed = [
                _channels_last(arena.scratch, f"map {i}", shape, dtype) for i, _ in enumerate(maps)
            ]
            alone = [arena.take(shape[:3], dtype) for _ in range(2)]
            run(
                [
                    partial(_prepare, which, maps, packed, alone, samples, rows)
                    for which in (0, 1)
                    for rows in spans(size[0], -(-size[0] // UNITS))
                ]
            )
            run(
                [
                    partial(
                        _sum_rows,
                        packed,
                        alone,
                        cost[samples, p, :, rows],
                        _lattices(geometry, size, rows),
                        (dy, geometry.displacements[1]),
                        divisor,
                    )
                    for p, dy in enumerate(geometry.displacements[0])
                    for rows in _rows(geometry, size, shape[0], -(-UNITS // cost.shape[1]))
                ]
            )


def _prepare(
    which: int,
    maps: tuple[Array, ...],
    packed: list[Array],
    alone: list[Array],
    samples: slice,
    rows: slice,
    scratch: Scratch,
) -> None:
    """Pack rows of one map and of its tangent, and sum what its positions add alone."""
    for fmap, array in zip(maps[which::2], packed[which::2], strict=True):
        _pack(array[:, rows], fmap[samples, :, rows])
    zero = np.zeros((1, 1, 1, 1), packed[0].dtype)
    for at in _blocks((slice(None), rows, slice(0, packed[0].shape[2])), packed[0].shape):
        operands = [operand for array in packed[which::2] for operand in (array[at], zero)]
        alone[which][at] = _sum_block(operands, scratch)


def _sum_rows(
    maps: list[Array],
    alone: list[Array],
    out: Array,
    all_lattices: list[Lattices],
    displacements: tuple[int, range],
    divisor: int,
    scratch: Scratch,
) -> None:
    """Compute rows of the cost volume, (N, PW, rows, OW), at one vertical displacement."""
    dtype, (samples, height, width, _) = maps[0].dtype, maps[0].shape
    total: Array | None = None
    for lattices in all_lattices:
        lattice_size = tuple(lattice.size for lattice in lattices)
        volume = scratch.take("volume", (samples, out.shape[1], *lattice_size), dtype)
        meetings = []
        for q, dx in enumerate(displacements[1]):
            shift = displacements[0], dx
            first, second, both = _meetings(lattices, (height, width), shift)
            if _count(both) < prod(lattice_size):
                volume[:, q] = 0
                volume[:, q][first] = alone[0][_pixels(lattices, first)]
                volume[:, q][second] += alone[1][_pixels(lattices, second, shift)]
            meetings.append((volume[:, q], shift, both))
        for block in _blocks(_everything(lattices), maps[0].shape):
            for plane, shift, both in meetings:
                at = _common(block, both)
                if _count(at):
                    image1, image2 = _pixels(lattices, at), _pixels(lattices, at, shift)
                    operands = [m[image2 if i % 2 else image1] for i, m in enumerate(maps)]
                    plane[at] = _sum_block(operands, scratch)
        sums = sum_taps(volume, *lattices)
        total = sums if len(all_lattices) == 1 else sums + (0 if total is None else total)
    if total is not None:
        store(out, total, divisor)


def _sum_block(maps: Sequence[Array], scratch: Scratch) -> Array:
    """Sum over the channels of blocks (N, rows, columns, C) of two maps, and of their tangents."""
    one, two, *tangents = maps
    terms = _channels_last(scratch, "terms", one.shape, one.dtype)
    if tangents:
        np.subtract(tangents[0], tangents[1], out=terms)
        np.multiply(terms, _sign(one, two, scratch), out=terms)
    else:
        np.subtract(one, two, out=terms)
        np.abs(terms, out=terms)
    channels = one.shape[3]
    if channels < CHANNELS_LAST:
        total: Array = np.add.reduce(terms, axis=-1)
        return total
    # A product with ones takes half the time of a sum.
    total = np.dot(terms.reshape(-1, channels), np.ones(channels, terms.dtype))
    return total.reshape(one.shape[:3])


# Subgradients.


def _differentiate(
    grad_cost: Array,
    maps: tuple[Array, Array],
    grads: list[Array | None],
    geometry: Geometry,
    divisor: int,
    scratch: Scratch,
) -> None:
    """Compute the subgradients of some channels of some samples."""
    dtype = accumulator(grad_cost)
    samples, channels, *size = maps[0].shape
    shape = samples, *size, channels
    packed = [_channels_last(scratch, f"map {i}", shape, dtype) for i in (1, 2)]
    sums = [
        None if grad is None else _channels_last(scratch, f"gradient {i}", shape, dtype)
        for i, grad in enumerate(grads)
    ]
    for array, fmap, total in zip(packed, maps, sums, strict=True):
        _pack(array, fmap)
        if total is not None:
            total.fill(0)
    alone = [np.zeros(shape[:3], dtype) for _ in maps]
    for p, dy in enumerate(geometry.displacements[0]):
        for rows in _rows(geometry, size, samples, 1):
            for lattices in _lattices(geometry, size, rows):
                lattice_size = (lattice.size for lattice in lattices)
                upstream = grad_cost[:, p, :, rows]
                volume = scratch.take("volume", (*upstream.shape[:2], *lattice_size), dtype)
                spread_taps(volume, upstream, *lattices)
                shifts = [(dy, dx) for dx in geometry.displacements[1]]
                _add_terms(packed, sums, alone, volume, lattices, shifts, scratch)
    zero = np.zeros((1, 1, 1, 1), dtype)
    for array, weight, total, grad in zip(packed, alone, sums, grads, strict=True):
        if total is not None and grad is not None:
            for at in _blocks((slice(None), slice(0, size[0]), slice(0, size[1])), shape):
                total[at] += _sign(array[at], zero, scratch) * weight[at][..., None]
            store(grad, total.transpose(0, 3, 1, 2), divisor)


def _add_terms(
    maps: list[Array],
    sums: list[Array | None],
    alone: list[Array],
    volume: Array,
    lattices: Lattices,
    shifts: list[tuple[int, int]],
    scratch: Scratch,
) -> None:
    """Add what displacements contribute, given the gradient (N, PW, rows, columns) of lattices.

    Where only one position exists, the gradient is added to ``alone``.
    """
    _, height, width, _ = maps[0].shape
    meetings = []
    for upstream, shift in zip(volume.swapaxes(0, 1), shifts, strict=True):
        first, second, both = _meetings(lattices, (height, width), shift)
        if _count(both) < prod(upstream.shape[1:]):
            rest = upstream.copy()
            rest[both] = 0
            alone[0][_pixels(lattices, first)] += rest[first]
            alone[1][_pixels(lattices, second, shift)] += rest[second]
        meetings.append((upstream, shift, both))
    for block in _blocks(_everything(lattices), maps[0].shape):
        for upstream, shift, both in meetings:
            at = _common(block, both)
            if not _count(at):
                continue
            image1, image2 = _pixels(lattices, at), _pixels(lattices, at, shift)
            one, two = maps[0][image1], maps[1][image2]
            terms = _channels_last(scratch, "terms", one.shape, one.dtype)
            np.multiply(_sign(one, two, scratch), upstream[at][..., None], out=terms)
            if sums[0] is not None:
                sums[0][image1] += terms
            if sums[1] is not None:
                sums[1][image2] -= terms


# Blocks, and where they lie.


def _sign(one: Array, two: Array, scratch: Scratch) -> npt.NDArray[np.int8]:
    """Return the sign of one - two, 0 where a NaN is."""
    above, below = (
        _channels_last(scratch, name, one.shape, np.dtype(np.int8)) for name in ("above", "below")
    )
    np.greater(one, two, out=above.view(np.bool_))
    np.less(one, two, out=below.view(np.bool_))
    return np.subtract(above, below, out=above)


def _channels_last(
    memory: Scratch, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Array:
    """Return an array (N, H, W, C); in memory channels are last where they are many."""
    if shape[3] >= CHANNELS_LAST:
        return memory.take(name, shape, dtype)
    samples, height, width, channels = shape
    return memory.take(name, (samples, channels, height, width), dtype).transpose(0, 2, 3, 1)


def _pack(packed: Array, fmap: Array) -> None:
    """Copy a map (N, C, H, W) to an array (N, H, W, C)."""
    if fmap.dtype == np.uint16:
        fmap = np.left_shift(fmap, 16, dtype=np.uint32).view(np.float32)
    packed[...] = fmap.transpose(0, 2, 3, 1)


def _rows(geometry: Geometry, size: Sequence[int], samples: int, pieces: int) -> list[slice]:
    """Cut the output rows into pieces, more of them where their lattice would be too large."""
    rows, columns = geometry.output_size(*size)
    row = samples * geometry.patch_size[1] * geometry.x.lattice_size(columns)
    return spans(rows, max(1, min(-(-rows // pieces), VOLUME_ELEMENTS // row)))


def _lattices(geometry: Geometry, size: Sequence[int], rows: slice) -> list[Lattices]:
    """Return the lattices that hold the taps of some output rows."""
    y, x = geometry.y, geometry.x
    columns = x.output_size(size[1])
    return list(
        product(y.lattices(size[0], rows.start, rows.stop), x.lattices(size[1], 0, columns))
    )


def _everything(lattices: Lattices) -> Part:
    return slice(None), slice(0, lattices[0].size), slice(0, lattices[1].size)


def _meetings(
    lattices: Lattices, size: tuple[int, int], shift: tuple[int, int]
) -> tuple[Part, Part, Part]:
    """Return the lattice indices where one position, the other, and both lie in the maps."""
    axes = list(zip(lattices, size, shift, strict=True))
    one = (slice(None), *(lattice.inside(count) for lattice, count, _ in axes))
    two = (slice(None), *(lattice.inside(*axis) for lattice, *axis in axes))
    return one, two, _common(one, two)  # type: ignore[arg-type,return-value]


def _common(one: Part, two: Part) -> Part:
    """Return the lattice indices that two parts share."""
    shared = []
    for a, b in zip(one[1:], two[1:], strict=True):
        start = max(a.start, b.start)
        shared.append(slice(start, max(start, min(a.stop, b.stop))))
    return slice(None), *shared  # type: ignore[return-value]


def _count(part: Part) -> int:
    """Return the number of positions in a part."""
    return prod(side.stop - side.start for side in part[1:])


def _pixels(lattices: Lattices, part: Part, shift: tuple[int, int] = (0, 0)) -> Part:
    """Return the pixels of lattice indices, moved by ``shift``."""
    pixels = []
    for lattice, side, distance in zip(lattices, part[1:], shift, strict=True):
        positions = lattice.positions[side]
        first, last = (positions[0] + distance, positions[-1] + distance) if positions else (0, -1)
        pixels.append(slice(first, last + 1, positions.step))
    return slice(None), *pixels  # type: ignore[return-value]


def _blocks(part: Part, shape: tuple[int, ...]) -> Iterator[Part]:
    """Cut a part of maps (N, H, W, C) into blocks."""
    (_, rows, columns), each = part, shape[0] * shape[3]
    across = max(1, min(columns.stop - columns.start, BLOCK_ELEMENTS // each))
    down = max(1, BLOCK_ELEMENTS // (each * across))
    for y in range(rows.start, rows.stop, down):
        for x in range(columns.start, columns.stop, across):
            block = slice(y, min(rows.stop, y + down)), slice(x, min(columns.stop, x + across))
            yield slice(None), *block
