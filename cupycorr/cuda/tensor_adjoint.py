"""Plan the gradients of cost volumes on tensor cores: tiles, launches, and when they pay.

Maps have 16 bits, or are float32 that may be rounded to TF32. The kernel
(``kernels/tensor_adjoint.cu``) reads a map whose channels lie side by side or apart, and writes a
gradient of that kind. With several taps the upstream gradient is that of the product volume, in
float32. Beside maps of 16 bits it is split into parts of 16 bits (`parts_of`), which keep what
`verify` asks for; TF32 would not. Tiles are chosen as in `cuda.tensor`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import gcd, inf
from typing import NamedTuple

from cupycorr.cuda.cost import (
    WAVEFRONT_BYTES,
    Block,
    Constants,
    Device,
    cycles_in_rounds,
    matrix_rate,
    odd_units,
    size_class,
)
from cupycorr.cuda.launch import Launch, Shape, Targets, pairs, types, volume_shape
from cupycorr.cuda.tensor import (
    COPY,
    MOST_REGISTERS,
    MOST_SUMS,
    MOST_WARPS,
    MULTIPLY,
    MULTIPLY_ADDS,
    POSITIONS,
    ROUND,
    UNIT_BYTES,
    applies,
    column_phases,
    fastest,
)
from cupycorr.cuda.turning import MORE, Apart, staged, turning_cycles
from cupycorr.layer import DTYPES, Layer

CHANNELS, DEPTH_BYTES = 8, 32  # of one product of matrices; of the columns of a target
PITCH = 8  # elements that a pixel takes in shared memory, beside its channels
# Instructions of a thread per run of results that it stores (of two runs, if channels lie apart),
# and for each of them; read off compiled kernels.
STORE, RESULT = 40, 3
BESIDE = 52  # registers beside sums and operands; an estimate, fitted to compiled kernels
# Instructions of a warp per copy of the upstream gradient, per band beside its 4 words, and per row
# of the source; read off compiled kernels.
COPY_UPSTREAM, BAND, ROW = 18, 4, 60
# Of a word of a band: 2 loads and what joins them; for a further part, of what is left of 2 values.
WORD, PART = 3, 5


class _Problem(NamedTuple):
    """A gradient, as far as its tile depends on it. Sizes are rounded (`size_class`)."""

    samples: int
    """Samples times row phases."""
    channels: int
    rows: int
    """Target rows of a phase."""
    columns: int
    """Target columns of a phase."""
    patch: tuple[int, int]
    phases_x: int
    advance: tuple[int, int]
    which: int
    element_bytes: int
    upstream_bytes: int
    parts: int
    """In which the upstream gradient is multiplied."""
    vector: int
    """Channels per copy, 1: through registers; or pixels per load."""
    unit: int
    """Elements of the upstream gradient per copy, if a block has all phases."""
    lead: int
    """Elements before those that a block needs, so that copies are aligned."""
    apart: Apart | None = None
    """Of contiguous maps. None if channels lie side by side."""


class Tile(NamedTuple):
    """The tile of tensor_adjoint.cu."""

    constants: Constants
    rows: int
    """Target rows of a block."""
    columns: int
    """Targets of a phase, in a row of a block."""
    channels: int
    phase_groups: int
    """Blocks that share the column phases."""
    threads: int
    shared_bytes: int
    cycles: float
    """Of the multiprocessor that has most to do, by the model."""


def parts_of(layer: Layer, dtype: str) -> int | None:
    """Return in how many parts of a map's dtype the upstream gradient is multiplied.

    With one tap it has that dtype. Else it is float32, of 24 binary digits: two parts of float16
    keep 23 of them (what they are parts of are sums of float16, which have no digits below
    2^-24), three of bfloat16 keep all. None where their additions could err by more than
    `verify.excess` allows.
    """
    geometry = layer.geometry
    if dtype == "float32" or geometry.taps == 1:
        return 1
    parts, split = {"float16": (2, 2), "bfloat16": (3, 0)}[dtype]
    patch = geometry.patch_size[0] * geometry.patch_size[1]
    # Units of float32's rounding: the sum over taps, the split, the sum over displacements, the
    # scale. Products are exact.
    errors = geometry.taps - 1 + split + parts * patch - 1 + 1
    return parts if errors <= patch * geometry.taps + 2 else None


def gradient(
    layer: Layer,
    shape: Shape,
    dtype: str,
    device: Device,
    which: int,
    targets: tuple[Targets, Targets],
    *,
    aligned: bool = True,
    channels_last: bool = False,
    turn: bool = True,
    tf32: bool = False,
    scalar_cycles: float = inf,
) -> Launch | None:
    """Plan the gradient with respect to one map on tensor cores.

    Parameters
    ----------
    layer, shape, dtype, device, aligned, channels_last, tf32
        As for `cuda.plan.plan`.
    which : {1, 2}
        The map.
    targets : (Targets, Targets)
        Its positions along both axes.
    turn : bool, default True
        Whether contiguous maps may be turned first, and gradients back.
    scalar_cycles : float, optional
        What the model gives product_adjoint.cu for contiguous maps.

    Returns
    -------
    Launch or None
        Its constant "channels_last" says how its map and its gradient lie: otherwise than
        ``channels_last`` says where turning them costs less than it gains. None where tensor cores
        do not compute the layer, where no tile fits, or where product_adjoint.cu is faster.
    """
    geometry = layer.geometry
    if not applies(layer, dtype, device, tf32=tf32):
        return None
    parts = parts_of(layer, dtype)
    if parts is None:
        return None
    upstream = dtype if geometry.taps == 1 else DTYPES[dtype].accumulator
    element_bytes, upstream_bytes = DTYPES[dtype].itemsize, DTYPES[upstream].itemsize
    y, x = targets
    samples, channels = shape[:2]
    lattice = volume_shape(geometry, shape)[3:]
    rows, columns = -(-y.number // y.phases), -(-x.number // x.phases)
    # Workspace is aligned.
    unit = gcd(lattice[1], UNIT_BYTES // upstream_bytes) if aligned or geometry.taps > 1 else 1
    problem = _Problem(
        samples=size_class(samples * y.phases),
        channels=size_class(channels),
        rows=size_class(rows),
        columns=size_class(columns),
        patch=geometry.patch_size,
        phases_x=x.phases,
        advance=(y.advance, x.advance),
        which=which,
        element_bytes=element_bytes,
        upstream_bytes=upstream_bytes,
        parts=parts,
        vector=gcd(channels, UNIT_BYTES // element_bytes) if aligned or not channels_last else 1,
        unit=unit,
        lead=x.shift % unit,
    )
    tile = _tile(problem, device) if channels_last or turn else None
    turning = turning_cycles(shape, dtype, device)
    if channels_last:
        scalar_cycles += turning
        cycles = inf if tile is None else tile.cycles
    else:
        cycles = inf if tile is None else tile.cycles + turning
        vector = gcd(shape[3], UNIT_BYTES // element_bytes) if aligned else 1
        lead = (x.target + x.first) % vector
        apart = Apart(x.step, geometry.dilation_patch[1], (lead,))
        native = _tile(problem._replace(vector=vector, apart=apart), device)
        if native is not None and native.cycles < cycles:
            tile, cycles = native, native.cycles
    if tile is None or cycles >= scalar_cycles:
        return None
    blocks_y, blocks_x = -(-rows // tile.rows), -(-columns // tile.columns)
    blocks_c = -(-channels // tile.channels)
    return Launch(
        "tensor_adjoint.cu",
        "tensor_gradient",
        (
            *types(dtype, upstream=upstream),
            ("which", which),
            *pairs(patch=geometry.patch_size, step=(y.step, x.step)),
            ("lattice_y", geometry.y.lattice_step),
            *pairs(
                spacing=geometry.dilation_patch,
                phases=(y.phases, x.phases),
                advance=(y.advance, x.advance),
            ),
            *tile.constants,
        ),
        samples * y.phases * tile.phase_groups * blocks_y * blocks_x * blocks_c,
        tile.threads,
        tile.shared_bytes,
        (
            "grad_cost" if geometry.taps == 1 else "volume",
            f"fmap{3 - which}",
            f"grad_fmap{which}",
        ),
        (
            *zip(("channels", "height", "width"), shape[1:], strict=True),
            *zip(("lattice_height", "lattice_width"), lattice, strict=True),
            ("origin_y", -geometry.y.padding),
            *pairs(
                target=(y.target, x.target),
                targets=(y.number, x.number),
                shift=(y.shift, x.shift),
                first=(y.first, x.first),
                blocks=(blocks_y, blocks_x),
            ),
            ("blocks_c", blocks_c),
        ),
        cycles=tile.cycles,
    )


@lru_cache(maxsize=512)
def _tile(problem: _Problem, device: Device) -> Tile | None:
    return fastest(_tiles(problem, device))


def _tiles(problem: _Problem, device: Device) -> Iterator[Tile]:
    """Yield the tiles that fit, each with the cycles that the model gives it."""
    phases = column_phases(problem.phases_x)
    for tile_rows, row_tiles, channel_tiles in product((1, 2), (1, 2, 3, 4), (2, 4, 8)):
        if row_tiles > 1 and (row_tiles - 1) * tile_rows >= problem.rows:
            continue
        for x_groups in range(1, MOST_WARPS // phases + 1):
            if x_groups > 1 and (x_groups - 1) * POSITIONS // tile_rows >= problem.columns:
                continue
            for channel_groups in range(1, MOST_WARPS // (phases * x_groups) + 1):
                if (channel_groups - 1) * channel_tiles * CHANNELS >= problem.channels:
                    continue
                yield from _tiles_of_block(
                    problem, device, phases, tile_rows, row_tiles, channel_tiles, x_groups,
                    channel_groups,
                )  # fmt: skip


def _tiles_of_block(
    problem: _Problem,
    device: Device,
    phases: int,
    tile_rows: int,
    row_tiles: int,
    channel_tiles: int,
    x_groups: int,
    channel_groups: int,
) -> Iterator[Tile]:
    """Yield the tiles of such blocks; they differ in the rows of the source staged at a time."""
    sums = 4 * row_tiles * channel_tiles
    registers = sums + 2 * channel_tiles + 4 * problem.parts + BESIDE
    if sums > MOST_SUMS or registers > MOST_REGISTERS:
        return
    (patch_y, patch_x), (advance_y, advance_x) = problem.patch, problem.advance
    tile_columns = POSITIONS // tile_rows
    rows, columns = row_tiles * tile_rows, x_groups * tile_columns
    channels = channel_groups * channel_tiles * CHANNELS
    warps = phases * x_groups * channel_groups
    unit, lead = (problem.unit, problem.lead) if phases == problem.phases_x else (1, 0)

    before = advance_x * (tile_columns - 1)
    depth = DEPTH_BYTES // problem.element_bytes
    depths = -(-(before + patch_x) // depth)
    source_columns = advance_x * (columns - tile_columns) + depth * depths
    moved = max(4 // problem.upstream_bytes, unit)
    floats = problem.upstream_bytes == 4
    shifts = floats and problem.which == 2
    own = columns if problem.which == 1 or floats else source_columns
    pitch_g = odd_units((moved - 1 if shifts else lead) + phases * own, 8)
    bytes_g = (before + rows * depth * depths) * pitch_g * problem.upstream_bytes
    targets = tile_rows * columns * phases
    result_bytes = targets * (channels + PITCH) * problem.element_bytes
    if problem.apart is not None:
        result_bytes = channels * problem.element_bytes * odd_units(targets, 8)
        result_bytes += 4 * channels if problem.element_bytes == 4 else 0
    results = rows * columns * phases * channels

    # Rows of the source that a block meets, and of G that it stages with them.
    source_rows = patch_y + advance_y * (rows - 1)
    meeting = patch_y + advance_y * (tile_rows - 1)
    bands = warps * row_tiles * meeting * depths
    multiplied = bands * channel_tiles * problem.parts
    beside = lead if problem.which == 1 else moved - 1
    copies_g = rows * meeting * patch_x * -(-(phases * columns + beside) // moved)
    # Floats of several phases lie between each other, and rows that shift meet in the same banks.
    loads = 4 if problem.element_bytes == 4 else 8
    loaded = bands * loads * (max(gcd(phases, 4), 1 + (shifts and unit > 1)) if floats else 1)
    loaded_source = warps * source_rows * depths * 2 * channel_tiles
    of_word = WORD + PART * (problem.parts - 1)
    rounding = 0.0
    if problem.element_bytes == 4:
        # Four words that are loaded at once are of different matrices.
        of_word, rounding = 1 + ROUND, (1 + ROUND) * loaded_source
    result_vector, together = problem.vector, 1
    if problem.apart is not None:
        in_line = problem.apart.step == 1 and phases == problem.phases_x
        result_vector, together = problem.vector if in_line else 1, 4 // problem.element_bytes
    instructions = results * (STORE / (result_vector * together) + RESULT)
    instructions += copies_g * COPY_UPSTREAM
    instructions += 32 * (MULTIPLY * multiplied + (BAND + 4 * of_word) * bands + rounding)
    instructions += 32 * ROW * warps * source_rows
    phase_groups = -(-problem.phases_x // phases)
    blocks = problem.samples * phase_groups * -(-problem.rows // rows)
    blocks *= -(-problem.columns // columns) * -(-problem.channels // channels)
    met = advance_x * (columns - 1) + patch_x
    for how in _sources(problem, met, source_columns, phases, channels, 32 * warps):
        if registers + how.registers > MOST_REGISTERS:
            continue
        row_bytes = how.row_bytes + bytes_g
        for at_once in sorted({1, 2, 4, source_rows}):
            if at_once > source_rows:
                break
            rounds = -(-source_rows // at_once)
            buffers = min(2, rounds)
            shared_bytes = buffers * at_once * row_bytes + how.table_bytes
            shared_bytes = max(shared_bytes, result_bytes)
            if shared_bytes > device.shared_bytes:
                break
            block = Block(
                32 * warps,
                registers + how.registers,
                shared_bytes,
                # From a row's registers to shared memory, one after another.
                rounds if problem.apart is None else source_rows,
                multiply_adds=0,
                wavefronts=loaded
                + loaded_source
                + source_rows * how.wavefronts
                + copies_g * moved * problem.upstream_bytes / WAVEFRONT_BYTES
                + results / 32,
                instructions=instructions + source_rows * how.instructions,
                words=0,
                bytes=source_rows * how.bytes
                + copies_g * patch_y // meeting * moved * problem.upstream_bytes
                + results * problem.element_bytes,
                ahead=rounds > 1,
                matrix_cycles=multiplied * MULTIPLY_ADDS / matrix_rate(device),
            )
            constants = {
                "tile_rows": tile_rows, "row_tiles": row_tiles, "channel_tiles": channel_tiles,
                "x_groups": x_groups, "phases": phases, "channel_groups": channel_groups,
                "at_once": at_once, "buffers": buffers, "channels_last": problem.apart is None,
                "vector": how.vector, "source_lead": how.lead, "unit": unit, "lead": lead,
                "result_vector": result_vector,
                "threads": 32 * warps, "shared_words": -(-shared_bytes // 4),
            }  # fmt: skip
            yield Tile(
                tuple(constants.items()), rows, columns, channels, phase_groups, 32 * warps,
                shared_bytes, cycles_in_rounds(block, blocks, "float32", device),
            )  # fmt: skip


class _Source(NamedTuple):
    """How a row of the source is staged; counts as in `cuda.tensor.Staged`."""

    vector: int
    lead: int
    row_bytes: int
    """Of shared memory."""
    table_bytes: int
    registers: int
    instructions: float
    wavefronts: float
    bytes: float


def _sources(
    problem: _Problem, met: int, source_columns: int, phases: int, channels: int, threads: int
) -> Iterator[_Source]:
    """Yield the ways to stage a row of the source, of which ``met`` columns are needed."""
    element_bytes = problem.element_bytes
    slot_bytes = (channels + PITCH) * element_bytes
    if problem.apart is None:
        pixels = phases * source_columns
        yield _Source(
            problem.vector,
            0,
            pixels * slot_bytes,
            4 * pixels,
            0,
            pixels * channels // max(2, problem.vector) * COPY,
            pixels * channels * element_bytes / WAVEFRONT_BYTES,
            phases * met * channels * element_bytes,
        )
        return
    step, spacing, (lead,) = problem.apart
    in_line = phases == problem.phases_x
    for vector in dict.fromkeys((problem.vector if in_line else 1, 1)):
        at = lead if vector > 1 else 0
        row = staged(1, met, spacing, at, channels, step, phases, vector, element_bytes)
        groups = row.groups + max(0, source_columns // CHANNELS - row.runs)
        of_thread = -(-row.lanes // threads)
        yield _Source(
            vector,
            at,
            phases * groups * (CHANNELS * slot_bytes + MORE),
            0,
            of_thread * (row.registers + 2),
            row.instructions,
            row.wavefronts,
            row.bytes,
        )
