"""How the NumPy engine cuts its work: chunks, lattices, blocks, tiles. All strategy is chosen here.

- A *chunk* is a part of the cost volume that is computed at a time, small enough that its scratch
  arrays take `CHUNK_BYTES` or so, whatever the size of the problem.
- A chunk's products lie on one lattice per axis (or one per tap, see `lattice.lattices`). On each
  pair of lattices the phases are cut into *tiles*. The *source block* of a tile holds the positions
  that its targets meet.
  Equal tiles beside each other make a *block*, whose products are one batch.

The cut depends on shapes alone, never on the number of threads, so results do not either.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from cupycorr.geometry import Geometry
from cupycorr.lattice import Band, Lattice, Phase, lattices

CHUNK_BYTES = 48 << 20
"""A chunk is cut until the estimate of its scratch arrays is below this."""
BATCH_BYTES = 32 << 20
"""A chunk takes several samples while the estimate of their scratch arrays is below this."""
MATRIX_BYTES = 2 << 20
"""A unit's product matrices are not larger than this, so that they stay in the cache. They are not
much smaller either: threads wait for the interpreter between calls, so calls should be long."""
PRODUCT, VECTOR = 1 << 18, (9 << 10) - 1
"""A matrix product has no more multiply-adds than this, and a matrix times a vector has no more
elements: up to here OpenBLAS uses one thread."""

SHIFTED_BYTES = 1 << 20
"""A unit that multiplies by shifts has no more bytes of targets than this, for the same reasons."""
UNITS, UNIT_MULTIPLY_ADDS = 6, 1 << 21
"""The products of a vertical phase are cut into at least ``UNITS`` units, unless they have fewer
rows of tiles, or take fewer multiply-adds than ``UNIT_MULTIPLY_ADDS``."""
COPY_ELEMENTS = 1 << 18
"""A unit of copying has no more elements than this, unless one plane has more."""


class Tiling(NamedTuple):
    """Targets per tile, and whether its products are one matrix product or shift by shift."""

    rows: int
    columns: int
    as_matrix: bool


class Tiles(NamedTuple):
    """Tiles along an axis, one after the other, that lie alike in their source blocks."""

    start: int
    """First target."""
    size: int
    """Targets per tile."""
    repeat: int
    """Number of tiles."""
    source: int
    """First source position of the first tile that exists."""
    extent: int
    """Source positions per tile that exist."""
    cut: int
    """Source positions before the first that are cut off because the map begins there."""

    @property
    def targets(self) -> slice:
        """The targets of all tiles."""
        return slice(self.start, self.start + self.repeat * self.size)

    @property
    def sources(self) -> slice:
        """The source positions of all tiles."""
        return slice(self.source, self.source + (self.repeat - 1) * self.size + self.extent)


@lru_cache(maxsize=1024)
def split(tiles: Tiles, at_once: int) -> tuple[Tiles, ...]:
    """Split tiles into groups of at most so many."""
    return tuple(
        tiles._replace(
            start=tiles.start + done * tiles.size,
            source=tiles.source + done * tiles.size,
            repeat=min(at_once, tiles.repeat - done),
        )
        for done in range(0, tiles.repeat, at_once)
    )


class Block(NamedTuple):
    """Equal tiles beside each other, of one pair of phases.

    ``y`` and ``x`` are the bands from targets to sources. For the gradient of the second map the
    targets are in the second map, and displacements run backwards: ``mirrored``.
    """

    phase: Phase
    """The horizontal phase."""
    y: Band
    x: Band
    across: Tiles
    as_matrix: bool
    mirrored: bool
    images: tuple[slice, slice]
    """The columns of the horizontal phase in map 1 and in map 2."""
    target_shape: tuple[int, int]
    """Rows and columns of the targets of a column of tiles."""
    source_shape: tuple[int, int]
    """Rows and columns of the source blocks of a column of tiles."""
    volume: tuple[slice, slice, slice, slice, slice]
    """Where the products of both phases lie in the volume."""


class Group(NamedTuple):
    """All blocks of one vertical phase, cut into the same rows of tiles."""

    phase: Phase
    """The vertical phase."""
    down: tuple[Tiles, ...]
    """The rows of tiles, as many at a time as make a unit of work."""
    blocks: tuple[Block, ...]
    samples: int
    """Samples per unit of work."""
    images: tuple[slice, slice]
    """The rows of the vertical phase in map 1 and in map 2."""
    dense: tuple[bool, bool]
    """Whether shifts may work on map 1, or on map 2, as it is."""


class Targets(NamedTuple):
    """The work on a pair of lattices for the targets in one map."""

    groups: tuple[Group, ...]
    rows: slice
    """The rows of the map from the first to the last target."""
    partition: bool
    """Whether the targets are all positions of these rows, each once."""


class Step(NamedTuple):
    """The products of a chunk that lie on one pair of lattices."""

    lattice_y: Lattice
    lattice_x: Lattice
    untouched: tuple[list[int], list[int]]
    """Indices on either lattice that no tap touches."""
    hides: bool
    """Whether there are such indices."""
    taps: int
    complete: bool
    """Whether every product on the lattice, of every displacement, exists."""
    targets: tuple[Targets, ...]
    """With the targets in map 1, as for the cost volume, and for the gradients also in map 2."""


class Part(NamedTuple):
    """The displacements and output rows of a chunk."""

    patch_y: slice
    patch_x: slice
    rows: slice
    steps: tuple[Step, ...]


class Plan(NamedTuple):
    """All chunks: every part for every group of so many ``samples``."""

    samples: int
    parts: tuple[Part, ...]
    multiply_adds: int
    """Per sample."""


@lru_cache(maxsize=512)
def plan(shape: tuple[int, int, int], geometry: Geometry, itemsize: int, adjoint: bool) -> Plan:
    """Plan the computation of a cost volume, or of its gradients, from maps (C, H, W)."""
    channels, height, width = shape
    rows, columns = geometry.output_size(height, width)
    patch_y, patch_x = geometry.patch_size
    size = [patch_y, patch_x, rows]

    volume, packed1, packed2 = zip(
        _per_lattice(lattices(geometry.y, height, 0, rows)),
        _per_lattice(lattices(geometry.x, width, 0, columns)),
        strict=True,
    )

    def scratch_bytes() -> tuple[int, int]:
        # Parts of all rows; those of map 2 overlap by the patch, and source blocks by theirs.
        part1 = min(1.0, (size[2] + geometry.y.taps_extent // geometry.y.stride) / rows)
        part2 = min(1.0, part1 + size[0] * geometry.y.dilation_patch / height)
        packed = channels * (part1 * prod(packed1) + 2 * part2 * prod(packed2))
        products = size[0] * size[1] * part1 * prod(volume)
        return int(itemsize * (2 if adjoint else 1) * packed), int(itemsize * products)

    # Rows are cut down to those that the patch spans, then the patch, then rows to the last. The
    # patch is not cut further than its products take most of the memory: every part packs anew.
    spanned = max(1, patch_y * geometry.y.dilation_patch // geometry.y.stride)
    for axis, least in ((2, spanned), (0, 1), (1, 1), (2, 1)):
        while size[axis] > least:
            packed, products = scratch_bytes()
            if packed + products <= CHUNK_BYTES or (axis != 2 and products <= packed):
                break
            size[axis] = max(least, -(-size[axis] // 2))

    parts = []
    for p, q, h in product(spans(patch_y, size[0]), spans(patch_x, size[1]), spans(rows, size[2])):
        lattices_y = lattices(geometry.y.patch_part(p), height, h.start, h.stop)
        lattices_x = lattices(geometry.x.patch_part(q), width, 0, columns)
        steps = tuple(
            _step(shape, y, x, (p.stop - p.start) * (q.stop - q.start), itemsize, adjoint)
            for y, x in product(lattices_y, lattices_x)
        )
        parts.append(Part(p, q, h, steps))
    samples = max(1, BATCH_BYTES // max(1, sum(scratch_bytes())))
    return Plan(samples, tuple(parts), geometry.multiply_adds((1, channels, height, width)))


def _per_lattice(all_lattices: tuple[Lattice, ...]) -> tuple[int, int, int]:
    """Return the positions of a lattice, and of its phases in either map."""
    bands = [phase.band for phase in all_lattices[0].phases]
    return all_lattices[0].size, sum(b.count1 for b in bands), sum(b.count2 for b in bands)


@lru_cache(maxsize=1024)
def spans(count: int, size: int) -> tuple[slice, ...]:
    """Split ``count`` indices into slices of ``size``."""
    return tuple(slice(i, min(count, i + size)) for i in range(0, count, size))


def _step(
    shape: tuple[int, int, int],
    y: Lattice,
    x: Lattice,
    displacements: int,
    itemsize: int,
    adjoint: bool,
) -> Step:
    existing = [sum(phase.band.pairs for phase in lattice.phases) for lattice in (y, x)]
    complete = existing[0] * existing[1] == displacements * y.size * x.size
    targets = tuple(
        _targets(shape, y, x, itemsize, adjoint, mirrored)
        for mirrored in ((False, True) if adjoint else (False,))
    )
    untouched = y.untouched, x.untouched
    return Step(y, x, untouched, any(untouched), len(y.taps) * len(x.taps), complete, targets)


def _targets(
    shape: tuple[int, int, int],
    y: Lattice,
    x: Lattice,
    itemsize: int,
    adjoint: bool,
    mirrored: bool,
) -> Targets:
    """Cut the phases of a pair of lattices into tiles."""
    channels, _, width = shape
    groups = []
    for phase in y.phases if x.phases else ():
        band = phase.band.mirrored() if mirrored else phase.band
        bands = [p.band.mirrored() if mirrored else p.band for p in x.phases]
        pairs = band.pairs * sum(b.pairs for b in bands)
        tiling = choose_tiling(channels, band, bands[0], itemsize, adjoint)
        rows = min(tiling.rows, band.count1)
        cell_bytes = rows * (rows + band.count_patch - 1) * itemsize
        blocks = []
        for phase_x, band_x in zip(x.phases, bands, strict=True):
            columns = tiling.columns if tiling.as_matrix else band_x.count1
            columns = min(columns, band_x.count1)
            tile_bytes = cell_bytes * columns * (columns + band_x.count_patch - 1)
            blocks += [
                _block(phase, phase_x, band, band_x, across, tiling.as_matrix, mirrored)
                for tiles in cover(band_x, columns)
                for across in split(tiles, max(1, MATRIX_BYTES // tile_bytes))
            ]
        # As many tiles down, and samples, as stay within the limit.
        if tiling.as_matrix:
            unit_bytes = cell_bytes * max(
                b.across.repeat * b.across.size * (b.across.size + b.x.count_patch - 1)
                for b in blocks
            )
            limit = MATRIX_BYTES
        else:
            unit_bytes = channels * rows * max(b.across.size for b in blocks) * itemsize
            limit = SHIFTED_BYTES
        at_once = max(1, limit // unit_bytes)
        tiles_down = cover(band, rows)
        if pairs * channels > UNIT_MULTIPLY_ADDS:
            count = sum(tiles.repeat for tiles in tiles_down)
            at_once = min(at_once, -(-count // UNITS))
        down = tuple(part for tiles in tiles_down for part in split(tiles, at_once))
        samples = max(1, at_once // max(tiles.repeat for tiles in down)) if len(down) < 4 else 1
        images = phase.image1, phase.image2
        dense = tuple(
            not tiling.as_matrix and all(block.images[i].step <= 2 for block in blocks)
            for i in (0, 1)
        )
        groups.append(Group(phase, down, tuple(blocks), samples, images, (dense[0], dense[1])))
    spans_y = [group.images[mirrored] for group in groups]
    spans_x = [phase.image2 if mirrored else phase.image1 for phase in x.phases]
    low = min((span.start for span in spans_y), default=0)
    high = max((span.stop for span in spans_y), default=0)
    return Targets(
        tuple(groups),
        slice(low, high),
        _is_partition(spans_y, high - low) and _is_partition(spans_x, width),
    )


def _block(
    phase_y: Phase,
    phase_x: Phase,
    y: Band,
    x: Band,
    across: Tiles,
    as_matrix: bool,
    mirrored: bool,
) -> Block:
    return Block(
        phase_x, y, x, across, as_matrix, mirrored,
        images=(phase_x.image1, phase_x.image2),
        target_shape=(y.count1, across.size),
        source_shape=(y.count2, across.extent),
        volume=(slice(None), phase_y.patch, phase_x.patch, phase_y.lattice, phase_x.lattice),
    )  # fmt: skip


def _is_partition(parts: list[slice], size: int) -> bool:
    """Tell whether slices of a range are different and cover ``size`` positions."""
    different = {(part.start, part.step) for part in parts}
    covered = sum(len(range(part.start, part.stop, part.step)) for part in parts)
    return len(different) == len(parts) and covered == size


@lru_cache(maxsize=1024)
def cover(band: Band, size: int) -> tuple[Tiles, ...]:
    """Cover all targets with tiles of ``size``; the last one may be smaller."""
    found: list[Tiles] = []
    start = 0
    while start < band.count1:
        targets = min(size, band.count1 - start)
        virtual = start + band.shift
        whole = targets + band.count_patch - 1
        low = max(0, virtual)
        extent = max(0, min(band.count2, virtual + whole) - low)
        # How many tiles, from this one on, are equal: those that end where their sources do, or
        # meet no source any more.
        repeat = 1
        if extent == whole:
            repeat = min((band.count1 - start) // size, (band.count2 - virtual - whole) // size + 1)
        elif extent == 0:
            ahead = -virtual - whole if virtual < 0 else band.count1
            repeat = min((band.count1 - start) // size, ahead // size + 1)
        repeat = max(1, repeat)
        found.append(Tiles(start, targets, repeat, low, extent, low - virtual if extent else 0))
        start += repeat * targets
    return tuple(found)


# The model of `choose_tiling`: seconds of one thread in float32 on a CPU with AVX-512. Only the
# ratios matter for the choice.
MULTIPLY_ADD = 1.35e-11
"""Time of a multiply-add inside a matrix product."""
LANES, MORE_TARGETS, MORE_ROWS = 16, 4, 1.5
"""A product takes as long as one of a multiple of ``LANES`` targets, of ``MORE_TARGETS`` more and
of ``MORE_ROWS`` more rows: what BLAS does once for each of them."""
READ = 1.2e-10
"""Time of a source that BLAS reads, in one channel."""
CELL = 6e-10
"""Time of a cell of a product matrix beside its multiply-adds."""
COPIED, COPIED_RUN = 1e-9, 1.6e-9
"""Time of an element that is packed or copied between volume and band, and of the start of each
run of such elements; a run is as long as a tile has columns."""
CALL = 1.5e-6
"""Time of one call of NumPy."""
SHIFTED, SHIFTED_ADJOINT = 4e-10, 1.5e-9
"""Time of a product of two positions in one channel where displacements are computed one after the
other: for the volume by einsum, for a gradient by a multiplication and an addition."""
SHIFTED_RUN, SHIFTED_RUN_ADJOINT = 6e-9, 1.5e-8
"""Time of the start of each row of such products."""


@lru_cache(maxsize=4096)
def choose_tiling(channels: int, y: Band, x: Band, itemsize: int, adjoint: bool) -> Tiling:
    """Choose how to cut a pair of bands, by a model of the cost of each possible way.

    Large tiles make efficient matrix products but compute much beside the band; for few channels
    or displacements one multiplication per displacement beats any tile.
    """
    rows = max(1, min(y.count1, SHIFTED_BYTES // (itemsize * channels * x.count1)))
    best = Tiling(rows, x.count1, as_matrix=False)
    position = CELL + channels * (SHIFTED_ADJOINT if adjoint else SHIFTED)
    run = channels * (SHIFTED_RUN_ADJOINT if adjoint else SHIFTED_RUN)
    best_cost = (
        y.count_patch
        * x.count_patch
        * (-(-y.count1 // rows) * 3 * CALL + y.count1 * (x.count1 * position + run))
    )
    for columns in _even_sizes(x.count1):
        across = cover(x, columns)
        extent = max(t.extent for t in across)
        for rows in _even_sizes(y.count1):
            source = (rows + y.count_patch - 1) * extent
            targets = rows * columns
            if targets * source * itemsize > MATRIX_BYTES:
                continue
            # Two rows of a product must not be too long already.
            terms = source if adjoint else channels
            if 2 * targets * terms > PRODUCT or (targets == 1 and terms > VECTOR):
                continue
            cost = _cost_of_tiles(channels, y, x, cover(y, rows), across, adjoint)
            if cost < best_cost:
                best, best_cost = Tiling(rows, columns, as_matrix=True), cost
    return best


def _cost_of_tiles(
    channels: int,
    y: Band,
    x: Band,
    down: tuple[Tiles, ...],
    across: tuple[Tiles, ...],
    adjoint: bool,
) -> float:
    targets = down[0].size * across[0].size
    sources_y, sources_x = (sum(t.repeat * t.extent for t in axis) for axis in (down, across))
    products = targets * sources_y * sources_x
    height, extent = (max(t.extent for t in axis) for axis in (down, across))
    # A product is a row of sources by targets, summed over channels, or channels by targets, over
    # all sources.
    lines, terms = (channels, height * extent) if adjoint else (extent, channels)
    count = -(-lines // rows_at_once(terms * targets))
    lanes = -(-targets // LANES) * LANES + MORE_TARGETS
    effort = lanes / targets * (1 + MORE_ROWS * count / max(1, lines))
    packed = y.count1 * x.count1 + y.count2 * sources_x
    band = y.count1 * x.count1 * y.count_patch * x.count_patch
    return (
        channels * (products * MULTIPLY_ADD * effort + sources_y * sources_x * READ)
        + products * CELL
        + (channels * packed + band) * (COPIED + COPIED_RUN / across[0].size)
        + (len(across) + 1) * (len(down) + 1) * 10 * CALL
    )


def rows_at_once(multiply_adds: int) -> int:
    """Return how many rows a product may have, if each of them takes so many multiply-adds.

    The numbers returned are those that the kernels of BLAS take without a remainder.
    """
    most = max(1, PRODUCT // max(1, multiply_adds))
    return most - most % 4 if most >= 8 else {5: 4, 7: 6}.get(most, most)


@lru_cache(maxsize=256)
def _even_sizes(count: int) -> tuple[int, ...]:
    """Return tile sizes to try, each such that its tiles cover ``count`` with little overlap."""
    sizes = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128)
    return tuple(sorted({-(-count // -(-count // min(size, count))) for size in sizes}))
