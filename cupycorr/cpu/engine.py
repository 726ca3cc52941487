"""The cost volume and its gradients on the CPU.

Work is done in chunks (`plan`) that bound the scratch memory. Each goes through three stages, in
each of which all threads share the work:

1. pack: copy the positions of the maps that matter to dense blocks, in the accumulator's dtype
   (`packing`); for the gradients also spread the cost's gradient over the taps;
2. multiply: products of tiles and their source blocks (`bands`);
3. store: sum the products over the taps, divide, round, and write the result.

Small maps go another way (`pairs`). Absolute differences are no matrix product; `l1` computes them.
The engine trusts its arguments; arrays may have any strides. A uint16 array holds the bits of
bfloat16 numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import count, product
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from cupycorr.cpu import bands, l1, pairs
from cupycorr.cpu.packing import clear_untouched, map_parts, packed, volume_parts
from cupycorr.cpu.plan import Group, Step, cover, plan, spans
from cupycorr.cpu.taps import accumulator, spread_taps, store, sum_taps
from cupycorr.cpu.threads import Scratch, Team, Unit
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
    if 0 in arrays["fmap1"].shape:
        for name in ("cost",) if what != "grads" else ("grad_fmap1", "grad_fmap2"):
            result = arrays.get(name)
            if result is not None:
                result.fill(0)
        return
    cost, grads = (l1.cost, l1.grads) if layer.l1 else (_cost, _grads)
    if not layer.l1 and pairs.fit(arrays["fmap1"].shape[1:], layer.geometry):
        cost = pairs.cost
        if what == "grads" and pairs.grads(arrays, layer, threads):
            return
    (grads if what == "grads" else cost)(arrays, layer, threads)


def _cost(arrays: Mapping[str, Any], layer: Layer, threads: int | None) -> None:
    fmap1, fmap2, cost = arrays["fmap1"], arrays["fmap2"], arrays["cost"]
    dtype, divisor = accumulator(cost.dtype), layer.divisor(fmap1.shape[1])
    work = plan(fmap1.shape[1:], layer.geometry, dtype.itemsize, False)
    with Team(len(fmap1) * work.multiply_adds, threads) as team:
        for samples, part in product(spans(len(fmap1), work.samples), work.parts):
            map1, map2 = fmap1[samples], fmap2[samples]
            out = cost[samples, part.patch_y, part.patch_x, part.rows]
            total = np.zeros(out.shape, dtype) if len(part.steps) > 1 else None
            for step in part.steps:
                names = count()
                # The products of one tap are the result, but for division and rounding.
                direct = total is None and step.taps == divisor == 1 and out.dtype == dtype
                shape = (*out.shape[:3], step.lattice_y.size, step.lattice_x.size)
                volume = out if direct else team.arena.take(next(names), shape, dtype)
                if not step.complete:
                    volume.fill(0)
                units: list[Unit] = []
                products: list[Unit] = []
                for group in step.targets[0].groups:
                    targets, pack_targets = packed(map1, 1, group, step, dtype, team.arena, names)
                    sources, pack_sources = packed(
                        map2, 2, group, step, dtype, team.arena, names, by_rows=True
                    )
                    units += pack_targets + pack_sources
                    values = _values(volume, group)
                    for n in spans(len(out), group.samples):
                        for tiles in group.down:
                            products.append(
                                partial(
                                    bands.multiply, group.blocks, tiles, n, targets, sources, values
                                )
                            )
                team.work(units)
                team.work(products)
                if not direct:
                    last = step is part.steps[-1]
                    team.work(
                        [
                            partial(
                                _store_cost, out[at], volume[at], step,
                                None if total is None else total[at], last, divisor,
                            )
                            for at in volume_parts(volume.shape)
                        ]
                    )  # fmt: skip


def _store_cost(
    out: Array,
    volume: Array,
    step: Step,
    total: Array | None,
    is_last: bool,
    divisor: int,
    scratch: Scratch,
) -> None:
    sums = sum_taps(volume, step.lattice_y, step.lattice_x)
    if total is not None:
        total += sums
        sums = total
    if is_last:
        store(out, sums, divisor)


def _grads(arrays: Mapping[str, Any], layer: Layer, threads: int | None) -> None:
    fmap1, fmap2, grad_cost = arrays["fmap1"], arrays["fmap2"], arrays["grad_cost"]
    dtype, divisor = accumulator(grad_cost.dtype), layer.divisor(fmap1.shape[1])
    gradients = []
    if arrays.get("grad_fmap1") is not None:
        gradients.append(_Gradient(1, fmap2, arrays["grad_fmap1"], divisor))
    if arrays.get("grad_fmap2") is not None:
        gradients.append(_Gradient(2, fmap1, arrays["grad_fmap2"], divisor))
    work = plan(fmap1.shape[1:], layer.geometry, dtype.itemsize, True)
    with Team(len(fmap1) * work.multiply_adds * len(gradients), threads) as team:
        for samples in spans(len(fmap1), work.samples):
            steps = [(part, step) for part in work.parts for step in part.steps]
            for gradient in gradients:
                gradient.enter(samples, only=len(steps) == 1)
            for part, step in steps:
                names = count()
                upstream = grad_cost[samples, part.patch_y, part.patch_x, part.rows]
                shape = (*upstream.shape[:3], step.lattice_y.size, step.lattice_x.size)
                volume = team.arena.take(next(names), shape, dtype)
                products = [
                    _Product(gradient, step, volume, team.arena, names) for gradient in gradients
                ]
                spread: list[Unit] = [
                    partial(spread_taps, volume[at], upstream[at], step.lattice_y, step.lattice_x)
                    for at in volume_parts(volume.shape)
                ]
                team.work(spread + [unit for one in products for unit in one.pack])
                team.work([unit for one in products for unit in one.multiply])
                team.work([unit for one in products for unit in one.add_units()])
            team.work([unit for gradient in gradients for unit in gradient.leave_units()])


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
        self.sums = None if only else np.zeros(self.out.shape, accumulator(self.out.dtype))

    def leave_units(self) -> list[Unit]:
        """Return the units that store the sums, if they are not stored yet."""
        if self.sums is None:
            return []
        return [
            partial(store, self.out[n, part], self.sums[n, part], self.divisor)
            for n, part in map_parts(self.out.shape)
        ]


class _Product:
    """The product of one step for one gradient: its packed arrays, and the units of its stages."""

    def __init__(
        self, gradient: _Gradient, step: Step, volume: Array, arena: Scratch, names: count[int]
    ) -> None:
        self.gradient, self.step = gradient, step
        self.targets = step.targets[gradient.which - 1]
        self.groups: list[tuple[Group, list[Array], list[Array], list[Array]]] = []
        self.pack: list[Unit] = []
        self.multiply: list[Unit] = []
        source, out = gradient.source, gradient.out
        for group in self.targets.groups:
            sources, units = packed(
                source, 3 - gradient.which, group, step, volume.dtype, arena, names
            )
            results = []
            for block in group.blocks:
                shape = (len(out), block.across.repeat, out.shape[1], *block.target_shape)
                results.append(arena.take(next(names), shape, volume.dtype))
            values = _values(volume, group)
            self.groups.append((group, sources, results, values))
            self.pack += units
            for n in spans(len(out), group.samples):
                for tiles in group.down:
                    self.multiply.append(
                        partial(
                            bands.multiply_adjoint,
                            group.blocks, tiles, n, values, sources, results,
                        )
                    )  # fmt: skip

    def add_units(self) -> list[Unit]:
        """Return the units that add the results to the sums, or store them if there are none."""
        rows = self.gradient.out[:, :, self.targets.rows]
        return [partial(self._add, n, part) for n, part in map_parts(rows.shape)]

    def _add(self, n: slice, part: slice, scratch: Scratch) -> None:
        out, sums, rows = self.gradient.out[n, part], self.gradient.sums, self.targets.rows
        gradient = scratch.take("rows", out[:, :, rows].shape, accumulator(out.dtype))
        self._assemble(gradient, n, part)
        if np.isnan(gradient.max(initial=0)):
            # An infinity times a zero beside the band is NaN: redo the products such that a NaN or
            # infinity stays with its own targets.
            for group, sources, results, values in self.groups:
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
        which = self.gradient.which
        for group, _, results, _ in self.groups:
            rows = group.images[which - 1]
            first = self.targets.rows.start
            places = gradient[:, :, rows.start - first : rows.stop - first : rows.step]
            for block, result in zip(group.blocks, results, strict=True):
                if which == 1 and self.step.hides:
                    clear_untouched(result[n, :, part], group, block, self.step)
                across = block.across
                place = places[..., block.images[which - 1]][..., across.targets]
                place = place.reshape(*place.shape[:3], across.repeat, across.size)
                values = result[n, :, part].transpose(0, 2, 3, 1, 4)
                if self.targets.partition:
                    place[...] = values
                else:
                    place += values


def _values(volume: Array, group: Group) -> list[Array]:
    """View the volume (N, P, Q, lattice rows, columns) as (N, P, Q, rows, columns) of targets.

    With targets in map 2 (``mirrored``), target j of displacement p belongs to position
    j - p - shift. Along one axis, with three positions m, three displacements p and shift 0, the
    view has five targets j; its row p begins p cells before row p of the volume::

        volume   p = 0   a0 a1 a2          view   j =    0   1   2   3   4
                 p = 1   b0 b1 b2                 p = 0  a0  a1  a2  b0  b1
                 p = 2   c0 c1 c2                 p = 1  a2  b0  b1  b2  c0
                                                  p = 2  b1  b2  c0  c1  c2

    Target j = 3 would meet position 3 at p = 0, which does not exist; in its place the view shows
    b0, of the next displacement. Such cells get into the band in source rows and columns that do
    not exist. `bands` leaves those out of the product, so no value reaches a result from there.
    """
    views = []
    for block in group.blocks:
        view = volume[block.volume]
        if block.mirrored:
            y, x = group.phase, block.phase
            per_n, per_p, per_q, per_row, per_column = view.strides
            view = as_strided(
                view[..., -y.band.shift :, -x.band.shift :],
                (*view.shape[:3], y.band.count2, x.band.count2),
                (per_n, per_p - per_row, per_q - per_column, per_row, per_column),
                writeable=False,
            )
        views.append(view[..., block.across.targets])
    return views
