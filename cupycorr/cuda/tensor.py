"""Plan the cost volume on tensor cores: its tile, its launch, and when it pays.

Maps have 16 bits, or are float32 that may be rounded to TF32. The kernel (``kernels/tensor.cu``)
reads maps whose channels lie side by side or apart. Contiguous maps are turned first
(``kernels/transpose.cu``) where that is faster. Tiles are chosen by the model of `cuda.cost`: it
counts the products of matrices, with the columns that a tile wastes, the wavefronts of shared
memory that feed them, and the bytes that are staged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import product
from math import gcd, inf
from operator import attrgetter
from typing import NamedTuple, Protocol, TypeVar

from cupycorr.cuda.cost import (
    WAVEFRONT_BYTES,
    Block,
    Constants,
    Device,
    cycles_in_rounds,
    matrix_rate,
    round_up,
    size_class,
)
from cupycorr.cuda.launch import Launch, Shape, pair, pairs, types, volume_shape
from cupycorr.cuda.turning import MORE, Apart, staged, turning_cycles
from cupycorr.layer import DTYPES, Layer

OLDEST = 80  # compute capability: cp.async, and matrices of bfloat16
UNIT_BYTES = 16  # of a copy
POSITIONS, COLUMNS, DEPTH_UNITS = 16, 8, 2  # of one product of matrices
MULTIPLY_ADDS = POSITIONS * COLUMNS * 16  # of one product; TF32 has half as many, at half the rate
MOST_COLUMN_TILES = 16  # of a tile: wider patches are shared among blocks
MOST_PHASES = 4  # column phases of a block
MOST_WARPS = 16
MOST_PIECES = 4  # in which contiguous maps are loaded
MOST_ROWS = 11  # of fmap2, of a warp
MOST_SUMS = 176  # registers of a thread
OFFSETS = 36  # registers beside sums and operands; an estimate, fitted to compiled kernels
MOST_REGISTERS = 255
# Instructions of a warp per copy, product of matrices, and word that is rounded to TF32; per run of
# results that it stores, for each of them, and for each that is stored alone. Read off compiled
# kernels.
COPY, MULTIPLY, ROUND = 9, 1.5, 2
RUN, STORE, STORE_ALONE = 55, 3.5, 9.5
SHORT_RUN = 4  # results that a thread stores side by side, but alone


class _Problem(NamedTuple):
    """A product volume, as far as its tile depends on it. Sizes are rounded (`size_class`)."""

    samples: int
    """Samples times row phases."""
    channels: int
    rows: int
    """Lattice rows of a phase."""
    columns: int
    """Lattice columns of a phase."""
    patch: tuple[int, int]
    phases_x: int
    advance: tuple[int, int]
    element_bytes: int
    vector: int
    """Channels per copy, 1: through registers; or pixels per load."""
    result_bytes: int
    result_vector: int
    """Results that are stored at once, if a block has all column phases."""
    apart: Apart | None = None
    """Of contiguous maps. None if channels lie side by side."""


class Tile(NamedTuple):
    """The tile of tensor.cu."""

    constants: Constants
    rows: int
    """Rows of positions of a block."""
    columns: int
    """Positions of a phase, in a row of a block."""
    shares: int
    """Blocks that share the phases, displacements and rows that meet the same positions."""
    phases: int
    threads: int
    shared_bytes: int
    cycles: float
    """Of the multiprocessor that has most to do, by the model."""


class _Timed(Protocol):
    """A tile of either kernel."""

    @property
    def cycles(self) -> float:
        """Cycles that the model gives it."""


AnyTile = TypeVar("AnyTile", bound=_Timed)


def applies(layer: Layer, dtype: str, device: Device, *, tf32: bool = False) -> bool:
    """Whether a device has tensor cores for a layer's products."""
    multiplied = ("float16", "bfloat16", *(["float32"] if tf32 else []))
    return not layer.l1 and dtype in multiplied and device.capability >= OLDEST


