"""The flow-guided lookup and its gradients on the CPU.

A unit of work takes a *chunk*: some positions that look at the same map, on one level.

1. Sort the positions by the block of cells that they look at. All positions of a block read the
   cells of one window, wherever they come from: smooth flow or not.
2. Multiply each window by the columns of fmap1 that belong to its block: one matrix product.
3. Take each position's own costs out of the products, and interpolate them.

The gradients go the same way back. Nothing is added by two threads: the gradient of fmap1 belongs
to the positions, that of a level is cut into bands of rows, which are added in order.

Sums of products may hold zeros times infinities, of cells that are no terms. What is not finite is
therefore computed anew, term by term. The engine trusts its arguments; arrays may have any strides.
A uint16 array holds the bits of bfloat16 numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupycorr.cpu.places import Places, by_rows, is_finite
from cupycorr.cpu.plan import BATCH_BYTES, PRODUCT, spans
from cupycorr.cpu.pooling import ELEMENTS
from cupycorr.cpu.taps import accumulator, store, widen
from cupycorr.cpu.threads import Scratch, Team, Unit, thread_count
from cupycorr.cpu.windows import WHOLE, Windows, chunk_size
from cupycorr.geometry import Pair
from cupycorr.lookup import Lookup

Array = npt.NDArray[Any]

BAND = 32
"""Rows of a level's gradient in which the windows of a band begin, or a multiple of it."""


def run(
    what: str,
    arrays: Mapping[str, Any],
    lookup: Lookup,
    scale: float,
    *,
    threads: int | None = None,
) -> None:
    """Compute a lookup's result into arrays.

    Parameters
    ----------
    what : {"cost", "grads"}
        The cost; or the gradients, for an upstream gradient.
    arrays : mapping of name to array
        Inputs "fmap1" (A, C, *P), "levels", a sequence of maps (F, C, H, W), "coords" (E, 2, *P),
        "index1" and "index2", (E,) of ints, or None, and for "grads" "grad_cost"
        (E, levels, PH, PW, *P), or (E, levels, PW, PH, *P) in the order "xy". Results, which are
        written: "cost", alike, or those of "grad_fmap1", "grad_levels" and "grad_coords" that are
        there and not None. Maps, costs and their gradients have one dtype,
        float16|float32|float64, or uint16 for bfloat16; the others that of coords, float32, or
        float64 with float64 maps.
    lookup : Lookup
        What is computed.
    scale : float
        What costs are multiplied by.
    threads : int, optional
        Threads to use at most; by default as many as NumPy's BLAS.
    """
    grads = arrays.get("grad_levels")
    names = ("cost",) if what == "cost" else ("grad_fmap1", "grad_coords")
    results = [array for array in (*map(arrays.get, names), *(grads or ())) if array is not None]
    if 0 in arrays["fmap1"].shape or 0 in arrays["coords"].shape:
        for result in results:
            result.fill(0)
        return
    call = _Call(arrays, lookup, scale, one_row=arrays.get("grad_coords") is None)
    with Team(call.multiply_adds * len(results), threads) as team:
        call.pack_vectors(team)
        if what == "cost":
            for scenes in call.batches(team):
                team.work(
                    [
                        partial(call.look, scene, chunk, level)
                        for scene in scenes
                        for chunk in scene.chunks
                        for level in range(lookup.levels)
                    ]
                )
        else:
            _differentiate(call, arrays, team)


class _Chunk(NamedTuple):
    """Positions that look at one map: of one edge, or all positions of some edges."""

    edges: npt.NDArray[np.intp]
    positions: slice


class _Scene(NamedTuple):
    """The chunks that look at one map of fmap2, and its levels, (h, w, C) each."""

    number: int
    chunks: list[_Chunk]
    levels: list[Array]


