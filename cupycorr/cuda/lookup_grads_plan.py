"""Plan the CUDA launches of a flow-guided lookup's gradients.

Pure arithmetic, as `cuda.plan` is. All gradients are computed with the channels of a position or
cell side by side; maps that lie otherwise are turned first, and the gradient of fmap1 last.
"""

from __future__ import annotations

from math import gcd, prod
from typing import NamedTuple

from cupycorr.cuda.cost import ISSUE, Constants, Device, matrix_rate
from cupycorr.cuda.launch import Launch, Plan, Workspace, pairs, types
from cupycorr.cuda.lookup_plan import Problem, constants, sizes
from cupycorr.cuda.turning import turn
from cupycorr.layer import DTYPES
from cupycorr.lookup import Lookup

RESULTS = ("grad_fmap1", "grad_levels", "grad_coords")
THREADS = 256
LANES = 32
MOST_WARPS = 6  # of a block of lookup_grad.cu: twelve fit the registers of a multiprocessor
RESIDENT = 2  # blocks of lookup_grad.cu that a multiprocessor holds
TARGETS = 8  # of a warp of lookup_grad.cu
SIDE = 32  # of a square of lookup_grad_pool.cu
WINDOWS_BYTES = 256 << 20  # of stored windows, unless one level needs more
MOST_ELEMENTS = 2**31 - 1  # of a map, or of a level's windows: within reach of a 32-bit offset
WORD = "float32"  # the dtype of a workspace of 4-byte words, whatever they are
MATRICES = ("lookup_grad_fmap1", "lookup_grad_levels")  # kernels that may use tensor cores
PARTS = {"float16": 2, "bfloat16": 3}  # 16-bit numbers of a share on tensor cores
MATRIX_LANES = 8  # of a warp, that share out its channels on tensor cores
STEP_ITEMS, STEP_CHANNELS = 16, 256  # of a warp's step on tensor cores
# Instructions of a warp, read off compiled kernels: per item, beside the multiply-adds; per step on
# tensor cores, and those of them that the integer unit takes.
ITEM, STEP, INTEGERS = 20, 455, 270
INTEGER_RATE = 64  # instructions of threads per cycle and multiprocessor, of the integer unit


class _Shape(NamedTuple):
    """How a block's warps, and a warp's targets, lie side by side, (y, x)."""

    group: tuple[int, int]
    warps: tuple[int, int]

    @property
    def block(self) -> tuple[int, int]:
        """Targets of a block."""
        return self.group[0] * self.warps[0], self.group[1] * self.warps[1]

    @property
    def threads(self) -> int:
        return LANES * prod(self.warps)


CELLS = _Shape((2, 4), (3, 2))  # of a block's cells


