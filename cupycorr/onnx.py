"""The cost volume and the lookup in ONNX's standard operators, for torch's exporters.

An exported model needs neither cupycorr nor a custom operator where it runs. A cost volume is
one batched matrix product, however many displacements there are, of the maps cut into tiles::

    fmap1 (N, groups, tile_y * tile_x, C)      lattice positions of one phase
    fmap2 (N, groups, C, reach_y * reach_x)    all positions that these meet

A group's product holds, for each position of a tile, the terms of every displacement beside those
of pairs that do not meet. An index, the sum of a vertical and a horizontal part, picks the terms of
the cost volume. One more pixel, and one more group that holds it alone, give the zeros of terms
outside the maps. The taps are summed last, one by one.

A lookup gathers the vectors of the cells that are met, (E, P, cells of a row, C), and multiplies
them with those of the positions, row after row of a patch; then it interpolates the products.
A lookup of a volume gathers the costs of those cells.

Sizes that a model leaves open are computed when it runs, by the same formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from itertools import product
from operator import mul
from typing import Any, NamedTuple

import numpy as np
import torch
from onnxscript import ir
from onnxscript import opset18 as op

import cupycorr.torch  # noqa: F401 - defines the operators
from cupycorr.geometry import Axis, Geometry
from cupycorr.layer import Layer
from cupycorr.lookup import Lookup


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what cupycorr's operators are in ONNX, for ``torch.onnx.export(..., dynamo=True)``.

    Returns
    -------
    dict
        The argument ``custom_translation_table``; entries for other operators may be added.

    Notes
    -----
    Operators are those of opset 18. Sums are accumulated in float32, in float64 for float64 maps,
    and rounded once, as everywhere in cupycorr. There is no translation of the gradients.
    """
    operators = torch.ops.cupycorr
    return {
        operators.cost.default: _cost,
        operators.pyramid.default: _pyramid,
        operators.lookup.default: _lookup,
        operators.volume_lookup.default: _volume_lookup,
    }


def _cost(fmap1: Any, fmap2: Any, *arguments: Any) -> Any:
    """Translate ``cupycorr::cost``; sizes of the maps may be open."""
    *fields, normalize = arguments
    geometry = Geometry(*map(tuple, fields))
    shape, bits = fmap1.shape, fmap1.dtype.bitwidth
    _, channels, height, width = (_size(fmap1, dim, size) for dim, size in enumerate(shape))
    wide = bits > 16
    one, two = (fmap if wide else op.Cast(fmap, to=_FLOAT) for fmap in (fmap1, fmap2))
    tile = _tile(geometry, channels, height, width)
    y = _Tiles.of(geometry.y, height, tile[0])
    x = _Tiles.of(geometry.x, width, tile[1])
    pixels = height * width
    read1 = _numbers(y.read1, x.read1, height, width, y.tile * x.tile)
    read2 = _numbers(y.read2, x.read2, height, width, y.reach * x.reach)
    one, two = _pixels(one, channels, pixels), _pixels(two, channels, pixels)
    tiles = op.Gather(op.Transpose(one, perm=[0, 2, 1]), read1, axis=1)
    if bits == 64:
        # onnxruntime 1.23 would fuse what is below to an operator that it has for float32 only.
        met = op.Transpose(op.Gather(two, read2, axis=2), perm=[0, 2, 1, 3])
    else:
        met = op.Gather(op.Transpose(two, perm=[0, 2, 1]), read2, axis=1)
        met = op.Transpose(met, perm=[0, 1, 3, 2])
    products = op.MatMul(tiles, met)
    cost = _pick(products, y, x)
    cost = _sum_taps(cost, geometry.y, height, dim=3)
    cost = _sum_taps(cost, geometry.x, width, dim=4)
    if normalize:
        cost = op.Div(cost, op.CastLike(_value(_divisor(geometry, channels)), cost))
    return cost if wide else op.CastLike(cost, fmap1)


_FLOAT, _INT64 = 1, 7
"""ONNX's numbers for float32 and int64."""


