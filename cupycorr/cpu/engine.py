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

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from cupycorr.cpu import bands, l1
from cupycorr.cpu.plan import COPY_ELEMENTS, Block, Group, Step, Tiles, cover, plan, spans
from cupycorr.cpu.taps import accumulator, spread_taps, store, sum_taps, widen
from cupycorr.cpu.threads import Arena, Runner, Scratch, Unit, workers
from cupycorr.layer import Layer

Array = npt.NDArray[Any]


def run(
    what: str,
    arrays: Mapping[str, Any],
    layer: Layer,
    *,
    threads: int | None = None,
) -> None:
    """Compute a layer's result into arrays.

    Parameters
    ----------
    what : {"cost", "grads", "tangent"}
        The cost volume; the gradients with respect to the maps, for an upstream gradient; or, for
        "l1", the change of the cost volume with changes of the maps.
    arrays : mapping of name to array, float16|float32|float64, uint16 for bfloat16
        Inputs "fmap1" and "fmap2" (N, C, H, W), for "grads" also "grad_cost" (N, PH, PW, OH, OW),
        for "tangent" also "tangent1" and "tangent2" (N, C, H, W). Results, which are written:
        "cost", or those of "grad_fmap1" and "grad_fmap2" that are there and not None. All have one
        dtype.
    layer : Layer
        What is computed.
    threads : int, optional
        Threads to use at most; by default as many as NumPy's BLAS.
    """
    fmap1 = arrays["fmap1"]
    if 0 in fmap1.shape:
        for name in ("cost",) if what != "grads" else ("grad_fmap1", "grad_fmap2"):
            result = arrays.get(name)
            if result is not None:
                result.fill(0)
    elif layer.l1:
        l1.run(what, arrays, layer, threads)
    elif what == "cost":
        _cost(fmap1, arrays["fmap2"], arrays["cost"], layer, threads)
    else:
        _grads(arrays, layer, threads)


def _cost(fmap1: Array, fmap2: Array, cost: Array, layer: Layer, threads: int | None) -> None:
    dtype, divisor = accumulator(cost), layer.divisor(fmap1.shape[1])
    work = plan(fmap1.shape[1:], layer.geometry, dtype.itemsize, False)
    with workers(len(fmap1) * work.multiply_adds, threads) as (run, arena):
        for samples, part in product(spans(len(fmap1), work.samples), work.parts):
            arena.reset()
            out = cost[samples, part.patch_y, part.patch_x, part.rows]
            _forward_chunk(fmap1[samples], fmap2[samples], out, part.steps, divisor, run, arena)


def _grads(arrays: Mapping[str, Any], layer: Layer, threads: int | None) -> None:
    fmap1, grad_cost = arrays["fmap1"], arrays["grad_cost"]
    dtype, divisor = accumulator(grad_cost), layer.divisor(fmap1.shape[1])
    gradients = []
    if arrays.get("grad_fmap1") is not None:
        gradients.append(_Gradient(1, arrays["fmap2"], arrays["grad_fmap1"], divisor))
    if arrays.get("grad_fmap2") is not None:
        gradients.append(_Gradient(2, fmap1, arrays["grad_fmap2"], divisor))
    work = plan(fmap1.shape[1:], layer.geometry, dtype.itemsize, True)
    multiply_adds = len(fmap1) * work.multiply_adds * len(gradients)
    with workers(multiply_adds, threads) as (run, arena):
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
    dtype = accumulator(out)
    total = np.zeros(out.shape, dtype) if len(steps) > 1 else None
    for step in steps:
        taps = len(step.lattice_y.taps) * len(step.lattice_x.taps)
        # The products of a one-tap window are the result, but for division and rounding.
        direct = total is None and taps == divisor == 1 and out.dtype == dtype
        volume = out if direct else arena.take(_volume_shape(out.shape, step), dtype)
        if not step.complete:
            volume.fill(0)
        units: list[Unit] = []
        products: list[Unit] = []
        for group in step.targets[0].groups:
            targets, pack_targets = _packed(map1, 1, group, step, dtype, arena)
            sources, pack_sources = _packed(map2, 2, group, step, dtype, arena)
            units += pack_targets + pack_sources
            values = [_values(volume, group, block) for block in group.blocks]
            products += [
                partial(_multiply, group, tiles, n, targets, sources, values)
                for n in spans(len(out), group.samples)
                for tiles in group.down
            ]
        run(units)
        run(products)
        if direct:
            continue
        is_last = step is steps[-1]
        run(
            [
                partial(_store_cost, out[at], volume[at], step, total, at, is_last, divisor)
                for at in _planes(volume.shape)
            ]
        )


