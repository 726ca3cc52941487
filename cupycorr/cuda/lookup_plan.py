"""Plan the CUDA launches of a flow-guided lookup: which kernels, their constants, their grids.

Pure arithmetic, as `cuda.plan` is. Every kernel reads maps whose cells have their channels side by
side, (maps, *positions, channels) in memory. Maps that lie otherwise are packed first.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from cupycorr.cuda import lookup_tiles
from cupycorr.cuda.cost import Constants, Device, round_up
from cupycorr.cuda.launch import Launch, Plan, Shape, Workspace, pairs, types
from cupycorr.layer import DTYPES
from cupycorr.lookup import Lookup

THREADS = 256
SIDE = 32  # of a square of lookup_pack
MOST_BLOCKS = 2**31 - 1
MOST_UNITS = 2**31 - 1  # of a map, with an offset of 32 bits


class Problem(NamedTuple):
    """The shapes of a lookup's arrays, and how the maps lie in memory."""

    samples: int
    """Entries of coords."""
    maps: tuple[int, int]
    """Entries of fmap1 and of each level."""
    channels: int
    positions: Shape
    """The shape of the positions of a sample: any axes."""
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
        the lookup itself is given "levels", a struct of addresses.

    Raises
    ------
    RuntimeError
        If the device cannot launch the plan.
    """
    tile = None
    if not plain and _reaches(problem):
        tile = lookup_tiles.tile(
            lookup, problem.samples, problem.channels, problem.size, dtype, device
        )
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
        return _checked(Plan((*packs, launch), workspaces, (("levels", names[1:]),)))
    channels = round_up(problem.channels, lookup_tiles.UNIT_BYTES // DTYPES[tile.element].itemsize)
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
        ),
        tile.blocks,
        tile.threads,
        tile.shared_bytes,
        (names[0], "levels", "coords", "index1", "index2", "cost"),
        sizes(problem, channels),
        cycles=tile.cycles,
    )
    return _checked(Plan((*packs, launch), workspaces, (("levels", names[1:]),)))


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


def _reaches(problem: Problem) -> bool:
    """Whether 32-bit offsets reach all units of 16 bytes of each map, were they of float32."""
    most = max(prod(cells) for cells in (problem.size, *problem.cells))
    return most * round_up(problem.channels, 8) // 4 <= MOST_UNITS


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
