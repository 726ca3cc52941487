"""The cost volume and its gradients on the CPU.

Work is done in *chunks*: some samples, displacements and output rows, few enough that all scratch
memory stays within `CHUNK_BYTES` or so, whatever the size of the problem. Each goes through three
stages, in each of which all threads share the work:

1. pack: copy the positions of the maps that matter to dense blocks, in the accumulator's type
   (for the gradients also: spread the cost's gradient over the taps of the windows);
2. multiply: matrix products of tiles with their windows, see `numpy_bands`;
3. store: sum the products over the taps of the windows, divide, round, and write the result.

The engine trusts its arguments; arrays may have any strides. A uint16 array holds the bits of
bfloat16 numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupycorr import numpy_bands
from cupycorr.geometry import Axis, Geometry, Lattice, Phase
from cupycorr.numpy_bands import Block, Tiles
from cupycorr.parallel import Arena, Runner, Scratch, Unit, run_here, thread_count, workers

Array = npt.NDArray[Any]

CHUNK_BYTES = 24 << 20
"""What a chunk's scratch arrays should take together; also small enough to stay in the cache."""
BATCH_BYTES = 6 << 20
"""Samples are taken together in a chunk while their scratch arrays stay below this."""
WORTH_THREADS = 4_000_000
"""Multiply-adds from which on several threads are used."""


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
    with _runner(fmap1.shape, geometry, threads) as run:
        arena = Arena()
        for chunk in _chunks(fmap1.shape, geometry, _accumulator(cost).itemsize):
            arena.reset()
            _forward_chunk(fmap1, fmap2, cost, chunk, divisor, run, arena)


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
    wanted = [g for g in (grad_fmap1, grad_fmap2) if g is not None]
    if 0 in fmap1.shape or not wanted:
        for grad in wanted:
            grad.fill(0)
        return
    gradients = [
        _Gradient(fmap2, grad_fmap1, mirrored=False) if grad_fmap1 is not None else None,
        _Gradient(fmap1, grad_fmap2, mirrored=True) if grad_fmap2 is not None else None,
    ]
    with _runner(fmap1.shape, geometry, threads) as run:
        arena = Arena()
        for chunk in _chunks(fmap1.shape, geometry, _accumulator(fmap1).itemsize):
            arena.reset()
            _backward_chunk(grad_cost, [g for g in gradients if g], chunk, divisor, run, arena)


def _runner(shape: tuple[int, ...], geometry: Geometry, threads: int | None) -> Any:
    if geometry.multiply_adds(shape) < WORTH_THREADS:
        return nullcontext(run_here)
    return workers(thread_count() if threads is None else threads)


# Chunks: parts of the cost volume.


class Chunk(NamedTuple):
    """Part of the cost volume, with the lattices that its products lie on."""

    samples: slice
    patch_y: slice
    patch_x: slice
    rows: slice
    lattices_y: tuple[Lattice, ...]
    lattices_x: tuple[Lattice, ...]
    first: bool
    """Whether no earlier chunk has to do with these samples."""
    last: bool
    """Whether no later chunk has to do with these samples."""

    def of(self, cost: Array) -> Array:
        """Return the chunk's part of a cost volume."""
        return cost[self.samples, self.patch_y, self.patch_x, self.rows]

    def volume_shape(self, lattice_y: Lattice, lattice_x: Lattice) -> tuple[int, ...]:
        """Return the shape of the chunk's products on a pair of lattices."""
        spans = (self.samples, self.patch_y, self.patch_x)
        return (*(s.stop - s.start for s in spans), lattice_y.size, lattice_x.size)


