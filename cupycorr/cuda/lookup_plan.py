"""Plan the CUDA launches of a flow-guided lookup: which kernels, their constants, their grids.

Pure arithmetic, as `cuda.plan` is. Every kernel reads maps whose cells have their channels side by
side, (maps, *positions, channels) in memory. Maps that lie otherwise are packed first.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from cupycorr.cuda.cost import RESERVED_BYTES, Constants, Device, round_up
from cupycorr.cuda.launch import Launch, Plan, Shape, Workspace, pairs, types
from cupycorr.layer import DTYPES
from cupycorr.lookup import Lookup

THREADS = 256
SIDE = 32  # of a square of lookup_pack
MOST_BLOCKS = 2**31 - 1
# Of lookup_tiled.cu.
UNIT_BYTES = 16
STEP_CELLS = 16
MOST_STEPS, MOST_TENSOR_STEPS = 11, 12  # as registers allow
SPARE_STEPS = 2  # for boxes that are larger than those of constant flow
BUFFERS = 2


class Problem(NamedTuple):
    """The shapes of a lookup's arrays, and how the maps lie in memory."""

    samples: int
    """Entries of coords."""
    maps: tuple[int, int]
    """Entries of fmap1 and of each level."""
    channels: int
    positions: Shape
    """The shape of the positions of a sample: one to three axes."""
    cells: tuple[tuple[int, int], ...]
    """The size (h, w) of each level."""
    last: tuple[bool, ...]
    """For fmap1 and each level: whether channels lie side by side. Else positions do."""
    index_dtype: str = "int64"
    """Dtype of index1 and index2."""

    @property
    def size(self) -> tuple[int, int]:
        """Positions of a sample as rows and columns: rows of the last axis."""
        return prod(self.positions[:-1]), self.positions[-1]


