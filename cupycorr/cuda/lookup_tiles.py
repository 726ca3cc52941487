"""Choose the tile of the flow-guided lookup by the model of `cuda.cost`.

The kernel is ``kernels/lookup_tiled.cu``. The model counts what its blocks do where flow is
constant and not an integer; rough flow costs more, by every tile. Tiles differ in the units that
are staged at a time and in how many blocks share a multiprocessor. Everything else follows from the
lookup and from the shape of the positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from operator import attrgetter
from typing import NamedTuple

from cupycorr.cuda.cost import (
    RESERVED_BYTES,
    Block,
    Constants,
    Device,
    cycles_in_rounds,
    matrix_rate,
    round_up,
    size_class,
)
from cupycorr.cuda.launch import pairs
from cupycorr.layer import DTYPES
from cupycorr.lookup import Lookup

UNIT_BYTES = 16  # of a copy
STEP_CELLS = 16
FINE = 6  # below so many, steps are done in pairs
MOST_STEPS = 11  # as registers allow
SPARE_STEPS = 2  # for boxes that are larger than those of constant flow
BUFFERS = 2
# Blocks of a multiprocessor, and the registers that they leave a thread. Two if what is fetched
# passes the registers, for wide patches, and for matrices of long chunks: for three the compiler
# would spill some.
REGISTERS = {1: 255, 2: 248, 3: 168}
WIDE = 9
# Instructions of a warp: per step of four channels beside the multiply-adds, and once for all
# steps; per step of 16 channels on tensor cores, and once; per copy, chunk, entry and output. Read
# off compiled kernels, but for the entries: a guess.
STEP, CHANNELS = 3, 13
TENSOR_STEP, TENSOR_CHANNELS = 4.1, 12
COPY, CHUNK, ENTRY, OUTPUT = 7, 30, 1600, 27
# Wavefronts per output: sums that are written and read again, several lanes in a bank.
OUTPUT_WAVEFRONTS = 4.4 / 32
# Of the plain kernel: registers; instructions and sectors of level 1 per multiply-add.
PLAIN_THREADS, PLAIN_REGISTERS, PLAIN_INSTRUCTIONS, PLAIN_WAVEFRONTS = 256, 64, 2, 0.5
CORNERS = 4


class Tile(NamedTuple):
    """The tile of lookup_tiled.cu."""

    element: str
    """Dtype of the maps that it reads."""
    constants: Constants
    blocks: int
    threads: int
    shared_bytes: int
    block: Block
    """What an average block costs, by the model."""
    cycles: float
    """Of the multiprocessor that has most to do, by the model."""


@lru_cache(maxsize=1024)
def tile(
    lookup: Lookup,
    samples: int,
    channels: int,
    size: tuple[int, int],
    dtype: str,
    device: Device,
) -> Tile | None:
    """Return the fastest tile for so many samples of ``size`` positions.

    None where no tile applies, or where the plain kernel is faster.
    """
    found = min(
        _tiles(lookup, samples, channels, size, dtype, device),
        key=attrgetter("cycles"),
        default=None,
    )
    plain = _plain_cycles(lookup, samples, channels, size, dtype, device)
    return None if found is None or plain < found.cycles else found


class _Shape(NamedTuple):
    """What tiles of one lookup have in common."""

    tensor: bool
    group: tuple[int, int]
    tile: tuple[int, int]
    band: int
    span: tuple[int, int]
    """Rows and columns of cells around a position, of a band."""
    steps: int
    capacity: int

    @property
    def positions(self) -> int:
        """Positions of a block."""
        return self.tile[0] * self.tile[1]

    @property
    def slots(self) -> int:
        """Groups of a block."""
        return self.positions // (self.group[0] * self.group[1])


def _shape(lookup: Lookup, size: tuple[int, int], tensor: bool) -> _Shape | None:
    """Return the shape of tiles; None where not even one window fits."""
    if lookup.radius[0] == 0 or size[0] == 1:  # few rows of cells, or one of positions
        group, most = ((2, 8), (2, 32)) if tensor else ((1, 8), (1, 64))
    else:
        group, most = ((4, 4), (4, 16)) if tensor else ((2, 4), (8, 8))
    tile_y, tile_x = (
        min(largest, round_up(positions, of_group))
        for largest, positions, of_group in zip(most, size, group, strict=True)
    )
    if not tensor and tile_y * tile_x % 16:
        tile_x += group[1]  # a warp has two groups
    most_cells = STEP_CELLS * MOST_STEPS
    span_x = 2 * lookup.reach[1] + 2
    for bands in range(1, lookup.patch_size[0] + 1):
        band = -(-lookup.patch_size[0] // bands)
        span_y = (band - 1) * lookup.dilation_patch[0] + 2
        box = (group[0] - 1 + span_y) * (group[1] - 1 + span_x)
        if box <= most_cells:
            break
    if span_y * span_x > most_cells:
        return None
    steps = min(most_cells // STEP_CELLS, -(-box // STEP_CELLS) + SPARE_STEPS)
    # A row to spare.
    capacity = max((tile_y + span_y) * (tile_x - 1 + span_x), STEP_CELLS * steps)
    return _Shape(tensor, group, (tile_y, tile_x), band, (span_y, span_x), steps, capacity)


def _tiles(
    lookup: Lookup,
    samples: int,
    channels: int,
    size: tuple[int, int],
    dtype: str,
    device: Device,
) -> Iterator[Tile]:
    """Yield the tiles that fit the device."""
    asynchronous = device.copies_asynchronously
    tensor = dtype in ("float16", "bfloat16") and asynchronous
    shape = None if dtype == "float64" else _shape(lookup, size, tensor)
    if shape is None:
        return
    element = dtype if tensor else "float32"
    threads = shape.slots * (32 if tensor else 16)
    bands = -(-lookup.patch_size[0] // shape.band)
    height, width = (-(-n // of_tile) for n, of_tile in zip(size, shape.tile, strict=True))
    blocks = samples * height * width * bands * lookup.levels
    narrow = asynchronous and bands == 1 and lookup.patch_size[1] <= WIDE
    for units in (4, 2) if asynchronous else (2,):
        shared_bytes = _shared_bytes(shape, units, threads)
        resident = min(
            3 if narrow and not (tensor and units == 4) else 2,
            device.shared_bytes_of_multiprocessor // (shared_bytes + RESERVED_BYTES),
        )
        if resident < 1 or shared_bytes > device.shared_bytes:
            continue
        block = _block(lookup, shape, channels, element, dtype, units, device)
        block = block._replace(
            threads=threads, registers=REGISTERS[resident], shared_bytes=shared_bytes
        )
        yield Tile(
            element,
            (
                ("tensor", tensor),
                ("asynchronous", asynchronous),
                ("band", shape.band),
                *pairs(group=shape.group, tile=shape.tile),
                ("steps", shape.steps),
                ("units", units),
                ("capacity", shape.capacity),
                ("resident", resident),
                ("shared_bytes", shared_bytes),
            ),
            blocks,
            threads,
            shared_bytes,
            block,
            cycles_in_rounds(block, size_class(blocks), "float32", device),
        )


def _shared_bytes(shape: _Shape, units: int, threads: int) -> int:
    """Return the shared memory of a block: what is staged, or the sums, and the plan."""
    positions, slots, cells = shape.positions, shape.slots, STEP_CELLS * shape.steps
    at_once = 8 if shape.tensor or shape.group[1] == 8 else 4
    pitch = round_up(cells, 32) + 8 if shape.tensor else cells + 1
    staged = BUFFERS * (shape.capacity + positions) * units * UNIT_BYTES
    copies = round_up(shape.capacity, threads // units) + positions
    plan = 8 * copies + 40 * positions + 40 * slots + 48
    return sum(
        round_up(size, UNIT_BYTES) for size in (max(staged, slots * at_once * pitch * 4), plan)
    )


def _level_steps(lookup: Lookup, shape: _Shape, level: int) -> float:
    """Return the steps of a group on a level, on average over constant flows."""
    spreads = []
    for positions, pool in zip(shape.group, lookup.pool, strict=True):
        whole, part = divmod(positions - 1, pool**level)
        share = part / float(pool**level)
        spreads.append(((whole, 1 - share), (whole + 1, share)))
    total = 0.0
    for (rows, one), (columns, other) in product(*spreads):
        steps = -(-(shape.span[0] + rows) * (shape.span[1] + columns) // STEP_CELLS)
        total += one * other * (steps if steps >= FINE else round_up(steps, 2))
    return total


def _level_cells(lookup: Lookup, shape: _Shape, level: int) -> float:
    """Return the cells that a block stages on a level, on average over constant flows."""
    rows, columns = (
        span + (positions - 1) / float(pool**level)
        for span, positions, pool in zip(shape.span, shape.tile, lookup.pool, strict=True)
    )
    return rows * columns


def _block(
    lookup: Lookup,
    shape: _Shape,
    channels: int,
    element: str,
    dtype: str,
    units: int,
    device: Device,
) -> Block:
    """Count what a block does, on average over the levels; its size is not known here."""
    levels = range(lookup.levels)
    steps = sum(_level_steps(lookup, shape, level) for level in levels) / lookup.levels
    cells = sum(_level_cells(lookup, shape, level) for level in levels) / lookup.levels
    itemsize = DTYPES[element].itemsize
    of_chunk = units * UNIT_BYTES // itemsize
    chunks = -(-channels // of_chunk)
    staged = (cells + shape.positions) * chunks
    outputs = shape.band * lookup.patch_size[1] * shape.positions
    warps = shape.slots if shape.tensor else shape.slots // 2
    copies = staged * units / 32
    if shape.tensor:
        loops = warps * chunks * of_chunk / 16
        instructions = loops * (TENSOR_STEP * steps + TENSOR_CHANNELS)
        wavefronts = loops * 4 * (steps + 1)
        multiply_adds = 0.0
        matrix_cycles = loops * steps * 16 * STEP_CELLS * 16 / matrix_rate(device)
    else:
        loops = warps * chunks * of_chunk / 4
        instructions = loops * (STEP * steps + CHANNELS)
        wavefronts = loops * (4 * steps + 8 * 3)  # two addresses of a load: between 2 and 4
        multiply_adds = loops * 32 * steps * 32
        matrix_cycles = 0.0
    instructions += COPY * copies + CHUNK * chunks * warps + ENTRY * warps + OUTPUT * outputs / 32
    return Block(
        threads=0,
        registers=0,
        shared_bytes=0,
        rounds=chunks,
        multiply_adds=multiply_adds,
        wavefronts=wavefronts + OUTPUT_WAVEFRONTS * outputs,
        instructions=32 * instructions,
        words=staged * units * UNIT_BYTES / 4,
        bytes=staged * units * UNIT_BYTES + outputs * DTYPES[dtype].itemsize,
        matrix_cycles=matrix_cycles,
    )


def _plain_cycles(
    lookup: Lookup,
    samples: int,
    channels: int,
    size: tuple[int, int],
    dtype: str,
    device: Device,
) -> float:
    """Return the cycles of the plain kernel by the model: each output has four cells of its own."""
    multiply_adds = PLAIN_THREADS * CORNERS * channels
    block = Block(
        PLAIN_THREADS,
        PLAIN_REGISTERS,
        0,
        multiply_adds=multiply_adds,
        wavefronts=PLAIN_WAVEFRONTS * multiply_adds,
        instructions=PLAIN_INSTRUCTIONS * multiply_adds,
        ahead=False,
    )
    outputs = samples * lookup.levels * lookup.patch_size[0] * lookup.patch_size[1]
    blocks = -(-outputs * size[0] * size[1] // PLAIN_THREADS)
    return cycles_in_rounds(block, size_class(blocks), DTYPES[dtype].accumulator, device)
