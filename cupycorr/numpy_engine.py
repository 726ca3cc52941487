"""The cost volume and its gradients on the CPU.

Work is done in chunks (`numpy_plan`) that bound the scratch memory. Each goes through three stages,
in each of which all threads share the work:

1. pack: copy the positions of the maps that matter to dense blocks, in the accumulator's dtype;
   for the gradients also spread the cost's gradient over the taps of the windows;
2. multiply: products of tiles and windows (`numpy_bands`);
3. store: sum the products over the taps of the windows, divide, round, and write the result.

The engine trusts its arguments; arrays may have any strides. A uint16 array holds the bits of
bfloat16 numbers.
"""

from __future__ import annotations

from functools import partial
from itertools import groupby, product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from cupycorr import numpy_bands
from cupycorr.geometry import Geometry
from cupycorr.numpy_plan import COPY_ELEMENTS, Piece, Step, cover, plan, spans
from cupycorr.parallel import Arena, Runner, Scratch, Unit, workers

Array = npt.NDArray[Any]


def forward(
    fmap1: Array,
    fmap2: Array,
    cost: Array,
    geometry: Geometry,
    *,
    divisor: int = 1,
    threads: int | None = None,
) -> None:
    """Compute the cost volume of two maps.

    Parameters
    ----------
    fmap1, fmap2 : array (N, C, H, W), float16|float32|float64, uint16 for bfloat16
        The feature maps.
    cost : array (N, PH, PW, OH, OW), of the maps' dtype
        Where the result is written.
    geometry : Geometry
        What is compared.
    divisor : int, default 1
        Every sum is divided by it before it is rounded.
    threads : int, optional
        Threads to use at most; by default as many as NumPy's BLAS.
    """
    if 0 in fmap1.shape:
        cost.fill(0)
        return
    dtype = _accumulator(cost)
    work = plan(fmap1.shape[1:], geometry, dtype.itemsize, False)
    with workers(len(fmap1) * work.multiply_adds, threads) as run:
        arena = Arena()
        for samples, part in product(spans(len(fmap1), work.samples), work.parts):
            arena.reset()
            out = cost[samples, part.patch_y, part.patch_x, part.rows]
            _forward_chunk(fmap1[samples], fmap2[samples], out, part.steps, divisor, run, arena)


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
    """Compute the gradients with respect to the maps.

    Parameters
    ----------
    grad_cost : array (N, PH, PW, OH, OW), of the maps' dtype
        The gradient with respect to the cost volume.
    fmap1, fmap2 : array (N, C, H, W), float16|float32|float64, uint16 for bfloat16
        The feature maps.
    grad_fmap1, grad_fmap2 : array (N, C, H, W), of the maps' dtype, or None
        Where the gradients are written; None where not needed.
    geometry, divisor, threads
        As for `forward`.
    """
    if 0 in fmap1.shape:
        for grad in (grad_fmap1, grad_fmap2):
            if grad is not None:
                grad.fill(0)
        return
    gradients = []
    if grad_fmap1 is not None:
        gradients.append(_Gradient(1, fmap2, grad_fmap1, divisor))
    if grad_fmap2 is not None:
        gradients.append(_Gradient(2, fmap1, grad_fmap2, divisor))
    dtype = _accumulator(grad_cost)
    work = plan(fmap1.shape[1:], geometry, dtype.itemsize, True)
    multiply_adds = len(fmap1) * work.multiply_adds * len(gradients)
    with workers(multiply_adds, threads) as run:
        arena = Arena()
        for samples in spans(len(fmap1), work.samples):
            steps = [(part, step) for part in work.parts for step in part.steps]
            for gradient in gradients:
                gradient.enter(samples, only=len(steps) == 1)
            for part, step in steps:
                arena.reset()
                upstream = grad_cost[samples, part.patch_y, part.patch_x, part.rows]
                _backward_step(upstream, gradients, step, run, arena)
            run([unit for gradient in gradients for unit in gradient.leave_units()])


