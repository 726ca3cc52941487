"""Plan the gradients of 16-bit cost volumes on tensor cores: tiles, launches, and when they pay.

The kernel (``kernels/tensor_adjoint.cu``) reads a map whose channels lie side by side, and writes a
gradient of that kind. It takes volumes of one tap: with several, what comes from the taps is in
float32, and the kernel would have to round it. Tiles are chosen as in `cuda.tensor`.
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
    applies,
    column_phases,
    fastest,
    turning_pays,
)
from cupycorr.layer import Layer

ELEMENT_BYTES = 2
UNIT = 8  # elements of a 16-byte copy
CHANNELS, DEPTH = 8, 16  # of one product of matrices
STORE = 3  # instructions of a warp per 8 results
BESIDE = 52  # registers beside sums and operands; an estimate, fitted to compiled kernels
# Instructions of a warp per copy of the upstream gradient, per band (8 loads, 4 of pairs, a
# branch), and per row of the source; read off compiled kernels.
COPY_UPSTREAM, BAND, ROW = 18, 16, 60


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
    vector: int
    """Channels per copy; 1: through registers."""
    unit: int
    """Elements of the upstream gradient per copy, if a block has all phases."""
    lead: int
    """Elements before those that a block needs, so that copies are aligned."""


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
    scalar_cycles: float = inf,
) -> Launch | None:
    """Plan the gradient with respect to one map on tensor cores.

    Parameters
    ----------
    layer, shape, dtype, device, aligned, channels_last
        As for `cuda.plan.plan`.
    which : {1, 2}
        The map.
    targets : (Targets, Targets)
        Its positions along both axes.
    scalar_cycles : float, optional
        What the model gives product_adjoint.cu for contiguous maps.

    Returns
    -------
    Launch or None
        Its map and its gradient are (N, H, W, C), whatever ``channels_last`` says. None where
        tensor cores do not compute the layer, where no tile fits, or where turning the arrays would
        cost more than it gains.
    """
    geometry = layer.geometry
    if not applies(layer, dtype, device) or geometry.taps > 1:
        return None
    y, x = targets
    samples, channels = shape[:2]
    lattice = volume_shape(geometry, shape)[3:]
    rows, columns = -(-y.number // y.phases), -(-x.number // x.phases)
    unit = gcd(lattice[1], UNIT) if aligned else 1
    # Workspace is aligned.
    vector = gcd(channels, UNIT) if aligned or not channels_last else 1
    tile = _tile(
        _Problem(
            samples=size_class(samples * y.phases),
            channels=size_class(channels),
            rows=size_class(rows),
            columns=size_class(columns),
            patch=geometry.patch_size,
            phases_x=x.phases,
            advance=(y.advance, x.advance),
            which=which,
            vector=vector,
            unit=unit,
            lead=x.shift % unit,
        ),
        device,
    )
    if tile is None or not (
        channels_last or turning_pays(tile.cycles, scalar_cycles, shape, dtype, device)
    ):
        return None
    blocks_y, blocks_x = -(-rows // tile.rows), -(-columns // tile.columns)
    blocks_c = -(-channels // tile.channels)
    return Launch(
        "tensor_adjoint.cu",
        "tensor_gradient",
        (
            *types(dtype),
            ("which", which),
            *pairs(patch=geometry.patch_size, step=(y.step, x.step)),
            ("lattice_y", geometry.y.lattice_step),
            *pairs(
                spacing=geometry.dilation_patch,
                phases=(y.phases, x.phases),
                advance=(y.advance, x.advance),
            ),
            *tile.constants,
            ("vector", vector),
            ("result_vector", vector),
        ),
        samples * y.phases * tile.phase_groups * blocks_y * blocks_x * blocks_c,
        tile.threads,
        tile.shared_bytes,
        ("grad_cost", f"fmap{3 - which}", f"grad_fmap{which}"),
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
    registers = sums + 2 * channel_tiles + 4 + BESIDE
    if sums > MOST_SUMS or registers > MOST_REGISTERS:
        return
    (patch_y, patch_x), (advance_y, advance_x) = problem.patch, problem.advance
    tile_columns = POSITIONS // tile_rows
    rows, columns = row_tiles * tile_rows, x_groups * tile_columns
    channels = channel_groups * channel_tiles * CHANNELS
    warps = phases * x_groups * channel_groups
    unit, lead = (problem.unit, problem.lead) if phases == problem.phases_x else (1, 0)

    before = advance_x * (tile_columns - 1)
    depths = -(-(before + patch_x) // DEPTH)
    source_columns = advance_x * (columns - tile_columns) + DEPTH * depths
    pixels = phases * source_columns
    own = columns if problem.which == 1 else source_columns
    pitch_g = odd_units(lead + phases * own, UNIT)
    g_elements = (before + rows * DEPTH * depths) * pitch_g
    row_bytes = (pixels * (channels + UNIT) + g_elements) * ELEMENT_BYTES
    out_bytes = tile_rows * columns * phases * (channels + UNIT) * ELEMENT_BYTES
    results = rows * columns * phases * channels

    # Rows of the source that a block meets, and of G that it stages with them.
    source_rows = patch_y + advance_y * (rows - 1)
    meeting = patch_y + advance_y * (tile_rows - 1)
    bands = warps * row_tiles * meeting * depths
    multiplied = bands * channel_tiles
    staged = source_rows * pixels * channels
    copies = staged // max(2, problem.vector)
    moved = max(2, unit)
    beside = lead if problem.which == 1 else moved - 1
    copies_g = rows * meeting * patch_x * -(-(phases * columns + beside) // moved)
    met = source_rows * phases * (advance_x * (columns - 1) + patch_x) * channels
    loaded = warps * source_rows * depths * 2 * channel_tiles + 8 * bands
    wavefronts = (staged + copies_g * moved) * ELEMENT_BYTES / WAVEFRONT_BYTES
    instructions = copies * COPY + copies_g * COPY_UPSTREAM + results / UNIT * STORE
    instructions += 32 * (MULTIPLY * multiplied + BAND * bands + ROW * warps * source_rows)
    phase_groups = -(-problem.phases_x // phases)
    blocks = problem.samples * phase_groups * -(-problem.rows // rows)
    blocks *= -(-problem.columns // columns) * -(-problem.channels // channels)
    for at_once in sorted({1, 2, 4, source_rows}):
        if at_once > source_rows:
            break
        rounds = -(-source_rows // at_once)
        buffers = min(2, rounds)
        shared_bytes = max(buffers * at_once * row_bytes + 4 * pixels, out_bytes)
        if shared_bytes > device.shared_bytes:
            break
        block = Block(
            32 * warps,
            registers,
            shared_bytes,
            rounds,
            multiply_adds=0,
            wavefronts=loaded + wavefronts + results / 32,
            instructions=instructions,
            words=0,
            bytes=(met + copies_g * patch_y // meeting * moved + results) * ELEMENT_BYTES,
            ahead=rounds > 1,
            matrix_cycles=multiplied * MULTIPLY_ADDS / matrix_rate(device),
        )
        constants = {
            "tile_rows": tile_rows, "row_tiles": row_tiles, "channel_tiles": channel_tiles,
            "x_groups": x_groups, "phases": phases, "channel_groups": channel_groups,
            "at_once": at_once, "buffers": buffers, "unit": unit, "lead": lead,
            "threads": 32 * warps, "shared_words": -(-shared_bytes // 4),
        }  # fmt: skip
        yield Tile(
            tuple(constants.items()), rows, columns, channels, phase_groups, 32 * warps,
            shared_bytes, cycles_in_rounds(block, blocks, "float32", device),
        )  # fmt: skip