def _multiply(
    group: Group,
    tiles: Tiles,
    n: slice,
    targets: list[Array],
    sources: list[Array],
    values: list[Array],
    scratch: Scratch,
) -> None:
    for block, target, source, value in zip(group.blocks, targets, sources, values, strict=True):
        bands.multiply(block, tiles, target[n], source[n], value[n], scratch)


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
    sums = sum_taps(volume, step.lattice_y, step.lattice_x)
    if total is not None:
        total[at] += sums
        sums = total[at]
    if is_last:
        store(out, sums, divisor)


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
        self.sums = None if only else np.zeros(self.out.shape, accumulator(self.out))

    def leave_units(self) -> list[Unit]:
        """Return the units that store the sums, if they are not stored yet."""
        if self.sums is None:
            return []
        return [
            partial(store, self.out[n, part], self.sums[n, part], self.divisor)
            for n, part in _map_parts(self.out)
        ]


class _Product:
    """The product of one step for one gradient, with its packed arrays."""

    def __init__(self, gradient: _Gradient, step: Step, volume: Array, arena: Arena) -> None:
        self.gradient, self.step = gradient, step
        self.which = gradient.which
        self.targets = step.targets[self.which - 1]
        self.packed: list[_Packed] = []
        self.pack_units: list[Unit] = []
        for group in self.targets.groups:
            sources, units = _packed(
                gradient.source, 3 - self.which, group, step, volume.dtype, arena
            )
            results = [
                _take(arena, gradient.out, block, block.target_shape, volume.dtype)
                for block in group.blocks
            ]
            values = [_values(volume, group, block) for block in group.blocks]
            self.packed.append((group, sources, results, values))
            self.pack_units += units

    def multiply_units(self) -> list[Unit]:
        """Return the units that multiply."""
        return [
            partial(self._multiply, packed, tiles, n)
            for packed in self.packed
            for n in spans(len(self.gradient.out), packed[0].samples)
            for tiles in packed[0].down
        ]

    def _multiply(self, packed: _Packed, tiles: Tiles, n: slice, scratch: Scratch) -> None:
        for block, source, result, values in zip(packed[0].blocks, *packed[1:], strict=True):
            bands.multiply_adjoint(block, tiles, values[n], source[n], result[n], scratch)

    def add_units(self) -> list[Unit]:
        """Return the units that add the results to the sums, or store them if there are none."""
        rows = self.gradient.out[:, :, self.targets.rows]
        return [partial(self._add, n, part) for n, part in _map_parts(rows)]

    def _add(self, n: slice, part: slice, scratch: Scratch) -> None:
        out, sums, rows = self.gradient.out[n, part], self.gradient.sums, self.targets.rows
        gradient = scratch.take("rows", out[:, :, rows].shape, accumulator(out))
        self._assemble(gradient, n, part)
        flat = gradient.reshape(-1)
        if not np.isfinite(np.dot(flat, flat)):
            # Redo the products such that a NaN or infinity stays with its own targets.
            for group, sources, results, values in self.packed:
                (tiles,) = cover(group.blocks[0].y, group.blocks[0].y.count1)
                for block, source, result, value in zip(
                    group.blocks, sources, results, values, strict=True
                ):
                    bands.multiply_adjoint_by_shifts(
                        block, tiles, value[n], source[n, :, part], result[n, :, part], scratch
                    )
            self._assemble(gradient, n, part)
        if sums is not None:
            sums[n, part, rows] += gradient
            return
        store(out[:, :, rows], gradient, self.gradient.divisor)
        out[:, :, : rows.start] = 0
        out[:, :, rows.stop :] = 0

    def _assemble(self, gradient: Array, n: slice, part: slice) -> None:
        """Put the results of all tiles where they belong, in the targets' rows of the map."""
        if not self.targets.partition:
            gradient.fill(0)
        for group, _, results, _ in self.packed:
            rows = group.rows(self.which)
            first = self.targets.rows.start
            places = gradient[:, :, rows.start - first : rows.stop - first : rows.step]
            for block, result in zip(group.blocks, results, strict=True):
                if self.which == 1:
                    _clear_untouched(result[n, :, part], group, block, self.step)
                across = block.across
                place = places[..., block.columns(self.which)][..., across.targets]
                place = place.reshape(*place.shape[:3], across.repeat, across.size)
                values = result[n, :, part].transpose(0, 2, 3, 1, 4)
                if self.targets.partition:
                    place[...] = values
                else:
                    place += values


_Packed = tuple[Group, list[Array], list[Array], list[Array]]


def _backward_step(
    upstream: Array,
    gradients: list[_Gradient],
    step: Step,
    run: Runner,
    arena: Arena,
) -> None:
    volume = arena.take(_volume_shape(upstream.shape, step), accumulator(upstream))
    products = [_Product(gradient, step, volume, arena) for gradient in gradients]
    spread = [
        partial(spread_taps, volume[at], upstream[at], step.lattice_y, step.lattice_x)
        for at in _planes(volume.shape)
    ]
    run(spread + [unit for one in products for unit in one.pack_units])
    run([unit for one in products for unit in one.multiply_units()])
    run([unit for one in products for unit in one.add_units()])