def _chunks(shape: tuple[int, ...], geometry: Geometry, itemsize: int) -> Iterator[Chunk]:
    batch, channels, height, width = shape
    _, patch_y, patch_x, rows, columns = geometry.cost_shape(shape)
    size = [patch_y, patch_x, rows]

    def scratch_bytes() -> int:
        y, x = geometry.y, geometry.x
        lattice_rows = size[2] * max(1, y.stride // y.dilation_patch) + y.window_extent
        windows = min(height, lattice_rows * y.stride + size[0] * y.dilation_patch)
        packed = channels * width * (min(height, lattice_rows * y.stride) + 2 * windows)
        volume = size[0] * size[1] * lattice_rows * (columns + x.window_extent)
        return itemsize * (packed + volume)

    # Rows are cut while their windows overlap little, then the patch, then rows to the last.
    for axis, least in ((2, 2 * patch_y), (0, 1), (1, 1), (2, 1)):
        while size[axis] > least and scratch_bytes() > CHUNK_BYTES:
            size[axis] = max(least, -(-size[axis] // 2))
    samples = max(1, BATCH_BYTES // scratch_bytes())
    for first in range(0, batch, samples):
        parts = list(
            product(_parts(patch_y, size[0]), _parts(patch_x, size[1]), _parts(rows, size[2]))
        )
        for number, (p, q, h) in enumerate(parts):
            yield Chunk(
                slice(first, min(batch, first + samples)),
                p,
                q,
                h,
                geometry.y.patch_part(p).lattices(height, h.start, h.stop),
                geometry.x.patch_part(q).lattices(width, 0, columns),
                number == 0,
                number == len(parts) - 1,
            )


def _parts(count: int, size: int) -> list[slice]:
    return [slice(i, min(count, i + size)) for i in range(0, count, size)]


# Pieces: blocks of tiles with their packed maps.


class _Piece(NamedTuple):
    """A block of tiles, its phases, and its packed arrays (sample, C, rows, columns)."""

    y: Phase
    x: Phase
    block: Block
    targets: Array
    source: Array


def _pieces(
    lattice_y: Lattice,
    lattice_x: Lattice,
    samples: int,
    channels: int,
    dtype: np.dtype[Any],
    arena: Arena,
    *,
    adjoint: bool = False,
    mirrored: bool = False,
) -> list[_Piece]:
    pieces = []
    for y, x in product(lattice_y.phases, lattice_x.phases):
        for block in numpy_bands.blocks(
            channels, y.band, x.band, dtype.itemsize, adjoint=adjoint, mirrored=mirrored
        ):
            targets = arena.take((samples, channels, *block.target_shape), dtype)
            source = arena.take((samples, channels, *block.source_shape), dtype)
            pieces.append(_Piece(y, x, block, targets, source))
    return pieces


def _channel_parts(channels: int, pieces: list[_Piece]) -> list[slice]:
    """Split the channels such that one part of a map stays in the cache while it is copied."""
    positions = sum(p.source[0, 0].size for p in pieces)
    size = max(1, min(-(-channels // 4), (1 << 16) // max(1, positions)))
    return _parts(channels, size)


def _multiply_units(pieces: list[_Piece], work: Any) -> list[Unit]:
    """Return units that call ``work(piece, sample, tiles, scratch)`` for every row of tiles."""
    units: list[Unit] = []
    for n in range(pieces[0].source.shape[0] if pieces else 0):
        for piece in pieces:
            for tiles in numpy_bands.cover(piece.block.y, piece.block.tiling.rows):
                units.append(partial(work, piece, n, tiles))
    return units


# Forward.


def _forward_chunk(
    fmap1: Array,
    fmap2: Array,
    cost: Array,
    chunk: Chunk,
    divisor: int,
    run: Runner,
    arena: Arena,
) -> None:
    dtype = _accumulator(cost)
    channels = fmap1.shape[1]
    map1, map2, out = fmap1[chunk.samples], fmap2[chunk.samples], chunk.of(cost)
    pairs = list(product(chunk.lattices_y, chunk.lattices_x))
    total = np.zeros(out.shape, dtype) if len(pairs) > 1 else None
    for number, (lattice_y, lattice_x) in enumerate(pairs):
        pieces = _pieces(lattice_y, lattice_x, len(out), channels, dtype, arena)
        volume = arena.take(chunk.volume_shape(lattice_y, lattice_x), dtype)

        def pack(n: int, part: slice, scratch: Scratch, pieces=pieces) -> None:
            for y, x, block, targets, source in pieces:
                here = map1[n, part, y.image1, x.image1][:, :, block.target_columns]
                there = map2[n, part, y.image2, x.image2][:, :, block.source_columns]
                _widen(targets[n, part], here)
                _widen(source[n, part, :, ::-1], there)

        def work(piece: _Piece, n: int, tiles: Tiles, scratch: Scratch, volume=volume) -> None:
            y, x, block, targets, source = piece
            where = volume[n, y.patch, x.patch, y.lattice, x.lattice]
            numpy_bands.multiply(
                block, tiles, targets[n], source[n], where[..., block.target_columns], scratch
            )

        def store(
            n: int,
            p: int,
            q: slice,
            scratch: Scratch,
            lattice_y=lattice_y,
            lattice_x=lattice_x,
            volume=volume,
            number=number,
        ) -> None:
            sums = _sum_taps(volume[n, p, q], lattice_y, lattice_x)
            if total is not None:
                total[n, p, q] += sums
                sums = total[n, p, q]
            if number == len(pairs) - 1:
                _store(out[n, p, q], sums, divisor)

        pairs_inside = sum(y.band.pairs for y in lattice_y.phases) * sum(
            x.band.pairs for x in lattice_x.phases
        )
        if pairs_inside < volume[0].size:
            volume.fill(0)
        run(
            [partial(pack, n, c) for n in range(len(out)) for c in _channel_parts(channels, pieces)]
        )
        run(_multiply_units(pieces, work))
        run([partial(store, *place) for place in _planes(out)])


def _planes(cost: Array) -> list[tuple[int, int, slice]]:
    """Split the planes of a cost volume among units: (sample, p, slice of q)."""
    samples, patch_y, patch_x = cost.shape[:3]
    size = max(1, min(patch_x, (1 << 16) // max(1, cost[0, 0, 0].size)))
    return list(product(range(samples), range(patch_y), _parts(patch_x, size)))


def _sum_taps(volume: Array, lattice_y: Lattice, lattice_x: Lattice) -> Array:
    """Sum over the taps of each window: (Q, lattice rows, columns) to (Q, OH, OW)."""
    for taps, axis in ((lattice_y.taps, 1), (lattice_x.taps, 2)):
        parts = [volume[:, tap] if axis == 1 else volume[:, :, tap] for tap in taps]
        if len(parts) > 1:
            volume = parts[0] + parts[1]
            for part in parts[2:]:
                volume += part
        else:
            volume = parts[0]
    return volume


# Backward.


class _Gradient:
    """One of the two gradients, and how it accumulates over chunks."""

    def __init__(self, source: Array, out: Array, *, mirrored: bool) -> None:
        self.source = source
        self.out = out
        self.mirrored = mirrored
        self.sums: Array = out

    def begin(self, samples: slice) -> None:
        """Make the accumulator of some samples: the output itself where precision allows."""
        out = self.out[samples]
        dtype = _accumulator(out)
        self.sums = out if out.dtype == dtype else np.empty(out.shape, dtype)


def _backward_chunk(
    grad_cost: Array,
    gradients: list[_Gradient],
    chunk: Chunk,
    divisor: int,
    run: Runner,
    arena: Arena,
) -> None:
    dtype = _accumulator(grad_cost)
    upstream = chunk.of(grad_cost)
    samples = len(upstream)
    pairs = list(product(chunk.lattices_y, chunk.lattices_x))
    for number, (lattice_y, lattice_x) in enumerate(pairs):
        first = chunk.first and number == 0
        last = chunk.last and number == len(pairs) - 1
        volume = arena.take(chunk.volume_shape(lattice_y, lattice_x), dtype)

        def spread(
            n: int,
            p: int,
            q: slice,
            scratch: Scratch,
            volume=volume,
            lattice_y=lattice_y,
            lattice_x=lattice_x,
        ) -> None:
            _spread_taps(volume[n, p, q], upstream[n, p, q], lattice_y, lattice_x)

        units: list[Unit] = [partial(spread, *place) for place in _planes(upstream)]
        stages = []
        for gradient in gradients:
            if first:
                gradient.begin(chunk.samples)
            stage = _GradientStage(
                gradient, chunk, lattice_y, lattice_x, volume, arena, divisor, first, last
            )
            units += stage.pack_units()
            stages.append(stage)
        run(units)
        run([unit for stage in stages for unit in _multiply_units(stage.pieces, stage.work)])
        run([unit for stage in stages for unit in stage.store_units()])


class _GradientStage:
    """The work of one chunk and lattice for one gradient."""

    def __init__(
        self,
        gradient: _Gradient,
        chunk: Chunk,
        lattice_y: Lattice,
        lattice_x: Lattice,
        volume: Array,
        arena: Arena,
        divisor: int,
        first: bool,
        last: bool,
    ) -> None:
        self.mirrored = gradient.mirrored
        self.map = gradient.source[chunk.samples]
        self.out = gradient.out[chunk.samples]
        self.sums = gradient.sums
        self.volume, self.divisor, self.first, self.last = volume, divisor, first, last
        samples, self.channels, height, width = self.map.shape
        self.pieces = _pieces(
            lattice_y,
            lattice_x,
            samples,
            self.channels,
            volume.dtype,
            arena,
            adjoint=True,
            mirrored=self.mirrored,
        )
        self.untouched = lattice_y.untouched, lattice_x.untouched
        covered = sum(p.targets[0, 0].size for p in self.pieces)
        once = len({self._targets(p) for p in self.pieces}) == len(self.pieces)
        self.complete = once and covered == height * width

    def _targets(self, piece: _Piece) -> tuple[int, ...]:
        rows, columns = self._target_slices(piece)
        return rows.start, rows.step, columns.start, columns.step, piece.block.across.start

    def _target_slices(self, piece: _Piece) -> tuple[slice, slice]:
        y, x = piece.y, piece.x
        return (y.image2, x.image2) if self.mirrored else (y.image1, x.image1)

    def pack_units(self) -> list[Unit]:
        def pack(n: int, part: slice, scratch: Scratch) -> None:
            for y, x, block, _, source in self.pieces:
                rows, columns = (y.image1, x.image1) if self.mirrored else (y.image2, x.image2)
                forwards = source[n, part, :, ::-1]
                _widen(forwards, self.map[n, part, rows, columns][:, :, block.source_columns])
                if self.mirrored:
                    self._clear_untouched(forwards, y, x, block.source_columns)

        parts = _channel_parts(self.channels, self.pieces)
        return [partial(pack, n, part) for n in range(len(self.map)) for part in parts]

    def work(self, piece: _Piece, n: int, tiles: Tiles, scratch: Scratch) -> None:
        values = self._values(piece, n)
        numpy_bands.multiply_adjoint(
            piece.block, tiles, values, piece.source[n], piece.targets[n], scratch
        )

    def _values(self, piece: _Piece, n: int) -> Array:
        """View the volume as (P, Q, target rows, columns)."""
        y, x, block = piece.y, piece.x, piece.block
        volume = self.volume[n, y.patch, x.patch, y.lattice, x.lattice]
        if not self.mirrored:
            return volume[..., block.target_columns]
        # Target j of displacement p belongs to position j - p - shift. Rows that do not exist lie
        # in the neighbouring displacements' planes; no product reads them.
        corner = volume[..., -y.band.shift :, -x.band.shift :]
        per_p, per_q, per_row, per_column = volume.strides
        skewed = np.lib.stride_tricks.as_strided(
            corner,
            (*volume.shape[:2], y.band.count2, x.band.count2),
            (per_p - per_row, per_q - per_column, per_row, per_column),
            writeable=False,
        )
        return skewed[..., block.target_columns]

    def store_units(self) -> list[Unit]:
        def store(n: int, part: slice, scratch: Scratch) -> None:
            sums = self.sums[n, part]
            if self.first and not self.complete:
                sums[...] = 0
            for piece in self.pieces:
                block, result = piece.block, piece.targets[n, part]
                flat = result.reshape(-1)
                if block.tiling.as_matrix and not np.isfinite(np.dot(flat, flat)):
                    self._multiply_again(piece, n, part, result)
                rows, columns = self._target_slices(piece)
                target = sums[:, rows, columns][:, :, block.target_columns]
                if self.first and self.complete:
                    target[...] = result
                else:
                    target += result
            if self.last and (self.divisor != 1 or self.out is not self.sums):
                _store(self.out[n, part], sums, self.divisor)

        parts = _channel_parts(self.channels, self.pieces)
        return [partial(store, n, part) for n in range(len(self.map)) for part in parts]

    def _multiply_again(self, piece: _Piece, n: int, part: slice, result: Array) -> None:
        """Redo products such that a NaN or infinity stays with the targets that it belongs to."""
        (tiles,) = numpy_bands.cover(piece.block.y, piece.block.y.count1)
        numpy_bands.multiply_adjoint_by_shifts(
            piece.block, tiles, self._values(piece, n), piece.source[n, part], result
        )
        if not self.mirrored:
            self._clear_untouched(result, piece.y, piece.x, piece.block.target_columns)

    def _clear_untouched(self, packed: Array, y: Phase, x: Phase, columns: slice) -> None:
        """Zero the positions of the first map that no tap touches."""
        rows, cols = self.untouched
        if rows:
            packed[:, np.isin(_indices(y.lattice), rows)] = 0
        if cols:
            packed[:, :, np.isin(_indices(x.lattice)[columns], cols)] = 0


def _indices(span: slice) -> npt.NDArray[np.intp]:
    return np.arange(span.start, span.stop, span.step)


def _spread_taps(volume: Array, grad: Array, lattice_y: Lattice, lattice_x: Lattice) -> None:
    """Adjoint of `_sum_taps`: (Q, OH, OW) to (Q, lattice rows, columns)."""
    if len(lattice_y.taps) == len(lattice_x.taps) == 1:
        _widen(volume, grad)
        return
    wide = np.empty(grad.shape, volume.dtype)
    _widen(wide, grad)
    rows = np.zeros((*wide.shape[:2], lattice_x.size), volume.dtype)
    for tap in lattice_x.taps:
        rows[:, :, tap] += wide
    volume.fill(0)
    for tap in lattice_y.taps:
        volume[:, tap] += rows


# Number formats.


def _accumulator(array: Array) -> np.dtype[Any]:
    """Return the dtype that sums of an array's values are formed in."""
    return array.dtype if array.dtype == np.float64 else np.dtype(np.float32)


def _widen(out: Array, values: Array) -> None:
    """Copy to the accumulator's dtype."""
    if values.dtype == np.uint16:
        np.left_shift(values, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(out, values)


def _store(out: Array, sums: Array, divisor: int) -> None:
    """Divide and round once to the storage dtype, to nearest even."""
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