def samples_at_once(problem: Problem, lookup: Lookup, indexed: bool) -> int:
    """Return how many samples to plan for at a time, so that the workspace stays bounded.

    With indices it is all: samples that read one map add up.
    """
    if indexed:
        return problem.samples
    of_sample = 4 * lookup.levels * _windows(problem._replace(samples=1), lookup)
    return max(1, min(problem.samples, WINDOWS_BYTES // of_sample))


def plan_grads(
    results: tuple[str, ...],
    problem: Problem,
    lookup: Lookup,
    dtype: str,
    device: Device,
    *,
    indexed: tuple[bool, bool] = (False, False),
    last: bool = True,
    aligned: bool = True,
    plain: bool = False,
) -> Plan:
    """Plan the gradients of a lookup.

    Parameters
    ----------
    results : tuple of "grad_fmap1", "grad_levels" and "grad_coords"
        The gradients to compute.
    problem : Problem
        Shapes; no size is 0.
    lookup : Lookup
        What is sampled.
    dtype : {"float16", "bfloat16", "float32", "float64"}
        The maps' dtype.
    device : Device
        Where the plan will run.
    indexed : (bool, bool), default (False, False)
        Whether there are "index1" and "index2".
    last : bool, default True
        Whether the channels of "grad_fmap1" lie side by side. Those of "grad_levels" always do.
    aligned : bool, default True
        Whether all arrays begin at multiples of 16 bytes.
    plain : bool, default False
        Use the plain kernels only.

    Returns
    -------
    Plan
        Its arrays are "grad_cost", "fmap1", "level0", "level1" ..., "coords", "index1", "index2",
        "grad_fmap1", "grad_level0", "grad_level1" ... and "grad_coords".

    Raises
    ------
    RuntimeError
        If the device cannot launch the plan.
    """
    drawn = _Drawing(problem, lookup, dtype, device, aligned)
    fast = not plain and _windows_apply(problem, lookup, dtype, device)
    fmap1 = "fmap1"
    if "grad_levels" in results or "grad_coords" in results:
        fmap1 = drawn.turn_map("fmap1", 0)
    levels = tuple(f"level{number}" for number in range(lookup.levels))
    if "grad_fmap1" in results or "grad_coords" in results:
        levels = tuple(drawn.turn_map(name, n + 1) for n, name in enumerate(levels))
    of_fmap1, of_levels = "grad_fmap1" in results, "grad_levels" in results
    written = "grad_fmap1" if last else "grad_fmap1_turned"
    readers1 = drawn.list_readers(1) if of_fmap1 and indexed[0] else "readers1"
    readers2 = drawn.list_readers(2) if of_levels and indexed[1] else "readers2"
    if of_levels:
        drawn.bound_tiles()
    if of_fmap1 and not fast:
        drawn.plain_grad_fmap1(readers1, written)
    if of_levels and not fast:
        drawn.plain_grad_levels(fmap1, readers2)
    for stored in _stored(problem, lookup) if fast and (of_fmap1 or of_levels) else ():
        drawn.spread(stored)
        if of_fmap1:
            drawn.grad_fmap1(stored, readers1, written)
        if of_levels:
            drawn.grad_levels(stored, fmap1, readers2)
    if of_fmap1 and not last:
        drawn.turn_back(written, "grad_fmap1")
    if "grad_coords" in results:
        drawn.grad_coords(fast, fmap1)
    structs = (
        ("levels", levels),
        ("grad_levels", tuple(f"grad_level{number}" for number in range(lookup.levels))),
    )
    used = {name for launch in drawn.launches for name in launch.arrays}
    return _checked(
        Plan(
            tuple(drawn.launches),
            tuple(drawn.workspaces),
            tuple(struct for struct in structs if struct[0] in used),
        ),
        device,
    )


def plan_pyramid_grads(problem: Problem, lookup: Lookup, dtype: str, device: Device) -> Plan:
    """Plan the gradient of a map from those of its levels.

    Its arrays are "grad_level0", "grad_level1" ... and "grad_fmap2". The positions and the first of
    ``maps`` of the problem are those of the map.
    """
    channels, pixels = problem.channels, prod(problem.cells[0])
    names = tuple(f"grad_level{number}" for number in range(lookup.levels))
    launch = Launch(
        "lookup_grad_pool.cu",
        "pool_adjoint",
        (*types(dtype), *constants(lookup, problem), ("threads", THREADS)),
        problem.maps[1] * -(-channels // SIDE) * -(-pixels // SIDE),
        THREADS,
        SIDE * (SIDE + 1) * DTYPES[DTYPES[dtype].accumulator].itemsize,
        ("grad_levels", "grad_fmap2"),
        sizes(problem, channels),
    )
    return _checked(Plan((launch,), (), (("grad_levels", names),)), device)


class _Drawing:
    """A plan that is being drawn: each method adds the launches and workspaces of one step."""

    def __init__(
        self, problem: Problem, lookup: Lookup, dtype: str, device: Device, aligned: bool
    ) -> None:
        self.problem, self.lookup, self.dtype, self.device = problem, lookup, dtype, device
        self.aligned = aligned
        self.launches: list[Launch] = []
        self.workspaces: list[Workspace] = []
        self.tile = _tile(problem.size)
        self.tensor = _tensor_cores_are_faster(dtype, device)
        self.constants: Constants = (*types(dtype), *constants(lookup, problem))
        self.sizes = sizes(problem, problem.channels)

    def turn_map(self, name: str, which: int) -> str:
        """Lay the channels of fmap1 (0) or of a level side by side; return the array to read."""
        problem = self.problem
        if problem.last[which]:
            return name
        maps, size = problem.maps[0], problem.size
        if which > 0:
            maps, size = problem.maps[1], problem.cells[which - 1]
        shape = (maps, problem.channels, *size)
        turned = f"{name}_turned"
        self.workspaces.append(Workspace(turned, shape, self.dtype))
        self.launches.append(
            turn(shape, self.dtype, name, turned, aligned=self.aligned, back=False)
        )
        return turned

    def turn_back(self, name: str, turned: str) -> None:
        """Lay the positions of a gradient of fmap1 side by side."""
        shape = (self.problem.maps[0], self.problem.channels, *self.problem.size)
        self.workspaces.append(Workspace(name, shape, self.dtype))
        self.launches.append(turn(shape, self.dtype, name, turned, aligned=self.aligned, back=True))

    def list_readers(self, which: int) -> str:
        """List the samples that read each map of fmap1 (1) or fmap2 (2); return the array."""
        problem, name = self.problem, f"readers{which}"
        starts = problem.maps[which - 1] + 1
        self._work(name, starts + problem.samples)
        self._list(
            "list_readers", which, -(-max(starts, problem.samples) // THREADS), THREADS, 0,
            (f"index{which}", name),
        )  # fmt: skip
        return name

    def bound_tiles(self) -> None:
        """Find the windows of tiles of positions."""
        problem, tile = self.problem, prod(self.tile)
        shape = (problem.samples, self.lookup.levels, self._tiles(), 4)
        self._work("bounds", prod(shape))
        self._list("bound_tiles", 2, prod(shape[:3]), tile, 16 * tile, ("coords", "bounds"))

    def plain_grad_fmap1(self, readers: str, written: str) -> None:
        """Compute the gradient of fmap1, one element per thread."""
        elements = self.problem.maps[0] * prod(self.problem.size) * self.problem.channels
        arrays = ("grad_cost", "levels", "coords", readers, "index2", written)
        self._plain("plain_grad_fmap1", elements, arrays)

    def plain_grad_levels(self, fmap1: str, readers: str) -> None:
        """Compute the gradients of all levels, one element per thread."""
        arrays = ("grad_cost", fmap1, "coords", "index1", readers, "bounds", "grad_levels")
        self._plain("plain_grad_levels", sum(self._elements()), arrays)

    def spread(self, stored: range) -> None:
        """Spread grad_cost over the cells of the windows of some levels."""
        problem, lookup = self.problem, self.lookup
        self._work("windows", len(stored) * _windows(problem, lookup))
        self._work("origins", len(stored) * 2 * problem.samples * prod(problem.size))
        self._matrices(
            "spread_windows", CELLS, stored,
            problem.samples * len(stored) * -(-prod(problem.size) // LANES),
            _spread_bytes(lookup), ("grad_cost", "coords", "windows", "origins"),
        )  # fmt: skip

    def grad_fmap1(self, stored: range, readers: str, written: str) -> None:
        """Compute what some levels add to the gradient of fmap1."""
        problem, shape = self.problem, _shape_of_positions(self.problem.size)
        if len(stored) < self.lookup.levels:
            self._work("running", problem.maps[0] * prod(problem.size) * problem.channels)
        self._matrices(
            "lookup_grad_fmap1", shape, stored,
            self._slices() * problem.maps[0] * _blocks(problem.size, shape.block),
            4 * prod(shape.warps) * (self._list_words() + 8 * (TARGETS + 1)),
            ("windows", "origins", "levels", readers, "index2", "running", written),
        )  # fmt: skip

    def grad_levels(self, stored: range, fmap1: str, readers: str) -> None:
        """Compute the gradients of some levels."""
        problem, slices, elements = self.problem, self._slices(), self._elements()
        shape = _Shape((1, 8), (1, MOST_WARPS)) if problem.cells[0][0] == 1 else CELLS
        found = _segments(problem, self.lookup, shape, slices, self._tiles(), self.device)
        segments = tuple(count if level in stored else 0 for level, count in enumerate(found))
        blocks = sum(
            slices * problem.maps[1] * _blocks(size, shape.block) * count
            for size, count in zip(problem.cells, segments, strict=True)
        )
        warps, tile = prod(shape.warps), prod(self.tile)
        self._matrices(
            "lookup_grad_levels", shape, stored, blocks,
            4 * (warps * (self._list_words() + LANES + 1) + 3 * tile + 1),
            ("windows", "origins", fmap1, "index1", readers, "bounds", "parts", "grad_levels"),
            segments,
        )  # fmt: skip
        cut = [(count, size) for count, size in zip(segments, elements, strict=True) if count > 1]
        if cut:
            self._work("parts", sum(count * size for count, size in cut))
            self._matrices(
                "add_parts", shape, stored, -(-sum(size for _, size in cut) // shape.threads), 0,
                ("parts", "grad_levels"), segments,
            )  # fmt: skip

    def grad_coords(self, fast: bool, fmap1: str) -> None:
        """Compute the gradient of coords."""
        positions = self.problem.samples * prod(self.problem.size)
        arrays = ("grad_cost", fmap1, "levels", "coords", "index1", "index2", "grad_coords")
        if not fast:
            shared_bytes = 2 * THREADS * DTYPES[DTYPES[self.dtype].accumulator].itemsize
            self._plain("plain_grad_coords", LANES * positions, arrays, shared_bytes)
            return
        self._matrices(
            "lookup_grad_coords", CELLS, range(self.lookup.levels), -(-positions // MOST_WARPS),
            4 * MOST_WARPS * 3 * LANES, arrays,
        )  # fmt: skip

    def _list(
        self,
        kernel: str,
        which: int,
        blocks: int,
        threads: int,
        shared_bytes: int,
        arrays: tuple[str, ...],
    ) -> None:
        """Launch a kernel of lookup_grad_lists.cu."""
        more = (("which", which), *pairs(tile=self.tile), ("threads", THREADS))
        self._add(
            "lookup_grad_lists.cu", kernel, more, blocks, threads, shared_bytes, arrays
        )  # fmt: skip

    def _plain(
        self, kernel: str, threads: int, arrays: tuple[str, ...], shared_bytes: int = 0
    ) -> None:
        """Launch so many threads of a kernel of lookup_grad_plain.cu."""
        self._add(
            "lookup_grad_plain.cu", kernel, (*pairs(tile=self.tile), ("threads", THREADS)),
            -(-threads // THREADS), THREADS, shared_bytes, arrays,
        )  # fmt: skip

    def _matrices(
        self,
        kernel: str,
        shape: _Shape,
        stored: range,
        blocks: int,
        shared_bytes: int,
        arrays: tuple[str, ...],
        segments: tuple[int, ...] = (),
    ) -> None:
        """Launch a kernel of lookup_grad.cu."""
        channels, itemsize = self.problem.channels, DTYPES[self.dtype].itemsize
        tensor = self.tensor and kernel in MATRICES
        of_lane = _slice(channels) // (MATRIX_LANES if tensor else LANES)
        # On tensor cores four units are exchanged; larger ones would take too many registers.
        most = min(4, of_lane // 4) if tensor else min(16 // itemsize, of_lane)
        unit = gcd(channels, most) if self.aligned else 1
        segments = segments or (0,) * self.lookup.levels
        self._add(
            "lookup_grad.cu", kernel,
            (
                *pairs(group=shape.group, warps=shape.warps),
                ("unit", unit),
                ("loads", of_lane // unit),
                *pairs(tile=self.tile),
                ("resident", RESIDENT),
                ("tensor", tensor),
            ),
            blocks, shape.threads, shared_bytes, arrays,
            (
                *(("first", stored.start), ("behind", stored.stop)),
                *((f"segments[{number}]", count) for number, count in enumerate(segments)),
            ),
        )  # fmt: skip

    def _add(
        self,
        source: str,
        kernel: str,
        more: Constants,
        blocks: int,
        threads: int,
        shared_bytes: int,
        arrays: tuple[str, ...],
        fields: tuple[tuple[str, int], ...] = (),
    ) -> None:
        self.launches.append(
            Launch(
                source, kernel, (*self.constants, *more), blocks, threads, shared_bytes, arrays,
                (*self.sizes, *fields),
            )
        )  # fmt: skip

    def _work(self, name: str, words: int) -> None:
        """Let launches hand so many 4-byte words to each other, if no more under that name."""
        kept = next((one for one in self.workspaces if one.name == name), None)
        if kept is not None:
            self.workspaces.remove(kept)
            words = max(words, *kept.shape)
        self.workspaces.append(Workspace(name, (words,), WORD))

    def _elements(self) -> list[int]:
        """Return the elements of each level."""
        maps, channels = self.problem.maps[1], self.problem.channels
        return [maps * prod(size) * channels for size in self.problem.cells]

    def _tiles(self) -> int:
        """Return the tiles of a sample's positions."""
        return _blocks(self.problem.size, self.tile)

    def _slices(self) -> int:
        return -(-self.problem.channels // _slice(self.problem.channels))

    def _list_words(self) -> int:
        """Return the words of shared memory of a warp: its items, and what it owns."""
        return LANES * (2 + (2 if self.tensor else TARGETS)) + 16


def _span(lookup: Lookup) -> tuple[int, int]:
    """Return the rows and columns of a window."""
    return 2 * lookup.reach[0] + 2, 2 * lookup.reach[1] + 2


def _windows(problem: Problem, lookup: Lookup) -> int:
    """Return the cells of all windows of a level."""
    return problem.samples * prod(problem.size) * prod(_span(lookup))


def _stored(problem: Problem, lookup: Lookup) -> list[range]:
    """Return the levels whose windows are stored at a time: all, or what the workspace holds."""
    at_once = max(1, min(lookup.levels, WINDOWS_BYTES // (4 * _windows(problem, lookup))))
    levels = range(lookup.levels)
    return [levels[first : first + at_once] for first in levels[::at_once]]


def _spread_bytes(lookup: Lookup) -> int:
    """Return the shared memory of spread_windows: outputs and windows of 32 positions."""
    return 4 * (prod(lookup.patch_size) * (LANES + 1) + LANES * (prod(_span(lookup)) + 1))


def _windows_apply(problem: Problem, lookup: Lookup, dtype: str, device: Device) -> bool:
    """Whether windows are stored, and gradients of the maps computed from them."""
    of_map = problem.channels * max(prod(problem.size), *map(prod, problem.cells))
    return (
        dtype != "float64"
        and _spread_bytes(lookup) <= device.shared_bytes
        and max(of_map, _windows(problem, lookup)) <= MOST_ELEMENTS
    )


def _tensor_cores_are_faster(dtype: str, device: Device) -> bool:
    """Whether they are for the gradients of maps: by the cycles of one step.

    Not on devices of compute capability 12.0, for which the compilers run out of registers.
    """
    if dtype not in PARTS or not 80 <= device.capability < 120:
        return False
    products = STEP_ITEMS * TARGETS * STEP_CHANNELS
    units = products / device.multiply_adds
    issued = (products / LANES + STEP_ITEMS * ITEM) * LANES / ISSUE
    matrices = PARTS[dtype] * products / matrix_rate(device)
    integers = INTEGERS * LANES / INTEGER_RATE
    return max(matrices, integers, STEP * LANES / ISSUE) < max(units, issued)


def _slice(channels: int) -> int:
    """Return how many channels a warp owns: as few slices as there can be, but no idle lanes."""
    return min(
        (256, 128, 64, 32),
        key=lambda size: -(-channels // size) * (TARGETS * size // LANES + ITEM),
    )


def _power_of_two(size: int, most: int) -> int:
    """Return the least power of two that is not below a size, or ``most``."""
    return min(most, 1 << (size - 1).bit_length())


def _tile(size: tuple[int, int]) -> tuple[int, int]:
    """Return a tile of positions (y, x) of 32 to 128, as the positions lie."""
    rows = _power_of_two(size[0], 8)
    return rows, max(LANES // rows, _power_of_two(size[1], 128 // rows))


def _shape_of_positions(size: tuple[int, int]) -> _Shape:
    """Return blocks of up to 64 positions, as positions lie."""
    group = (1, 8) if size[0] == 1 else (2, 4)
    warps_y = min(-(-size[0] // group[0]), MOST_WARPS // 2)
    return _Shape(group, (warps_y, min(-(-size[1] // group[1]), MOST_WARPS // warps_y)))


def _blocks(size: tuple[int, int], block: tuple[int, int]) -> int:
    """Return how many blocks of a size cover positions or cells."""
    return -(-size[0] // block[0]) * -(-size[1] // block[1])


def _segments(
    problem: Problem, lookup: Lookup, shape: _Shape, slices: int, tiles: int, device: Device
) -> tuple[int, ...]:
    """Return how many blocks share the positions that reach a block's cells, for each level.

    So many that no block has more to do than a multiprocessor has on average for each of the
    blocks that it holds.
    """
    samples = problem.samples / problem.maps[1]  # of a map
    span, found, total = _span(lookup), [], 0.0
    for size in problem.cells:
        reach = prod(block + extent for block, extent in zip(shape.block, span, strict=True))
        positions = samples * prod(problem.size) * min(1, reach / prod(size))
        found.append(positions)
        total += positions * problem.maps[1] * _blocks(size, shape.block) * slices
    share = total / (RESIDENT * device.multiprocessors)
    most = max(1, int(samples * tiles))
    return tuple(max(1, min(most, -int(-positions // share))) for positions in found)


def _checked(plan: Plan, device: Device) -> Plan:
    """Refuse what the device cannot launch."""
    for launch in plan.launches:
        limits = (
            ("blocks", launch.blocks, 2**31 - 1),
            ("bytes of shared memory per block", launch.shared_bytes, device.shared_bytes),
        )
        for what, wanted, most in limits:
            if wanted > most:
                raise RuntimeError(
                    f"{launch.kernel} must have at most {most} {what} on this device, got {wanted}"
                )
    return plan