def _values(volume: Array, group: Group, block: Block) -> Array:
    """View the products (N, P, Q, lattice rows, columns) as (N, P, Q, rows, columns) of targets."""
    y, x = group.phase, block.phase
    volume = volume[:, y.patch, x.patch, y.lattice, x.lattice]
    if block.mirrored:
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


def _clear_untouched(packed: Array, group: Group, block: Block, step: Step) -> None:
    """Zero the positions of map 1 that no tap touches: a zero gradient times NaN is no term.

    ``packed`` is (..., tile, C, rows, columns), columns not in reverse.
    """
    hidden_rows, hidden_columns = step.untouched
    if hidden_rows:
        packed[..., np.isin(_indices(group.phase.lattice), hidden_rows), :] = 0
    if hidden_columns:
        hidden = np.isin(_indices(block.phase.lattice), hidden_columns)
        across = block.across
        for number in range(across.repeat):
            first = (across.window if block.mirrored else across.start) + number * across.size
            packed[..., number, :, :, hidden[first : first + packed.shape[-1]]] = 0


def _indices(span: slice) -> npt.NDArray[np.intp]:
    return np.arange(span.start, span.stop, span.step)


# Stages of copying.


def _take(
    arena: Arena, fmap: Array, block: Block, shape: tuple[int, int], dtype: np.dtype[Any]
) -> Array:
    """Return an array for packed tiles: (N, tile, C, rows, columns)."""
    return arena.take((fmap.shape[0], block.across.repeat, fmap.shape[1], *shape), dtype)


def _packed(
    fmap: Array, which: int, group: Group, step: Step, dtype: np.dtype[Any], arena: Arena
) -> tuple[list[Array], list[Unit]]:
    """Return what blocks need of map 1 or 2, (N, tile, C, rows, columns) each, and how to pack it.

    Targets come as they are, sources with their columns in reverse.
    """
    is_target = (which == 2) == group.blocks[0].mirrored
    values = fmap[:, :, group.rows(which)]
    mirrored_source = group.blocks[0].mirrored and not is_target
    hide = step if mirrored_source and any(step.untouched) else None
    dense = all(block.columns(which).step <= 2 for block in group.blocks)
    if not group.blocks[0].as_matrix and fmap.dtype == dtype and dense and hide is None:
        # Shifts work on the map itself, where its cache lines are worth reading again.
        sides = [(block.columns(which), block.across) for block in group.blocks]
        views = [
            values[..., columns][:, None, ..., across.targets if is_target else across.sources]
            for columns, across in sides
        ]
        return [view if is_target else view[..., ::-1] for view in views], []
    packed = [
        _take(arena, fmap, block, block.target_shape if is_target else block.source_shape, dtype)
        for block in group.blocks
    ]
    return packed, [
        partial(_pack, values, which, group, hide, packed, n, part)
        for n, part in _map_parts(values)
    ]


def _pack(
    values: Array,
    which: int,
    group: Group,
    hide: Step | None,
    packed: list[Array],
    n: slice,
    part: slice,
    scratch: Scratch,
) -> None:
    # In two steps: the map is read once, in order, and then from the cache.
    rows = scratch.take("rows", values[n, part].shape, packed[0].dtype)
    widen(rows, values[n, part])
    per_n, per_channel, per_row, item = rows.strides
    for block, array in zip(group.blocks, packed, strict=True):
        if array.size == 0:
            continue
        across, columns = block.across, block.columns(which)
        is_target = (which == 2) == block.mirrored
        first = columns.start + (across.start if is_target else across.window) * columns.step
        step = columns.step * item
        tiles = np.ndarray(
            (len(rows), across.repeat, *rows.shape[1:3], array.shape[4]),
            rows.dtype,
            rows,
            first * item,
            (per_n, across.size * step, per_channel, per_row, step),
        )
        target = array[n, :, part] if is_target else array[n, :, part, :, ::-1]
        target[...] = tiles
        if hide is not None:
            _clear_untouched(target, group, block, hide)


def _map_parts(fmap: Array) -> list[tuple[slice, slice]]:
    """Split a map into (samples, channels) small enough to stay in the cache between copies."""
    batch, channels, rows, columns = fmap.shape
    planes = max(1, COPY_ELEMENTS // max(1, rows * columns))
    return list(product(spans(batch, max(1, planes // channels)), spans(channels, planes)))


def _planes(shape: tuple[int, ...]) -> list[tuple[slice, slice, slice]]:
    """Split (N, P, Q, rows, columns) into (samples, displacements p, displacements q)."""
    batch, patch_y, patch_x, rows, columns = shape
    planes = max(1, COPY_ELEMENTS // (rows * columns))
    return list(
        product(
            spans(batch, max(1, planes // (patch_y * patch_x))),
            spans(patch_y, max(1, planes // patch_x)),
            spans(patch_x, planes),
        )
    )


def _volume_shape(cost_shape: tuple[int, ...], step: Step) -> tuple[int, ...]:
    return (*cost_shape[:3], step.lattice_y.size, step.lattice_x.size)