class _Tiles(NamedTuple):
    """How one axis is read in tiles; arrays of integers, known or open (`_Open`)."""

    tile: int
    reach: int
    groups: Any
    read1: Any
    """(groups, tile): positions in the first map."""
    read2: Any
    """(groups, reach): positions in the second map."""
    group: Any
    """(patch, lattice): which group holds a displacement at a lattice position."""
    row: Any
    """(1, lattice): where in its tile a lattice position is."""
    column: Any
    """(patch, lattice): where among the positions that the tile meets its partner is."""
    inside: Any
    """(patch, lattice): whether both positions exist."""

    @classmethod
    def of(cls, axis: Axis, size: Any, tile: int) -> _Tiles:
        """Split an axis into phases, as `lattice.lattices` does, and these into tiles."""
        step, spacing = axis.lattice_step, axis.dilation_patch
        lattice_phases, patch_phases = axis.phases
        period = step * lattice_phases
        reach = _reach(axis, tile)
        count = axis.lattice_size(axis.output_size(size))
        tiles = (count + (lattice_phases * tile - 1)) // (lattice_phases * tile)
        groups = tiles * (lattice_phases * patch_phases)

        # Groups are numbered by tile, phase of positions and phase of displacements.
        number = _range(groups)[:, None]
        phase = number // patch_phases % lattice_phases
        first = number // (lattice_phases * patch_phases) * (tile * period) + phase * step
        first = first - axis.padding
        second = first + number % patch_phases * spacing + axis.first_displacement

        lattice, patch = _range(count)[None, :], np.arange(axis.patch_size)[:, None]
        position = lattice * step - axis.padding
        partner = position + (patch * spacing + axis.first_displacement)
        place = lattice // lattice_phases
        phase = place // tile * lattice_phases + lattice % lattice_phases
        return cls(
            tile,
            reach,
            groups,
            read1=first + np.arange(tile) * period,
            read2=second + np.arange(reach) * period,
            group=phase * patch_phases + patch % patch_phases,
            row=place % tile,
            column=place % tile + patch // patch_phases,
            inside=_inside(position, size) & _inside(partner, size),
        )


