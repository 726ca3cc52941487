"""Count what the kernels of the lookup's gradients do for some coordinates, and predict times.

The counts are exact for lookup_grad.cu, whose lists are made up here once more. Times follow from
them as in `cuda.cost`: the unit of a multiprocessor that is busy longest decides.
"""

from math import prod
from typing import NamedTuple

import numpy as np
from devices import DEVICES
from kernel_costs import FIGURES

from cupycorr.cuda import lookup_grads_plan
from cupycorr.cuda.cost import EFFICIENCY, EFFICIENCY_PER_WARP, ISSUE
from cupycorr.cuda.lookup_grads_plan import LANES, MOST_WARPS, TARGETS
from cupycorr.cuda.lookup_plan import Problem
from cupycorr.layer import DTYPES

AT_ONCE = {4: 2, 2: 4}  # items, by bytes of an element
MOST_CELLS = 256  # of a box
CHANNELS = 256  # of a warp
# Instructions of a warp: per item beside its multiply-adds; per list of 32 items; per tile that is
# looked at; per cell and per list of 32 cells of the gradient of coords. Read off compiled kernels.
ITEM, LIST, TILE, CELL, CELLS = 16, 305, 330, 20, 150
BROADCAST = 2  # wavefronts of a 16-byte load of shared memory that is the same for all lanes
DRAM_SHARE = 0.85  # of its rate, at most


class Counts(NamedTuple):
    """What all warps of a slice of channels do."""

    items: int
    """That are added to the sums of eight targets."""
    lists: int
    """Of up to 32 items."""
    tiles: int = 0
    """Tiles of positions that warps look at."""


def origins(lookup, coords, cells):
    """Yield the first cells (y, x) of all windows (H, W) of a sample, and the size, by level."""
    for level, size in enumerate(cells):
        y, x = (
            np.floor(coords[axis] / pool**level).astype(int) - reach
            for axis, pool, reach in zip((1, 0), lookup.pool, lookup.reach, strict=True)
        )
        yield y, x, size