def plan_cost(
    problem: Problem,
    lookup: Lookup,
    dtype: str,
    device: Device,
    *,
    aligned: bool = True,
    plain: bool = False,
) -> Plan:
    """Plan the cost of a lookup.

    Parameters
    ----------
    problem : Problem
        Shapes; no size is 0.
    lookup : Lookup
        What is sampled.
    dtype : {"float16", "bfloat16", "float32", "float64"}
        The maps' dtype.
    device : Device
        Where the plan will run.
    aligned : bool, default True
        Whether all arrays begin at multiples of 16 bytes.
    plain : bool, default False
        Use the plain kernel only.

    Returns
    -------
    Plan
        Its arrays are "fmap1", "level0", "level1" ..., "coords", "index1", "index2" and "cost";
        the lookup itself is given "levels", a struct of the addresses of `level_names`.

    Raises
    ------
    RuntimeError
        If the device cannot launch the plan.
    """
    tile = None if plain else _tile(problem, lookup, dtype, device)
    if tile is None:
        packs, workspaces, names = _packed(problem, dtype, problem.channels)
        outputs = problem.samples * lookup.levels * prod(lookup.patch_size) * prod(problem.size)
        launch = Launch(
            "lookup_plain.cu",
            "lookup_plain",
            (*types(dtype), *constants(lookup, problem), ("threads", THREADS)),
            -(-outputs // THREADS),
            THREADS,
            0,
            (names[0], "levels", "coords", "index1", "index2", "cost"),
            sizes(problem, problem.channels),
        )
        return _checked(Plan((*packs, launch), workspaces))
    channels = round_up(problem.channels, UNIT_BYTES // DTYPES[tile.element].itemsize)
    packs, workspaces, names = _packed(
        problem, dtype, channels, tile.element,
        every=not aligned or channels != problem.channels or tile.element != dtype,
    )  # fmt: skip
    launch = Launch(
        "lookup_tiled.cu",
        "lookup_tiled",
        (
            *types(tile.element, result=dtype),
            *constants(lookup, problem),
            *tile.constants,
            ("shared_bytes", tile.shared_bytes),
        ),
        tile.blocks,
        tile.threads,
        tile.shared_bytes,
        (names[0], "levels", "coords", "index1", "index2", "cost"),
        sizes(problem, channels),
        cycles=tile.cycles,
    )
    return _checked(Plan((*packs, launch), workspaces))


def level_names(plan: Plan, lookup: Lookup) -> tuple[str, ...]:
    """Return the arrays that a lookup reads as its levels."""
    packed = {workspace.name for workspace in plan.workspaces}
    names = [f"level{level}" for level in range(lookup.levels)]
    return tuple(f"{name}_packed" if f"{name}_packed" in packed else name for name in names)


def plan_pyramid(problem: Problem, lookup: Lookup, dtype: str, *, copied: bool) -> Plan:
    """Plan the levels of a map.

    Parameters
    ----------
    problem : Problem
        Shapes; no size is 0. Positions and the first of ``last`` are those of the map "fmap2".
    lookup, dtype
        As for `plan_cost`.
    copied : bool
        Whether "level0" is written; else it is the map itself.

    Returns
    -------
    Plan
        Its arrays are "fmap2" and "level0", "level1" ...

    Raises
    ------
    RuntimeError
        If the device cannot launch the plan.
    """
    launches = []
    if copied:
        channels = problem.channels
        launches.append(_pack(problem, 0, dtype, ("fmap2", "level0"), dtype, channels))
    for level, (rows, columns) in list(enumerate(problem.cells))[1:]:
        shape = (problem.maps[0], rows, columns)
        launches.append(
            Launch(
                "lookup_pack.cu",
                "lookup_pool",
                (*types(dtype, result=dtype), *pairs(pool=lookup.pool), ("threads", THREADS)),
                -(-prod(shape) * problem.channels // THREADS),
                THREADS,
                0,
                (f"level{level - 1}", f"level{level}"),
                (
                    ("channels", problem.channels),
                    *zip(("finer_rows", "finer_columns"), problem.cells[level - 1], strict=True),
                    *zip(("samples", "rows", "columns"), shape, strict=True),
                ),
            )
        )
    return _checked(Plan(tuple(launches), ()))


class _Tile(NamedTuple):
    """The tile of lookup_tiled.cu."""

    element: str
    """Dtype of the maps that it reads."""
    constants: Constants
    blocks: int
    threads: int
    shared_bytes: int
    cycles: float


def _tile(problem: Problem, lookup: Lookup, dtype: str, device: Device) -> _Tile | None:
    """Return the tile, or None where the plain kernel is better or the only one."""
    if dtype == "float64":
        return None
    asynchronous = device.copies_asynchronously
    tensor = dtype != "float32" and asynchronous
    element = dtype if tensor else "float32"
    height, width = problem.size
    in_row = lookup.radius[0] == 0 or height == 1
    if in_row:
        group, most = ((2, 8), (2, 32)) if tensor else ((1, 8), (1, 64))
    else:
        group, most = ((4, 4), (4, 16)) if tensor else ((2, 4), (8, 8))
    tile_y, tile_x = (
        min(largest, round_up(size, of_group))
        for largest, size, of_group in zip(most, (height, width), group, strict=True)
    )
    if not tensor and tile_y * tile_x % 16:
        tile_x += group[1]  # a warp has two groups
    slots = tile_y * tile_x // (group[0] * group[1])
    threads = slots * (32 if tensor else 16)
    most_steps = MOST_TENSOR_STEPS if tensor else MOST_STEPS
    span_x = 2 * lookup.reach[1] + 2
    bands = 0
    while True:
        bands += 1
        band = -(-lookup.patch_size[0] // bands)
        span_y = (band - 1) * lookup.dilation_patch[0] + 2
        box = (group[0] - 1 + span_y) * (group[1] - 1 + span_x)
        if box <= STEP_CELLS * most_steps or band == 1:
            break
    if span_y * span_x > STEP_CELLS * most_steps:
        return None
    steps = min(most_steps, -(-box // STEP_CELLS) + SPARE_STEPS)
    # A row, and a column, to spare.
    capacity = (tile_y + span_y) * (tile_x + span_x)
    capacity = max(capacity, STEP_CELLS * steps)
    units = 2 if not asynchronous else 4
    positions = tile_y * tile_x
    at_once = 8 if tensor or group[1] == 8 else 4
    cells = STEP_CELLS * steps
    pitch = round_up(cells, 32) + 8 if tensor else cells + 1
    staged = max(BUFFERS * (capacity + positions) * units * UNIT_BYTES, slots * at_once * pitch * 4)
    copied = round_up(capacity, threads // units) + positions
    plan = 8 * copied + 40 * positions + 40 * slots + 48
    shared_bytes = round_up(staged, UNIT_BYTES) + round_up(plan, UNIT_BYTES)
    resident = min(3, device.shared_bytes_of_multiprocessor // (shared_bytes + RESERVED_BYTES))
    if resident < 1:
        return None
    blocks = problem.samples * -(-height // tile_y) * -(-width // tile_x)
    return _Tile(
        element,
        (
            ("tensor", tensor),
            ("asynchronous", asynchronous),
            ("band", band),
            *pairs(group=group, tile=(tile_y, tile_x)),
            ("steps", steps),
            ("units", units),
            ("capacity", capacity),
            ("resident", resident),
        ),
        blocks * -(-lookup.patch_size[0] // band) * lookup.levels,
        threads,
        shared_bytes,
        0.0,
    )


def constants(lookup: Lookup, problem: Problem) -> Constants:
    """Return what the kernels of a lookup have compiled in, beside types of maps and tiles."""
    return (
        ("map_index", {"int32": "int", "int64": "long long"}[problem.index_dtype]),
        ("levels", lookup.levels),
        *pairs(radius=lookup.radius, spacing=lookup.dilation_patch, pool=lookup.pool),
        ("x_first", lookup.x_first),
    )


def sizes(problem: Problem, channels: int) -> tuple[tuple[str, int], ...]:
    """Return the ``Sizes`` of the kernels of a lookup; ``channels`` are those of a cell."""
    return (
        ("samples", problem.samples),
        *zip(("maps1", "maps2"), problem.maps, strict=True),
        ("channels", channels),
        *zip(("height", "width"), problem.size, strict=True),
        *((f"rows[{level}]", rows) for level, (rows, _) in enumerate(problem.cells)),
        *((f"columns[{level}]", columns) for level, (_, columns) in enumerate(problem.cells)),
    )


def _packed(
    problem: Problem, dtype: str, channels: int, result: str | None = None, *, every: bool = False
) -> tuple[tuple[Launch, ...], tuple[Workspace, ...], tuple[str, ...]]:
    """Pack the maps that lie otherwise, or every one, to cells of so many channels.

    Returns the launches, the workspaces, and the names of the maps to read.
    """
    kind = dtype if result is None else result
    launches, workspaces, names = [], [], []
    for which, last in enumerate(problem.last):
        name = f"level{which - 1}" if which > 0 else "fmap1"
        if every or not last:
            arrays = (name, f"{name}_packed")
            launches.append(_pack(problem, which, dtype, arrays, kind, channels))
            count, positions = _map(problem, which)
            workspaces.append(Workspace(arrays[1], (count, positions, channels), kind))
            name = arrays[1]
        names.append(name)
    return tuple(launches), tuple(workspaces), tuple(names)


def _pack(
    problem: Problem, which: int, dtype: str, arrays: tuple[str, str], result: str, padded: int
) -> Launch:
    """Plan to lay the channels of a map's cells side by side, zeros behind the last."""
    channels, (count, positions) = problem.channels, _map(problem, which)
    steps = (1, channels) if problem.last[which] else (positions, 1)
    blocks_c, blocks_p = -(-padded // SIDE), -(-positions // SIDE)
    return Launch(
        "lookup_pack.cu",
        "lookup_pack",
        (*types(dtype, result=result), *pairs(pool=(1, 1)), ("threads", THREADS)),
        count * blocks_c * blocks_p,
        THREADS,
        SIDE * (SIDE + 1) * DTYPES[DTYPES[dtype].accumulator].itemsize,
        arrays,
        (
            ("channels", channels),
            ("padded", padded),
            ("positions", positions),
            *zip(("channel_step", "position_step"), steps, strict=True),
            *(("blocks_c", blocks_c), ("blocks_p", blocks_p)),
        ),
    )


def _map(problem: Problem, which: int) -> tuple[int, int]:
    """Return the number of maps, and the positions of each: of fmap1 (0) or of a level."""
    if which == 0:
        return problem.maps[0], prod(problem.positions)
    return problem.maps[1], prod(problem.cells[which - 1])


def _checked(plan: Plan) -> Plan:
    """Refuse what no device can launch."""
    for launch in plan.launches:
        if launch.blocks > MOST_BLOCKS:
            raise RuntimeError(
                f"{launch.kernel} must have at most {MOST_BLOCKS} blocks, got {launch.blocks}"
            )
    return plan