class _Call:
    """The arrays of a call, with positions along one axis."""

    def __init__(
        self, arrays: Mapping[str, Any], lookup: Lookup, scale: float, one_row: bool
    ) -> None:
        self.lookup, self.scale, self.one_row = lookup, scale, one_row
        self.fmap1, self.coords = _flat(arrays["fmap1"]), _flat(arrays["coords"])
        self.levels: Sequence[Array] = arrays["levels"]
        self.index1: Any = arrays.get("index1")
        self.index2: Any = arrays.get("index2")
        volume = arrays["grad_cost"] if "grad_cost" in arrays else arrays["cost"]
        self.volume = by_rows(volume, lookup)
        """The cost, or its gradient, (E, levels, PH, PW, P)."""
        self.dtype = accumulator(self.fmap1.dtype)
        self.count = self.fmap1.shape[2]
        """Positions of an edge."""
        self.multiply_adds = self.coords.size * prod(lookup.patch_size) * self.fmap1.shape[1]
        self.vectors: list[Array] = []
        """fmap1 in the accumulator's dtype: (C, P) per map, or all maps side by side."""
        self.product = PRODUCT if thread_count() > 1 else WHOLE
        self.scenes = list(self._scenes())

    def _scenes(self) -> Iterator[_Scene]:
        size, edges = chunk_size(self.lookup), np.arange(len(self.coords))
        parts = spans(self.count, size)
        if self.index2 is None:
            seen, groups = edges, np.split(edges, edges[1:])
        else:
            order = np.argsort(self.index2, kind="stable")
            seen, starts = np.unique(self.index2[order], return_index=True)
            groups = np.split(order, starts[1:])
        together = max(1, size // self.count)
        for number, group in zip(seen.tolist(), groups, strict=True):
            groups_of_edges = (group[part] for part in spans(len(group), together))
            chunks = [_Chunk(part, at) for part in groups_of_edges for at in parts]
            yield _Scene(number, chunks, [])

    @property
    def joint(self) -> bool:
        """Whether a chunk may have several edges."""
        return self.index2 is not None and 2 * self.count <= chunk_size(self.lookup)

    def pack_vectors(self, team: Team) -> None:
        """Bring fmap1 into the accumulator's dtype, each channel's positions side by side."""
        maps, channels, count = self.fmap1.shape
        if self.joint:
            joint = team.arena.take("vectors", (channels, maps, count), self.dtype)
            team.work([partial(_copy, joint[c], self.fmap1[:, c]) for c in range(channels)])
            self.vectors = [joint.reshape(channels, -1)]
        elif self.fmap1.dtype == self.dtype and self.fmap1[0].flags.c_contiguous:
            self.vectors = list(self.fmap1)
        else:
            packed = team.arena.take("vectors", self.fmap1.shape, self.dtype)
            team.work([partial(_copy, *pair) for pair in zip(packed, self.fmap1, strict=True)])
            self.vectors = list(packed)

    def batches(self, team: Team, nbytes: int = 0) -> Iterator[list[_Scene]]:
        """Give scenes with levels, some at a time: as many as `plan.BATCH_BYTES` allow.

        ``nbytes`` is what the caller keeps per position of a scene.
        """
        shapes = [level.shape[1:] for level in self.levels]
        is_ready = all(
            level.dtype == self.dtype and level.strides[1] == self.dtype.itemsize
            for level in self.levels
        )
        size = 0 if is_ready else self.dtype.itemsize * sum(map(prod, shapes))
        batch: list[_Scene] = []
        total = 0
        for scene in self.scenes:
            positions = sum(len(chunk.edges) for chunk in scene.chunks) * self.count
            needed = size + nbytes * positions
            if batch and total + needed > BATCH_BYTES:
                yield self._with_levels(batch, is_ready, team)
                batch, total = [], 0
            batch.append(scene)
            total += needed
        yield self._with_levels(batch, is_ready, team)

    def _with_levels(self, scenes: list[_Scene], is_ready: bool, team: Team) -> list[_Scene]:
        units: list[Unit] = []
        batch = []
        for k, scene in enumerate(scenes):
            levels = [np.moveaxis(level[scene.number], 0, -1) for level in self.levels]
            if not is_ready:
                packed = [
                    team.arena.take((k, number), level.shape, self.dtype)
                    for number, level in enumerate(levels)
                ]
                for whole, level in zip(packed, levels, strict=True):
                    parts = spans(len(level), max(1, ELEMENTS // max(1, level[:1].size)))
                    units += [partial(_copy, whole[part], level[part]) for part in parts]
                levels = packed
            batch.append(scene._replace(levels=levels))
        team.work(units)
        return batch

    def windows(self, scene: _Scene, chunk: _Chunk, level: int) -> Windows:
        """Return where the positions of a chunk look."""
        coords = _of_chunk(self.coords, chunk)
        size = self.levels[level].shape[2:]
        places = Places(coords, level, size, self.lookup, self.one_row)
        return Windows(places, self.lookup, self.product)

    def columns(self, chunk: _Chunk, order: npt.NDArray[np.intp], scratch: Scratch) -> Array:
        """Return the vectors (C, n) of a chunk's positions, in some order."""
        first = chunk.edges if self.index1 is None else self.index1[chunk.edges]
        if self.joint:
            vectors, places = self.vectors[0], first[:, None] * self.count
            order = (places + np.arange(self.count)).reshape(-1)[order]
        else:
            vectors, order = self.vectors[int(first[0])], order + chunk.positions.start
        columns = scratch.take("columns", (len(vectors), order.size), self.dtype)
        return np.take(vectors, order, axis=1, out=columns, mode="clip")

    def look(self, scene: _Scene, chunk: _Chunk, level: int, scratch: Scratch) -> None:
        """Compute the cost of a chunk on a level."""
        windows = self.windows(scene, chunk, level)
        columns = self.columns(chunk, windows.order, scratch)
        taps = windows.values(scene.levels[level], columns, scratch)
        volume = self.volume[:, level]
        if len(chunk.edges) == 1 and volume.dtype == self.dtype:
            out = volume[chunk.edges[0], ..., chunk.positions]
            windows.places.interpolate(taps, self.scale, out, scratch)
            return
        shape = (*self.volume.shape[2:4], windows.order.size)
        cost = scratch.take("cost", shape, self.dtype)
        windows.places.interpolate(taps, self.scale, cost, scratch)
        _to_chunk(volume, chunk, cost)

    def grad(self, chunk: _Chunk, level: int) -> Array:
        """Return the gradient of a chunk's cost on a level, (PH, PW, n), in the sums' dtype."""
        grad = _of_chunk(self.volume[:, level], chunk)
        if grad.dtype == self.dtype:
            return grad
        wide = np.empty(grad.shape, self.dtype)
        widen(wide, grad)
        return wide


def _differentiate(call: _Call, arrays: Mapping[str, Any], team: Team) -> None:
    """Compute the gradients that ``arrays`` has."""
    grads = _Gradients(*map(arrays.get, ("grad_fmap1", "grad_levels", "grad_coords")))
    channels, maps = call.fmap1.shape[1], {scene.number for scene in call.scenes}
    # Several edges may have one map of fmap1: their gradients are added in order.
    shared = grads.fmap1 is not None and call.index1 is not None
    sums = np.zeros(call.fmap1.shape if shared else (0,), call.dtype)
    for grad in grads.levels or ():
        for number in {*range(len(grad))} - maps:
            grad[number] = 0
    for scenes in call.batches(team, call.dtype.itemsize * (channels if shared else 16)):
        looks = [_Look(scene, chunk, []) for scene in scenes for chunk in scene.chunks]
        team.work([partial(_sort, call, look) for look in looks])
        if shared:
            for k, look in enumerate(looks):
                shape = channels, look.windows[0].order.size
                looks[k] = look._replace(sums=team.arena.take(("sums", k), shape, call.dtype))
        if grads.fmap1 is not None or grads.coords is not None:
            team.work([partial(_differentiate_positions, call, grads, look) for look in looks])
        for look in looks if shared else ():
            _add(sums, call, look)
        if grads.levels is not None:
            for scene in scenes:
                seen = [look for look in looks if look.scene is scene]
                _differentiate_levels(call, grads.levels, seen, team)
    if grads.fmap1 is not None and shared:
        store(_flat(grads.fmap1), sums, 1)


class _Gradients(NamedTuple):
    """The results, as far as they are wanted."""

    fmap1: Array | None
    levels: Sequence[Array] | None
    coords: Array | None


class _Look(NamedTuple):
    """A chunk, and where it looks on each level."""

    scene: _Scene
    chunk: _Chunk
    windows: list[Windows]
    sums: Any = None
    """Memory for the gradient of fmap1 (C, n), if that is added to others'."""


def _sort(call: _Call, look: _Look, scratch: Scratch) -> None:
    for level in range(call.lookup.levels):
        look.windows.append(call.windows(look.scene, look.chunk, level))


def _differentiate_positions(call: _Call, grads: _Gradients, look: _Look, scratch: Scratch) -> None:
    """Compute what belongs to a chunk's positions: the gradients of fmap1 and of coords."""
    scene, chunk, _, sums = look
    count, channels = look.windows[0].order.size, call.fmap1.shape[1]
    grad_coords = np.zeros((2, count), call.dtype)
    keeps = sums is not None
    if not keeps:
        sums = scratch.take("sums", (channels, count), call.dtype)
    sums.fill(0)
    for level, windows in enumerate(look.windows):
        grad, fmap = call.grad(chunk, level), scene.levels[level]
        if grads.coords is not None:
            taps = windows.values(fmap, call.columns(chunk, windows.order, scratch), scratch)
            for axis, slope in enumerate(windows.places.slopes(taps)):
                factor = call.scale / call.lookup.pool[1 - axis] ** level
                along = np.einsum("jip,jip->p", grad, slope)
                grad_coords[axis] += along * call.dtype.type(factor)
        if grads.fmap1 is not None:
            at_windows = scratch.take("at windows", sums.shape, call.dtype)
            windows.adjoint(grad, call.scale, fmap, at_windows, scratch)
            back = np.empty(count, np.intp)
            back[windows.order] = np.arange(count)
            part = scratch.take("columns", sums.shape, call.dtype)
            sums += np.take(at_windows, back, axis=1, out=part, mode="clip")
    if grads.coords is not None:
        lost = np.isnan(_of_chunk(call.coords, chunk)).any(0)
        grad_coords[:, lost] = np.nan
        _to_chunk(_flat(grads.coords), chunk, grad_coords)
    if grads.fmap1 is not None and not keeps:
        _to_chunk(_flat(grads.fmap1), chunk, sums)


def _add(sums: Array, call: _Call, look: _Look) -> None:
    """Add a chunk's gradient of fmap1 to the maps (A, C, P) of its edges."""
    edges, positions = look.chunk
    parts = np.split(look.sums, len(edges), axis=1)
    for number, part in zip(call.index1[edges].tolist(), parts, strict=True):
        sums[number][:, positions] += part


def _differentiate_levels(
    call: _Call, grads: Sequence[Array], looks: list[_Look], team: Team
) -> None:
    """Compute the gradients of the levels of one scene, each in bands of rows."""
    reach, number = call.lookup.reach[0], looks[0].scene.number
    step = max(BAND, -(-2 * reach // BAND) * BAND)
    units: list[Unit] = []
    stores: list[Unit] = []
    for level, grad in enumerate(grads):
        out = np.moveaxis(grad[number], 0, -1)
        rows = max(look.windows[level].shape[0] for look in looks)
        bands = []
        for top in range(-2 * reach - 2, len(out), step):
            low, high = max(0, top), min(len(out), top + step - 1 + rows)
            if low < high:
                shape = high - low, *out.shape[1:]
                sums = team.arena.take(("band", level, top), shape, call.dtype)
                bands.append((low, sums))
                units.append(
                    partial(_differentiate_band, call, looks, level, (top, top + step), low, sums)
                )
        parts = spans(len(out), max(1, ELEMENTS // max(1, out[:1].size)))
        stores += [partial(_join, out, bands, part) for part in parts]
    team.work(units)
    team.work(stores)


def _differentiate_band(
    call: _Call,
    looks: list[_Look],
    level: int,
    tops: Pair,
    low: int,
    sums: Array,
    scratch: Scratch,
) -> None:
    """Add up the gradient of the windows whose first row is in a range, on rows from ``low`` on."""
    for careful in (False, True):
        sums.fill(0)
        for look in looks:
            windows = look.windows[level]
            bins = [place for place in windows.bins if tops[0] <= place[2] < tops[1]]
            if bins:
                part = slice(bins[0][0], bins[-1][1])
                columns = call.columns(look.chunk, windows.order[part], scratch)
                grad = call.grad(look.chunk, level)
                windows.add_adjoint(grad, call.scale, columns, bins, sums, low, scratch, careful)
        if is_finite(sums):
            return


def _join(out: Array, bands: list[tuple[int, Array]], rows: slice, scratch: Scratch) -> None:
    """Add bands, which begin at some rows, in order, and store some rows of their sum."""
    total = np.zeros((rows.stop - rows.start, *out.shape[1:]), bands[0][1].dtype)
    for low, sums in bands:
        begin, end = max(low, rows.start), min(low + len(sums), rows.stop)
        if begin < end:
            total[begin - rows.start : end - rows.start] += sums[begin - low : end - low]
    store(out[rows], total, 1)


def _flat(array: Array) -> Array:
    """Return an array (X, Y, *P) with the positions along one axis; a view if it is contiguous."""
    return array.reshape(*array.shape[:2], -1)


def _copy(out: Array, values: Array, scratch: Scratch) -> None:
    widen(out, values)


def _of_chunk(array: Array, chunk: _Chunk) -> Array:
    """Return what an array (E, ..., P) has for a chunk's positions, (..., n)."""
    if len(chunk.edges) == 1:
        part: Array = array[chunk.edges[0], ..., chunk.positions]
        return part
    joint = np.moveaxis(array[chunk.edges], 0, -2)
    return joint.reshape(*joint.shape[:-2], -1)


def _to_chunk(array: Array, chunk: _Chunk, values: Array) -> None:
    """Round and store values (..., n) of a chunk's positions in an array (E, ..., P)."""
    if len(chunk.edges) == 1:
        store(array[chunk.edges[0], ..., chunk.positions], values, 1)
        return
    joint = values.reshape(*values.shape[:-1], len(chunk.edges), -1)
    for edge, part in zip(chunk.edges, np.moveaxis(joint, -2, 0), strict=True):
        store(array[edge], part, 1)