def _forward_chunk(
    map1: Array,
    map2: Array,
    out: Array,
    steps: tuple[Step, ...],
    divisor: int,
    run: Runner,
    arena: Arena,
) -> None:
    dtype = _accumulator(out)
    total = np.zeros(out.shape, dtype) if len(steps) > 1 else None
    for step in steps:
        volume = arena.take(_volume_shape(out.shape, step), dtype)
        products = []
        for piece in step.pieces[0]:
            y, x, block = piece
            targets = arena.take((*map1.shape[:2], *block.target_shape), dtype)
            source = arena.take((*map1.shape[:2], *block.source_shape), dtype)
            where = volume[:, y.patch, x.patch, y.lattice, x.lattice][..., block.across.targets]
            products.append((piece, targets, source, where))
        units = _pack_units(map1, 1, [(piece, targets) for piece, targets, _, _ in products])
        units += _pack_units(map2, 2, [(piece, source) for piece, _, source, _ in products])
        if not step.complete:
            volume.fill(0)
        run(units)
        run(
            [
                partial(numpy_bands.multiply, piece.block, tiles, targets[n], source[n], where[n])
                for n in range(len(out))
                for piece, targets, source, where in products
                for tiles in piece.block.down
            ]
        )
        is_last = step is steps[-1]
        run(
            [
                partial(_store_cost, out[at], volume[at], step, total, at, is_last, divisor)
                for at in _planes(volume.shape)
            ]
        )


def _store_cost(
    out: Array,
    volume: Array,
    step: Step,
    total: Array | None,
    at: tuple[Any, ...],
    is_last: bool,
    divisor: int,
    scratch: Scratch,
) -> None:
    sums = _sum_taps(volume, step)
    if total is not None:
        total[at] += sums
        sums = total[at]
    if is_last:
        _store(out, sums, divisor)


class _Gradient:
    """One of the two gradients, and how it accumulates over chunks and lattices."""

    def __init__(self, which: int, source: Array, out: Array, divisor: int) -> None:
        self.which = which
        self.whole_source, self.whole_out, self.divisor = source, out, divisor
        self.source = self.out = out
        self.sums: Array | None = None

    def enter(self, samples: slice, *, only: bool) -> None:
        """Begin with some samples, whose gradient comes from one product only or from several."""
        self.source, self.out = self.whole_source[samples], self.whole_out[samples]
        self.sums = None if only else np.zeros(self.out.shape, _accumulator(self.out))

    def leave_units(self) -> list[Unit]:
        """Return the units that store the sums, if they are not stored yet."""
        if self.sums is None:
            return []
        return [
            partial(_store, self.out[n, part], self.sums[n, part], self.divisor)
            for n, part in _map_parts(self.out)
        ]

    def products(self, step: Step, volume: Array, arena: Arena) -> list[_Product]:
        """Return the pieces of the product with their arrays."""
        return [
            _Product(
                piece,
                arena.take((*self.source.shape[:2], *piece.block.source_shape), volume.dtype),
                arena.take((*self.source.shape[:2], *piece.block.target_shape), volume.dtype),
                self._values(piece, volume),
            )
            for piece in step.pieces[self.which - 1]
        ]

    def _values(self, piece: Piece, volume: Array) -> Array:
        """View the volume's gradient as (N, P, Q, rows, columns) of the targets."""
        y, x, block = piece
        volume = volume[:, y.patch, x.patch, y.lattice, x.lattice]
        if self.which == 2:
            # Target j of displacement p belongs to position j - p - shift. Rows that do not exist
            # lie in the neighbouring displacements' planes; no product reads them.
            per_n, per_p, per_q, per_row, per_column = volume.strides
            volume = as_strided(
                volume[..., -y.band.shift :, -x.band.shift :],
                (*volume.shape[:3], y.band.count2, x.band.count2),
                (per_n, per_p - per_row, per_q - per_column, per_row, per_column),
                writeable=False,
            )
        return volume[..., block.across.targets]

    def add_units(self, products: list[_Product], step: Step) -> list[Unit]:
        """Return the units that add the results to the sums, or store them if there are none."""
        return [partial(self._add, products, step, n, part) for n, part in _map_parts(self.out)]

    def _add(
        self, products: list[_Product], step: Step, n: int, part: slice, scratch: Scratch
    ) -> None:
        out = self.out[n, part]
        partition = step.partition[self.which - 1] and self.sums is None
        if self.sums is not None:
            gradient = self.sums[n, part]
        else:
            gradient = scratch.take("rows", out.shape, _accumulator(out))
            if not partition:
                gradient.fill(0)
        for piece, source, results, values in products:
            result = results[n, part]
            flat = result.reshape(-1)
            if piece.block.as_matrix and not np.isfinite(np.dot(flat, flat)):
                # Redo the products such that a NaN or infinity stays with its own targets.
                (tiles,) = cover(piece.block.y, piece.block.y.count1)
                numpy_bands.multiply_adjoint_by_shifts(
                    piece.block, tiles, values[n], source[n, part], result
                )
            if self.which == 1:
                _clear_untouched(results[n : n + 1, part], piece, step)
            rows, columns = piece.positions(self.which)
            target = gradient[:, rows, columns][..., piece.block.across.targets]
            if partition:
                target[...] = result
            else:
                target += result
        if self.sums is None:
            _store(out, gradient, self.divisor)