def count_fmap1(lookup, coords, cells, at_once):
    """Count what lookup_grad_fmap1 does."""
    items, lists = 0, 0
    span_y, span_x = lookup_grads_plan._span(lookup)
    group_y, group_x = lookup_grads_plan._shape_of_positions(coords.shape[1:]).group
    for y, x, (rows, columns) in origins(lookup, coords, cells):
        box = np.stack([np.maximum(y, 0), np.minimum(y + span_y, rows),
                        np.maximum(x, 0), np.minimum(x + span_x, columns)])  # fmt: skip
        exists = (box[0] < box[1]) & (box[2] < box[3])
        for y0 in range(0, y.shape[0], group_y):
            for x0 in range(0, y.shape[1], group_x):
                at = np.s_[y0 : y0 + group_y, x0 : x0 + group_x]
                own = box[:, *at][:, exists[at]]
                if own.size == 0:
                    continue
                found = [(own[1].max() - own[0].min()) * (own[3].max() - own[2].min())]
                if found[0] > MOST_CELLS:
                    found = (own[1] - own[0]) * (own[3] - own[2])
                items += sum(-(-int(count) // at_once) * at_once for count in found)
                lists += sum(-(-int(count) // LANES) for count in found)
    return Counts(items, lists)


def count_levels(lookup, coords, cells, at_once):
    """Count what lookup_grad_levels does, with any segments."""
    items, lists, tiles = 0, 0, 0
    span = lookup_grads_plan._span(lookup)
    shape = lookup_grads_plan.CELLS
    tile = lookup_grads_plan._tile(coords.shape[1:])
    for *window, size in origins(lookup, coords, cells):
        for y0 in range(0, coords.shape[1], tile[0]):
            for x0 in range(0, coords.shape[2], tile[1]):
                at = np.s_[y0 : y0 + tile[0], x0 : x0 + tile[1]]
                own = [first[at].ravel() for first in window]
                exists = np.all([(first < cells) & (first + extent > 0) for first, extent, cells
                                 in zip(own, span, size, strict=True)], axis=0)  # fmt: skip
                own = [first[exists] for first in own]
                if own[0].size == 0:
                    continue
                reached = [
                    (
                        np.maximum(first, 0) // group,
                        (np.minimum(first + extent, cells) - 1) // group,
                    )
                    for first, extent, cells, group in zip(
                        own, span, size, shape.group, strict=True
                    )
                ]
                hits = np.zeros([-(-cells // group) for cells, group
                                 in zip(size, shape.group, strict=True)], int)  # fmt: skip
                for top, bottom, left, right in zip(*reached[0], *reached[1], strict=True):
                    hits[top : bottom + 1, left : right + 1] += 1
                items += int((-(-hits // at_once) * at_once).sum())
                lists += int((-(-hits // LANES)).sum())
                blocks = [
                    (min(first.max() + extent, cells) - 1) // block
                    - max(0, first.min()) // block
                    + 1
                    for first, extent, cells, block in zip(
                        own, span, size, shape.block, strict=True
                    )
                ]
                tiles += prod(blocks) * MOST_WARPS
    return Counts(items, lists, tiles)


def microseconds(lookup, coords, dtype, gpu):
    """Return the predicted times of the gradients of both maps together, and of that of coords."""
    device, figures, itemsize = DEVICES[gpu], FIGURES[gpu], DTYPES[dtype].itemsize
    size = coords.shape[1:]
    cells = tuple(lookup.level_sizes(*size))
    problem = Problem(1, (1, 1), CHANNELS, size, cells, (True,) * (1 + lookup.levels))
    plan = lookup_grads_plan.plan_grads(lookup_grads_plan.RESULTS, problem, lookup, dtype, device)
    blocks = {launch.kernel: launch.blocks for launch in plan.launches}
    at_once = AT_ONCE[itemsize]
    efficiency = EFFICIENCY + EFFICIENCY_PER_WARP * lookup_grads_plan.RESIDENT * MOST_WARPS / 4

    def computed(kernel, multiply_adds, instructions, wavefronts):
        """Return the time of a kernel; multiply-adds and instructions are those of warps."""
        cycles = max(
            multiply_adds * LANES / device.multiply_adds,
            (multiply_adds + instructions) * LANES / ISSUE,
            wavefronts * 128 / device.shared_rate,
        )
        fullest = -(-blocks[kernel] // device.multiprocessors) / blocks[kernel]
        return cycles * fullest / efficiency / (figures.gigahertz * 1e3)

    def moved(count):
        return count / (DRAM_SHARE * figures.dram * 1e3)

    of_lane = CHANNELS // LANES
    total, read = 0.0, of_lane * itemsize * LANES / 128 + 2 * BROADCAST
    for kernel, counts in (
        ("lookup_grad_fmap1", count_fmap1(lookup, coords, cells, at_once)),
        ("lookup_grad_levels", count_levels(lookup, coords, cells, at_once)),
    ):
        instructions = counts.items * ITEM + counts.lists * LIST + counts.tiles * TILE
        total += computed(
            kernel, counts.items * TARGETS * of_lane, instructions, counts.items * read
        )
    words = {one.name: prod(one.shape) for one in plan.workspaces}
    upstream = lookup.levels * prod(lookup.patch_size) * prod(size) * itemsize
    total += moved(upstream + 4 * words["windows"]) + moved(4 * words.get("parts", 0))
    window = prod(lookup_grads_plan._span(lookup))
    of_coords = lookup.levels * prod(size) * window
    slopes = computed(
        "lookup_grad_coords", of_coords * of_lane, of_coords * (CELL - of_lane)
        + of_coords / LANES * CELLS, of_coords * (read + 1),
    )  # fmt: skip
    return total, slopes