def _reach(axis: Axis, tile: int) -> int:
    """Return how many positions of one phase those of a tile meet."""
    return tile + -(-axis.patch_size // axis.phases[1]) - 1


def _tile(geometry: Geometry, channels: Any, height: Any, width: Any) -> tuple[int, int]:
    """Choose the tile that costs least; where sizes are open, for a large map."""

    def padded(axis: Axis, size: Any, tile: int) -> float:
        if not isinstance(size, int):
            return 1.0
        count = axis.lattice_size(axis.output_size(size))
        whole = tile * axis.phases[0]
        return -(-count // whole) * whole / count

    def cost(tile: tuple[int, int]) -> float:
        y, x = tile
        depth = channels if isinstance(channels, int) else 128
        met, positions = _reach(geometry.y, y) * _reach(geometry.x, x), y * x
        waste = padded(geometry.y, height, y) * padded(geometry.x, width, x)
        # Per position: products, reading what is multiplied, and the call of a product.
        return waste * (depth * met * (1 + _READ / positions) + _CALL / positions)

    return min(product(_TILES, _TILES), key=cost)


_TILES = (1, 2, 4, 8, 16, 32, 64)
# In multiply-adds of a matrix product, as onnxruntime on a CPU was measured.
_READ = 40
_CALL = 10000


def _pixels(fmap: Any, channels: Any, pixels: Any) -> Any:
    """Return a map as (N, C, pixels + 1), where the last pixel is zero."""
    if _is(0, channels):
        # onnxruntime leaves a product over no channels uninitialised.
        fmap, channels = op.Pad(fmap, _value(np.array([0, 0, 0, 0, 0, 1, 0, 0]))), 1
    return _with_zero(op.Reshape(fmap, _shape(-1, channels, pixels)))


def _with_zero(flat: Any) -> Any:
    """Return an array of three axes with one more entry along the last, zero."""
    return op.Pad(flat, _value(np.array([0, 0, 0, 0, 0, 1])))


def _numbers(y: Any, x: Any, height: Any, width: Any, count: int) -> Any:
    """Return the number of each pixel of all groups, and of the zero one: (groups + 1, count)."""
    y, x = y[:, None, :, None], x[None, :, None, :]
    outside = height * width
    numbers = _where(_inside(y, height) & _inside(x, width), y * width + x, outside)
    if isinstance(numbers, _Open):
        flat = op.Reshape(numbers.value, _shape(-1, count))
        return op.Pad(flat, _value(np.array([0, 0, 1, 0])), _value(outside))
    return _value(np.pad(numbers.reshape(-1, count), ((0, 1), (0, 0)), constant_values=outside))


def _pick(products: Any, y: _Tiles, x: _Tiles) -> Any:
    """Order the groups' products as product volume, (N, PH, PW, positions, positions)."""
    rows, columns = y.tile * x.tile, y.reach * x.reach
    zero = y.groups * x.groups * (rows * columns)
    products = op.Reshape(products, _shape(-1, zero + rows * columns))
    part_y = (y.group * x.groups * rows + y.row * x.tile) * columns + y.column * x.reach
    part_x = (x.group * rows + x.row) * columns + x.column
    # Not computed here: the index is as large as the cost volume of one sample.
    index = op.Where(
        op.And(_value(y.inside[:, None, :, None]), _value(x.inside[None, :, None, :])),
        op.Add(_value(part_y[:, None, :, None]), _value(part_x[None, :, None, :])),
        _value(zero),
    )
    return op.Gather(products, index, axis=1)


def _sum_taps(volume: Any, axis: Axis, size: Any, dim: int) -> Any:
    """Sum the taps along one axis of a product volume."""
    if axis.kernel_size == 1:
        return volume
    outputs = axis.output_size(size)
    step = axis.stride // axis.lattice_step
    first = axis.dilation // axis.lattice_step
    taps = (
        op.Slice(
            volume,
            _shape(tap * first),
            _shape((outputs - 1) * step + (tap * first + 1)),
            _shape(dim),
            _shape(step),
        )
        for tap in range(axis.kernel_size)
    )
    return op.Sum(*taps)


def _divisor(geometry: Geometry, channels: Any) -> Any:
    if isinstance(channels, int):
        return Layer(geometry, normalize=True).divisor(channels)
    return channels * geometry.taps


def _pyramid(fmap2: Any, levels: int, pool: Any) -> tuple[Any, ...]:
    """Translate ``cupycorr::pyramid``; sizes of the map may be open."""
    samples, channels, *size = (_size(fmap2, dim, s) for dim, s in enumerate(fmap2.shape))
    results = [fmap2]
    wide = fmap2.dtype.bitwidth > 16
    for _ in range(1, levels):
        size = [length // p for length, p in zip(size, pool, strict=True)]
        height, width = size
        level: Any = results[-1] if wide else op.Cast(results[-1], to=_FLOAT)
        whole = _shape(height * pool[0], width * pool[1])
        level = op.Slice(level, _shape(0, 0), whole, _shape(2, 3))
        cells = op.Reshape(level, _shape(samples, channels, height, pool[0], width, pool[1]))
        # Not AveragePool, which onnxruntime has for float32 only.
        level = op.ReduceMean(cells, _shape(3, 5), keepdims=0)
        results.append(level if wide else op.CastLike(level, fmap2))
    return tuple(results)


def _lookup(
    fmap1: Any,
    levels: Any,
    coords: Any,
    index1: Any,
    index2: Any,
    radius: Any,
    dilation_patch: Any,
    pool: Any,
    scale: float,
    x_first: bool,
) -> Any:
    """Translate ``cupycorr::lookup``; all sizes but the channels' may be open."""
    samples, positions, _ = _sizes(coords)
    wide, channels = fmap1.dtype.bitwidth > 16, fmap1.shape[1]
    one: Any = fmap1 if wide else op.Cast(fmap1, to=_FLOAT)
    one = op.Reshape(one, _shape(-1, channels, positions))
    one = op.Unsqueeze(op.Transpose(one, perm=[0, 2, 1]), _shape(3))
    one = one if index1 is None else op.Gather(one, index1, axis=0)
    which = _range(samples) if index2 is None else _Open(op.Cast(index2, to=_INT64))

    def products(two: Any, cells: Any, found: _Open, rows: int) -> Any:
        # The vectors of all cells; the last one of each map is zero.
        table: Any = two if wide else op.Cast(two, to=_FLOAT)
        table = _with_zero(op.Reshape(table, _shape(-1, channels, cells)))
        table = op.Reshape(op.Transpose(table, perm=[0, 2, 1]), _shape(-1, channels))
        found = found + which[:, None, None, None] * (cells + 1)
        parts: Iterator[Any] = (
            op.MatMul(op.Gather(table, op.Gather(found.value, _value(row), axis=2), axis=0), one)
            for row in range(rows)
        )
        return op.Concat(*parts, axis=3)

    lookup = Lookup(tuple(radius), dilation_patch=tuple(dilation_patch))
    cost: Any = _patches(levels, coords, lookup, pool, x_first, products)
    cost = op.Mul(cost, op.CastLike(_value(scale), cost))
    return cost if wide else op.CastLike(cost, fmap1)


def _volume_lookup(
    levels: Any, coords: Any, radius: Any, dilation_patch: Any, pool: Any, x_first: bool
) -> Any:
    """Translate ``cupycorr::volume_lookup``; all sizes may be open."""
    samples, positions, _ = _sizes(coords)
    wide = levels[0].dtype.bitwidth > 16

    def costs(volume: Any, cells: Any, found: _Open, rows: int) -> Any:
        table = _with_zero(op.Reshape(volume, _shape(samples, positions, cells)))
        flat = op.Reshape(found.value, _shape(samples, positions, -1))
        met: Any = op.GatherElements(table, flat, axis=2)
        met = met if wide else op.Cast(met, to=_FLOAT)
        met = op.Reshape(met, _shape(samples, positions, rows, -1))
        return op.Transpose(met, perm=[0, 1, 3, 2])

    lookup = Lookup(tuple(radius), dilation_patch=tuple(dilation_patch))
    cost: Any = _patches(levels, coords, lookup, pool, x_first, costs)
    return cost if wide else op.CastLike(cost, levels[0])


def _sizes(coords: Any) -> tuple[Any, Any, list[Any]]:
    """Return the number of samples and of a sample's positions, and the sizes of their axes."""
    samples, _, *sizes = (_size(coords, dim, size) for dim, size in enumerate(coords.shape))
    return samples, reduce(mul, sizes, 1), sizes


def _patches(
    levels: Any,
    coords: Any,
    lookup: Lookup,
    pool: Any,
    x_first: bool,
    read: Callable[[Any, Any, _Open, int], Any],
) -> Any:
    """Interpolate what ``read`` returns of a level to a cost, without a scale.

    It is told the level, how many cells that has, which of these each position meets (E, P, rows,
    columns), where that number stands for a zero, and the rows; it returns (E, P, columns, rows).
    """
    samples, positions, sizes = _sizes(coords)
    flat = op.Reshape(coords, _shape(samples, 2, positions))
    x, y = (op.Gather(flat, _value(channel), axis=1) for channel in range(2))
    costs: list[Any] = []
    for number, level in enumerate(levels):
        height, width = (_size(level, dim, size) for dim, size in list(enumerate(level.shape))[-2:])
        rows = _Met.of(y, pool[0] ** number, height, lookup, 0)
        columns = _Met.of(x, pool[1] ** number, width, lookup, 1)
        cells = height * width
        down, across = rows.cell[:, :, :, None], columns.cell[:, :, None, :]
        inside = _inside(down, height) & _inside(across, width)
        found = _where(inside, down * width + across, cells)
        patch = read(level, cells, found, rows.cells)
        patch = rows.interpolate(columns.interpolate(patch, 2), 3)
        costs.append(op.Transpose(patch, perm=[0, 2, 3, 1] if x_first else [0, 3, 2, 1]))
    cost: Any = op.Concat(*(op.Unsqueeze(level, _shape(1)) for level in costs), axis=1)
    patch_size = lookup.patch_size[::-1] if x_first else lookup.patch_size
    return op.Reshape(cost, _shape(samples, len(costs), *patch_size, *sizes))


class _Met(NamedTuple):
    """Which cells a lookup meets along one axis."""

    cell: _Open
    """(E, P, cells): the cells' numbers, of which some are outside."""
    cells: int
    near: Any
    """(patch,): where among them the corner before each displacement is."""
    far: Any
    """(patch,): where the corner behind it is."""
    fraction: Any
    """(E, P, 1, 1): the weight of the corner behind."""

    @classmethod
    def of(cls, place: Any, shrunk: int, size: Any, lookup: Lookup, axis: int) -> _Met:
        """Find them from coordinates (E, P), which are divided by an int first."""
        steps, reach = np.array(lookup.displacements[axis]), lookup.reach[axis]
        offsets, where = np.unique(np.concatenate([steps, steps + 1]), return_inverse=True)
        if shrunk > 1:
            place = op.Div(place, op.CastLike(_value(shrunk), place))
        # All that is met from beyond is outside; a larger number would not fit an integer.
        least, most = (
            op.CastLike(_value(bound), place) for bound in (-reach - 2, size + reach + 1)
        )
        place = op.Max(op.Min(place, most), least)
        floor = op.Floor(place)
        return cls(
            _Open(op.Cast(floor, to=_INT64))[:, :, None] + offsets,
            len(offsets),
            where[: len(steps)],
            where[len(steps) :],
            op.Unsqueeze(op.Sub(place, floor), _shape(2, 3)),
        )

    def interpolate(self, patch: Any, axis: int) -> Any:
        """Reduce the axis of a patch that has an entry for each cell to displacements."""
        near, far = (op.Gather(patch, _value(at), axis=axis) for at in (self.near, self.far))
        zero, one = (op.CastLike(_value(number), patch) for number in (0, 1))
        parts = op.Mul(near, op.Sub(one, self.fraction)), op.Mul(far, self.fraction)
        # A corner of weight 0 does not count, not even if it is infinite.
        return op.Where(op.Equal(self.fraction, zero), near, op.Add(*parts))


# Integers that are known when a model is exported, or open until it runs.


class _Open:
    """Integers, or truth values, that a model computes; ``value`` says how."""

    __array_ufunc__ = None  # so that NumPy leaves operators with arrays to this class

    def __init__(self, value: Any) -> None:
        self.value = value

    def __add__(self, other: Any) -> _Open:
        return self if _is(0, other) else _Open(op.Add(self.value, _value(other)))

    __radd__ = __add__

    def __sub__(self, other: Any) -> _Open:
        return self if _is(0, other) else _Open(op.Sub(self.value, _value(other)))

    def __mul__(self, other: Any) -> _Open:
        return self if _is(1, other) else _Open(op.Mul(self.value, _value(other)))

    __rmul__ = __mul__

    def __mod__(self, divisor: int) -> Any:
        return 0 if _is(1, divisor) else _Open(op.Mod(self.value, _value(divisor)))

    def __floordiv__(self, divisor: int) -> _Open:
        # ONNX's Div rounds towards zero.
        multiple = self if _is(1, divisor) else self - self % divisor
        return self if _is(1, divisor) else _Open(op.Div(multiple.value, _value(divisor)))

    def __ge__(self, other: Any) -> _Open:
        return _Open(op.GreaterOrEqual(self.value, _value(other)))

    def __lt__(self, other: Any) -> _Open:
        return _Open(op.Less(self.value, _value(other)))

    def __gt__(self, other: Any) -> _Open:
        return _Open(op.Greater(self.value, _value(other)))

    def __and__(self, other: Any) -> _Open:
        return _Open(op.And(self.value, _value(other)))

    __rand__ = __and__

    def __getitem__(self, axes: tuple[slice | None, ...]) -> _Open:
        new = [dim for dim, axis in enumerate(axes) if axis is None]
        return _Open(op.Unsqueeze(self.value, _value(np.array(new))))


def _is(number: int, operand: Any) -> bool:
    """Tell whether an operand changes nothing: a known number, or an array of it alone."""
    known = isinstance(operand, (int, np.ndarray)) and np.size(operand) == 1
    return bool(known and np.all(operand == number))


def _size(fmap: Any, dim: int, size: Any) -> Any:
    """Return a map's size, open unless it was fixed."""
    if isinstance(size, int):
        return size
    return _Open(op.Squeeze(op.Shape(fmap, start=dim, end=dim + 1)))


def _range(count: Any) -> Any:
    if isinstance(count, _Open):
        return _Open(op.Range(_value(0), count.value, _value(1)))
    return np.arange(count)


def _inside(position: Any, size: Any) -> Any:
    return (position >= 0) & (position < size)


def _where(condition: Any, yes: Any, no: Any) -> Any:
    if any(isinstance(operand, _Open) for operand in (condition, yes, no)):
        return _Open(op.Where(_value(condition), _value(yes), _value(no)))
    return np.where(condition, yes, no)


def _value(integers: Any) -> Any:
    """Return integers as a value of the graph."""
    if isinstance(integers, _Open):
        return integers.value
    constant: Any = ir.tensor(np.asarray(integers))
    return op.Constant(value=constant)


def _shape(*sizes: Any) -> Any:
    """Return sizes as one array; Reshape finds out what -1 is, also if that is zero."""
    if not any(isinstance(size, _Open) for size in sizes):
        return _value(np.array(sizes))
    return op.Concat(*(op.Reshape(_value(size), _value(np.array([1]))) for size in sizes), axis=0)