class _Product(NamedTuple):
    """A piece of a gradient's product with its arrays, each (N, C or P Q, rows, columns)."""

    piece: Piece
    source: Array
    result: Array
    values: Array


def _backward_step(
    upstream: Array,
    gradients: list[_Gradient],
    step: Step,
    run: Runner,
    arena: Arena,
) -> None:
    volume = arena.take(_volume_shape(upstream.shape, step), _accumulator(upstream))
    products = [(gradient, gradient.products(step, volume, arena)) for gradient in gradients]
    units: list[Unit] = [
        partial(_spread_taps, volume[at], upstream[at], step) for at in _planes(volume.shape)
    ]
    for gradient, group in products:
        sources = [(piece, source) for piece, source, _, _ in group]
        units += _pack_units(gradient.source, 3 - gradient.which, sources)
    run(units)
    for gradient, group in products:
        if gradient.which == 2:
            for piece, source, _, _ in group:
                _clear_untouched(source[..., ::-1], piece, step)
    run(
        [
            partial(
                numpy_bands.multiply_adjoint, piece.block, tiles, values[n], source[n], result[n]
            )
            for n in range(len(upstream))
            for _, group in products
            for piece, source, result, values in group
            for tiles in piece.block.down
        ]
    )
    run([unit for gradient, group in products for unit in gradient.add_units(group, step)])


def _clear_untouched(packed: Array, piece: Piece, step: Step) -> None:
    """Zero the positions of map 1 that no tap touches: a zero gradient times NaN is no term."""
    hidden_rows, hidden_columns = step.untouched
    if hidden_rows:
        packed[:, :, np.isin(_indices(piece.y.lattice), hidden_rows)] = 0
    if hidden_columns:
        across = piece.block.across
        columns = across.sources if piece.block.mirrored else across.targets
        packed[..., np.isin(_indices(piece.x.lattice)[columns], hidden_columns)] = 0


def _indices(span: slice) -> npt.NDArray[np.intp]:
    return np.arange(span.start, span.stop, span.step)


# Stages of copying.


def _pack_units(fmap: Array, which: int, packed: list[tuple[Piece, Array]]) -> list[Unit]:
    """Return units that copy what pieces need of map 1 or 2 to their packed arrays.

    Targets are packed as they are, sources with their columns in reverse.
    """
    units: list[Unit] = []
    for _, group in groupby(packed, key=lambda item: item[0].y):
        copies = []
        for piece, array in group:
            rows, columns = piece.positions(which)
            is_target = (which == 2) == piece.block.mirrored
            across = piece.block.across
            copies.append(
                (
                    array if is_target else array[..., ::-1],
                    columns,
                    across.targets if is_target else across.sources,
                )
            )
        values = fmap[:, :, rows]
        units += [partial(_pack, values, copies, n, part) for n, part in _map_parts(values)]
    return units