def cost(
    layer: Layer,
    shape: Shape,
    dtype: str,
    device: Device,
    *,
    aligned: bool = True,
    channels_last: bool = False,
    turn: bool = True,
    tf32: bool = False,
    scalar_cycles: float = inf,
) -> Launch | None:
    """Plan the product volume on tensor cores.

    Parameters
    ----------
    layer, shape, dtype, device, aligned, channels_last, tf32
        As for `cuda.plan.plan`.
    turn : bool, default True
        Whether contiguous maps may be turned first.
    scalar_cycles : float, optional
        What the model gives product.cu for contiguous maps.

    Returns
    -------
    Launch or None
        Its constant "channels_last" says how its maps lie: otherwise than ``channels_last`` says
        where turning them costs less than it gains. None where tensor cores do not compute the
        layer, where no tile fits, or where product.cu is faster.
    """
    if not applies(layer, dtype, device, tf32=tf32):
        return None
    geometry, channels = layer.geometry, shape[1]
    lattice_height, lattice_width = volume_shape(geometry, shape)[3:]
    axes = geometry.y, geometry.x
    (phases_y, advance_y), (phases_x, advance_x) = (axis.phases for axis in axes)
    rows, columns = -(-lattice_height // phases_y), -(-lattice_width // phases_x)
    result = dtype if geometry.taps == 1 else DTYPES[dtype].accumulator
    result_vector = gcd(lattice_width, 16 // DTYPES[result].itemsize) if aligned else 1
    origin, first = -geometry.x.padding, geometry.first_displacement[1]
    unit = UNIT_BYTES // DTYPES[dtype].itemsize
    problem = _Problem(
        samples=size_class(shape[0] * phases_y),
        channels=size_class(channels),
        rows=size_class(rows),
        columns=size_class(columns),
        patch=geometry.patch_size,
        phases_x=phases_x,
        advance=(advance_y, advance_x),
        element_bytes=DTYPES[dtype].itemsize,
        # Workspace is aligned.
        vector=gcd(channels, unit) if aligned or not channels_last else 1,
        result_bytes=DTYPES[result].itemsize,
        result_vector=result_vector,
    )
    tile = _tile(problem, device) if channels_last or turn else None
    if not channels_last:
        cycles = inf if tile is None else tile.cycles + turning_cycles(shape, dtype, device)
        vector = gcd(shape[3], unit) if aligned else 1
        leads = origin % vector, (origin + first) % vector
        apart = Apart(geometry.x.lattice_step, geometry.dilation_patch[1], leads)
        native = _tile(problem._replace(vector=vector, apart=apart), device)
        if native is not None and native.cycles < cycles:
            tile, cycles = native, native.cycles
        if cycles >= scalar_cycles:
            return None
    if tile is None:
        return None
    blocks_y = -(-rows // tile.rows)
    blocks_x = -(-columns // tile.columns)
    return Launch(
        "tensor.cu",
        "tensor_cost",
        (
            *types(dtype, result=result),
            *pairs(
                patch=geometry.patch_size,
                step=pair(axis.lattice_step for axis in axes),
                spacing=geometry.dilation_patch,
                phases=(phases_y, phases_x),
                advance=(advance_y, advance_x),
            ),
            *tile.constants,
            ("result_vector", result_vector if tile.phases == phases_x else 1),
        ),
        shape[0] * phases_y * blocks_y * blocks_x * tile.shares,
        tile.threads,
        tile.shared_bytes,
        ("fmap1", "fmap2", "cost" if geometry.taps == 1 else "volume"),
        (
            *zip(("channels", "height", "width"), shape[1:], strict=True),
            *(("lattice_height", lattice_height), ("lattice_width", lattice_width)),
            *pairs(
                origin=pair(-axis.padding for axis in axes),
                first=geometry.first_displacement,
                blocks=(blocks_y, blocks_x),
            ),
        ),
        scaled=geometry.taps == 1,
        cycles=tile.cycles,
    )


def fastest(tiles: Iterable[AnyTile]) -> AnyTile | None:
    """Return the tile that the model finds fastest; None if none fits."""
    fitting = (tile for tile in tiles if tile.cycles < inf)
    return min(fitting, key=attrgetter("cycles"), default=None)


def column_phases(phases_x: int) -> int:
    """Return how many column phases a block has at most, in equal shares."""
    return -(-phases_x // -(-phases_x // MOST_PHASES))


@lru_cache(maxsize=512)
def _tile(problem: _Problem, device: Device) -> Tile | None:
    return fastest(_tiles(problem, device))


class _Columns(NamedTuple):
    """How a block spreads over the columns of the maps."""

    tile_rows: int
    x_tiles: int
    x_groups: int
    phases: int
    displacements: int
    columns1: int
    columns2: int
    column_tiles: int
    """Tiles of 8 columns that a tile of positions meets."""
    warp_column_tiles: int


def _tiles(problem: _Problem, device: Device) -> Iterator[Tile]:
    """Yield the tiles that fit, each with the cycles that the model gives it."""
    most_phases = column_phases(problem.phases_x)
    for phases, *shape in product(dict.fromkeys((most_phases, 1)), (1, 2), (1, 2, 4), (1, 2, 3, 4)):
        tile_rows, x_tiles, x_groups = shape
        own = _columns(problem, phases, tile_rows, x_tiles, x_groups)
        if own is None:
            continue
        meeting = problem.patch[0] + problem.advance[0] * (tile_rows - 1)
        for row_tiles, warp_rows in product((1, 2, 3, 4, 6, 8), range(1, MOST_ROWS + 1)):
            if row_tiles > 1 and row_tiles * tile_rows >= 2 * problem.rows:
                continue
            warps = row_tiles * own.phases * x_groups
            for row_groups in range(1, MOST_WARPS // warps + 1):
                # In equal shares, which fill their warps.
                block_rows = -(-meeting // -(-meeting // (row_groups * warp_rows)))
                if (row_groups - 1) * warp_rows < block_rows >= warp_rows:
                    yield from _tiles_of_rows(
                        problem, device, own, row_tiles, warp_rows, row_groups, block_rows
                    )


def _columns(
    problem: _Problem, phases: int, tile_rows: int, x_tiles: int, x_groups: int
) -> _Columns | None:
    """Return how a block's tiles lie beside each other; None where they reach too far."""
    tile_columns = POSITIONS // tile_rows
    columns1 = x_groups * x_tiles * tile_columns
    if x_tiles * x_groups > 1 and columns1 >= 2 * problem.columns:
        return None
    patch, advance = problem.patch[1], problem.advance[1]
    span = advance * tile_columns
    widest = MOST_COLUMN_TILES * COLUMNS - advance * (tile_columns - 1)
    if widest < 1:
        return None
    # Equal shares.
    displacements = -(-patch // -(-patch // widest))
    column_tiles = -(-(advance * (tile_columns - 1) + displacements) // COLUMNS)
    return _Columns(
        tile_rows, x_tiles, x_groups, phases, displacements, columns1,
        span * (x_groups * x_tiles - 1) + COLUMNS * column_tiles,
        column_tiles, (x_tiles - 1) * span // COLUMNS + column_tiles,
    )  # fmt: skip


def _tiles_of_rows(
    problem: _Problem,
    device: Device,
    own: _Columns,
    row_tiles: int,
    warp_rows: int,
    row_groups: int,
    block_rows: int,
) -> Iterator[Tile]:
    """Yield the tiles of so many rows; they differ in the channels staged."""
    sums = 4 * warp_rows * own.x_tiles * own.column_tiles
    registers = sums + 4 * own.x_tiles + 4 * round_up(own.warp_column_tiles, 2) + OFFSETS
    if sums > MOST_SUMS or registers > MOST_REGISTERS:
        return
    advance_y = problem.advance[0]
    rows1 = row_tiles * own.tile_rows
    rows2 = advance_y * own.tile_rows * (row_tiles - 1) + block_rows
    pixels = own.phases * (rows1 * own.columns1 + rows2 * own.columns2)
    beside = own.columns2 - problem.advance[1] * (own.columns1 - 1) - own.displacements
    read = pixels - own.phases * rows2 * beside
    strips, line = rows1 * row_groups, own.phases * own.columns1 + 4
    warps = row_tiles * row_groups * own.phases * own.x_groups
    meeting = problem.patch[0] + advance_y * (own.tile_rows - 1)
    shares = -(-problem.phases_x // own.phases) * -(-problem.patch[1] // own.displacements)
    shares *= -(-meeting // block_rows)
    blocks = problem.samples * -(-problem.rows // rows1) * -(-problem.columns // own.columns1)
    blocks *= shares

    unit = UNIT_BYTES // problem.element_bytes  # elements of a 16-byte copy
    depth = DEPTH_UNITS * unit
    depths = -(-problem.channels // depth)
    multiplied = depths * warps // row_groups * block_rows * own.x_tiles * own.column_tiles
    loaded = depths * warps * (4 * own.x_tiles + 2 * warp_rows * own.warp_column_tiles)
    rounding = ROUND * loaded if problem.element_bytes == 4 else 0
    results = rows1 * block_rows * own.displacements * own.phases * own.columns1
    vector = problem.result_vector if own.phases == problem.phases_x else 1
    store = RUN / vector + STORE if vector > 1 else RUN / SHORT_RUN + STORE_ALONE
    least = Block(
        32 * warps,
        registers,
        4 * strips * line,
        multiply_adds=0,
        wavefronts=loaded + results * 3 / 32,
        instructions=32 * (MULTIPLY * multiplied + 2 * sums * warps + rounding) + results * store,
        words=0,
        bytes=results * problem.result_bytes,
        matrix_cycles=multiplied * MULTIPLY_ADDS / matrix_rate(device),
    )
    constants = {
        "tile_rows": own.tile_rows, "x_tiles": own.x_tiles, "x_groups": own.x_groups,
        "row_tiles": row_tiles, "phases": own.phases, "displacements": own.displacements,
        "warp_rows": warp_rows, "row_groups": row_groups, "threads": 32 * warps,
        "channels_last": problem.apart is None,
    }  # fmt: skip

    def tile(block: Block, **more: int) -> Tile:
        words = -(-block.shared_bytes // 4)
        return Tile(
            (*constants.items(), *more.items(), ("shared_words", words)), rows1, own.columns1,
            shares, own.phases, 32 * warps, 4 * words,
            cycles_in_rounds(block, blocks, "float32", device),
        )  # fmt: skip

    if problem.apart is not None:
        rows = rows1, rows2
        for block, more in _apart(problem, problem.apart, own, rows, warp_rows, least, device):
            yield tile(block, **more)
        return
    for chunk in (depth, 2 * depth, 4 * depth):
        if chunk > depth and chunk >= 2 * problem.channels:
            continue
        rounds = -(-problem.channels // chunk)
        buffers = min(2, rounds)
        staged = pixels * (chunk + unit) * problem.element_bytes
        shared_bytes = max(buffers * staged + 4 * pixels, least.shared_bytes)
        if shared_bytes > device.shared_bytes:
            continue
        copies = pixels * chunk // max(2, problem.vector) * rounds
        block = least._replace(
            shared_bytes=shared_bytes,
            rounds=rounds,
            wavefronts=least.wavefronts
            + pixels * chunk * rounds * problem.element_bytes / WAVEFRONT_BYTES,
            instructions=least.instructions + copies * COPY,
            bytes=least.bytes + read * problem.channels * problem.element_bytes,
            ahead=rounds > 1,
        )
        yield tile(
            block, chunk=chunk, buffers=buffers, vector=problem.vector, lead1=0, lead2=0, pieces=1
        )


def _apart(
    problem: _Problem,
    apart: Apart,
    own: _Columns,
    rows: tuple[int, int],
    warp_rows: int,
    least: Block,
    device: Device,
) -> Iterator[tuple[Block, dict[str, int]]]:
    """Yield the blocks that read contiguous maps, each with its constants."""
    depth = DEPTH_UNITS * UNIT_BYTES // problem.element_bytes
    rounds = -(-problem.channels // depth)
    buffers = min(2, rounds)
    met = problem.advance[1] * (own.columns1 - 1) + own.displacements
    in_line = own.phases == problem.phases_x and (
        own.displacements == problem.patch[1]
        or own.displacements * apart.spacing % problem.vector == 0
    )
    for vector in dict.fromkeys((problem.vector if in_line else 1, 1)):
        leads = apart.leads if vector > 1 else (0, 0)
        periods = apart.spacing * problem.advance[1], apart.spacing
        one, two = (
            staged(*of, depth, apart.step, own.phases, vector, problem.element_bytes)
            for of in zip(rows, (own.columns1, met), periods, leads, strict=True)
        )
        groups = one.groups + two.groups + max(0, own.columns2 // COLUMNS - two.runs)
        group_bytes = COLUMNS * (DEPTH_UNITS + 1) * UNIT_BYTES + MORE
        shared_bytes = max(buffers * own.phases * groups * group_bytes, least.shared_bytes)
        if shared_bytes > device.shared_bytes:
            continue
        of_thread = [-(-part.lanes // least.threads) for part in (one, two)]
        found = set()
        for pieces in range(1, MOST_PIECES + 1):
            of_piece = -(-sum(of_thread) // pieces)
            if of_piece in found or pieces > warp_rows:
                continue
            found.add(of_piece)
            registers = least.registers + 2 * sum(of_thread)
            registers += of_piece * max(one.registers, two.registers)
            if registers > MOST_REGISTERS:
                continue
            yield (
                least._replace(
                    registers=registers,
                    shared_bytes=shared_bytes,
                    rounds=rounds * pieces,
                    wavefronts=least.wavefronts + rounds * (one.wavefronts + two.wavefronts),
                    instructions=least.instructions
                    + rounds * (one.instructions + two.instructions),
                    bytes=least.bytes + rounds * (one.bytes + two.bytes),
                    ahead=rounds > 1,
                ),
                {"chunk": depth, "buffers": buffers, "vector": vector,
                 "lead1": leads[0], "lead2": leads[1], "pieces": pieces},
            )  # fmt: skip