def _pack(
    values: Array,
    copies: list[tuple[Array, slice, slice]],
    n: int,
    part: slice,
    scratch: Scratch,
) -> None:
    # In two steps: the map is read once, in order, and then from the cache.
    rows = scratch.take("rows", values[n, part].shape, copies[0][0].dtype)
    _widen(rows, values[n, part])
    for packed, columns, window in copies:
        packed[n, part] = rows[..., columns][..., window]


def _map_parts(fmap: Array) -> list[tuple[int, slice]]:
    """Split a map into (sample, channels) small enough to stay in the cache between copies."""
    batch, channels, rows, columns = fmap.shape
    size = max(1, min(channels, COPY_ELEMENTS // (rows * columns)))
    return list(product(range(batch), spans(channels, size)))


def _planes(shape: tuple[int, ...]) -> list[tuple[int, slice, slice]]:
    """Split (N, P, Q, rows, columns) into (sample, displacements p, displacements q)."""
    batch, patch_y, patch_x, rows, columns = shape
    planes = max(1, COPY_ELEMENTS // (rows * columns))
    parts_y, parts_x = spans(patch_y, max(1, planes // patch_x)), spans(patch_x, planes)
    return list(product(range(batch), parts_y, parts_x))


def _volume_shape(cost_shape: tuple[int, ...], step: Step) -> tuple[int, ...]:
    return (*cost_shape[:3], step.lattice_y.size, step.lattice_x.size)


def _sum_taps(volume: Array, step: Step) -> Array:
    """Sum over the taps of each window: (P, Q, lattice rows, columns) to (P, Q, OH, OW)."""
    rows = [volume[:, :, tap] for tap in step.lattice_y.taps]
    volume = _sum(rows)
    return _sum([volume[..., tap] for tap in step.lattice_x.taps])


def _sum(parts: list[Array]) -> Array:
    if len(parts) == 1:
        return parts[0]
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total


def _spread_taps(volume: Array, grad: Array, step: Step, scratch: Scratch) -> None:
    """Adjoint of `_sum_taps`: write the volume's gradient from the cost's."""
    taps_y, taps_x = step.lattice_y.taps, step.lattice_x.taps
    if len(taps_y) == len(taps_x) == 1:
        _widen(volume, grad)
        return
    wide = np.empty(grad.shape, volume.dtype)
    _widen(wide, grad)
    rows = np.zeros((*wide.shape[:3], step.lattice_x.size), volume.dtype)
    for tap in taps_x:
        rows[..., tap] += wide
    volume.fill(0)
    for tap in taps_y:
        volume[:, :, tap] += rows


# Number formats.


def _accumulator(array: Array) -> np.dtype[Any]:
    """Return the dtype in which sums of an array's values are formed."""
    return array.dtype if array.dtype == np.float64 else np.dtype(np.float32)


def _widen(out: Array, values: Array) -> None:
    """Copy to the accumulator's dtype."""
    if values.dtype == np.uint16:
        np.left_shift(values, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, values)


def _store(out: Array, sums: Array, divisor: int, scratch: Scratch | None = None) -> None:
    """Divide, and round once to the storage dtype, to nearest even."""
    if out.dtype == np.uint16:
        if divisor != 1:
            sums = sums / sums.dtype.type(divisor)
        bits = np.ascontiguousarray(sums).view(np.uint32)
        rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
        out[...] = np.where(np.isnan(sums), 0x7FC0, rounded)
    elif divisor != 1:
        np.divide(sums, sums.dtype.type(divisor), out=out, casting="same_kind")
    else:
        np.copyto(out, sums, casting="same_kind")
