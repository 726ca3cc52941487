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
from cupycorr.cuda.cost import EFFICIENCY, EFFICIENCY_PER_WARP, ISSUE, matrix_rate
from cupycorr.cuda.lookup_grads_plan import (
    INTEGER_RATE,
    INTEGERS,
    LANES,
    MOST_WARPS,
    PARTS,
    STEP,
    STEP_ITEMS,
    TARGETS,
)
from cupycorr.cuda.lookup_plan import Problem
from cupycorr.layer import DTYPES

AT_ONCE = {4: 2, 2: 4}  # items, by bytes of an element
MOST_CELLS = 256  # of a box
CHANNELS = 256  # of a warp
# Instructions of a warp: per item beside its multiply-adds; per list of 32 items, and of one on
# tensor cores; per tile that is looked at; per cell and per list of 32 cells of the gradient of
# coords. Read off compiled kernels.
ITEM, LIST, TENSOR_LIST, TILE, CELL, CELLS = 14, 210, 60, 390, 20, 150
BROADCAST = 2  # wavefronts of a 16-byte load of shared memory that is the same for all lanes
# Wavefronts of a step on tensor cores, beside the channels: shares from eight windows at a time,
# and what is listed.
STEP_WAVEFRONTS = 4 * TARGETS + 12
DRAM_SHARE = 0.85  # of its rate, at most


class Counts(NamedTuple):
    """What all warps of a slice of channels do."""

    items: int
    """That are added to the sums of eight targets."""
    lists: int
    """Of up to 32 items."""
    vectors: int
    """That blocks read, each once: the channels of a cell or position."""
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
    items, lists, vectors = 0, 0, 0
    span_y, span_x = lookup_grads_plan._span(lookup)
    shape = lookup_grads_plan._shape_of_positions(coords.shape[1:])
    for y, x, (rows, columns) in origins(lookup, coords, cells):
        box = np.stack([np.maximum(y, 0), np.minimum(y + span_y, rows),
                        np.maximum(x, 0), np.minimum(x + span_x, columns)])  # fmt: skip
        exists = (box[0] < box[1]) & (box[2] < box[3])
        for own in _own(box, exists, shape.group):
            found = [_area(own)]
            if found[0] > MOST_CELLS:
                found = (own[1] - own[0]) * (own[3] - own[2])
            items += sum(-(-int(count) // at_once) * at_once for count in found)
            lists += sum(-(-int(count) // LANES) for count in found)
        vectors += sum(_area(own) for own in _own(box, exists, shape.block))
    return Counts(items, lists, int(vectors))


def _own(box, exists, shape):
    """Yield the boxes that exist of each rectangle of positions, if any."""
    for y0 in range(0, exists.shape[0], shape[0]):
        for x0 in range(0, exists.shape[1], shape[1]):
            at = np.s_[y0 : y0 + shape[0], x0 : x0 + shape[1]]
            if exists[at].any():
                yield box[:, *at][:, exists[at]]


def _area(own):
    return (own[1].max() - own[0].min()) * (own[3].max() - own[2].min())


def count_levels(lookup, coords, cells, at_once, segments):
    """Count what lookup_grad_levels does, with so many segments of each level."""
    items, lists, vectors, tiles = 0, 0, 0, 0
    span = lookup_grads_plan._span(lookup)
    shape = lookup_grads_plan.CELLS
    tile = lookup_grads_plan._tile(coords.shape[1:])
    for (*window, size), count in zip(origins(lookup, coords, cells), segments, strict=True):
        groups = [-(-cells // group) for cells, group in zip(size, shape.group, strict=True)]
        listed, number = {}, -1  # items of each group, of one list after the other
        for y0 in range(0, coords.shape[1], tile[0]):
            for x0 in range(0, coords.shape[2], tile[1]):
                at, number = np.s_[y0 : y0 + tile[0], x0 : x0 + tile[1]], number + 1
                own = [first[at].ravel() for first in window]
                exists = np.all([(first < cells) & (first + extent > 0) for first, extent, cells
                                 in zip(own, span, size, strict=True)], axis=0)  # fmt: skip
                own = [first[exists] for first in own]
                if own[0].size == 0:
                    continue
                of_list = number % count, number // count // shape.threads
                hits = listed.setdefault(of_list, np.zeros(groups, int))
                reached = _reached(own, span, size, shape.group)
                for top, bottom, left, right in zip(*reached[0], *reached[1], strict=True):
                    hits[top : bottom + 1, left : right + 1] += 1
                rows, columns = (
                    last - first + 1 for first, last in _reached(own, span, size, shape.block)
                )
                vectors += int((rows * columns).sum())
                blocks = [
                    (min(first.max() + extent, cells) - 1) // block
                    - max(0, first.min()) // block
                    + 1
                    for first, extent, cells, block in zip(
                        own, span, size, shape.block, strict=True
                    )
                ]
                tiles += prod(blocks) * MOST_WARPS
        for hits in listed.values():
            items += int((-(-hits // at_once) * at_once).sum())
            lists += int((-(-hits // LANES)).sum())
    return Counts(items, lists, vectors, tiles)


def _reached(own, span, size, shape):
    """Return the first and the last rectangle of cells that windows reach, along each axis."""
    return [
        (np.maximum(first, 0) // cells, (np.minimum(first + extent, end) - 1) // cells)
        for first, extent, end, cells in zip(own, span, size, shape, strict=True)
    ]


def segments_of(plan):
    """Return how many segments each level has in a plan."""
    launch = next(one for one in plan.launches if one.kernel == "lookup_grad_levels")
    return [count for name, count in launch.sizes if name.startswith("segments")]


def microseconds(lookup, coords, dtype, gpu):
    """Return the predicted times of the gradients of both maps together, and of that of coords."""
    device, figures, itemsize = DEVICES[gpu], FIGURES[gpu], DTYPES[dtype].itemsize
    size = coords.shape[1:]
    cells = tuple(lookup.level_sizes(*size))
    problem = Problem(1, (1, 1), CHANNELS, size, cells, (True,) * (1 + lookup.levels))
    plan = lookup_grads_plan.plan_grads(lookup_grads_plan.RESULTS, problem, lookup, dtype, device)
    blocks = {launch.kernel: launch.blocks for launch in plan.launches}
    tensor = any(dict(launch.constants).get("tensor", False) for launch in plan.launches)
    at_once = STEP_ITEMS if tensor else AT_ONCE[itemsize]
    efficiency = EFFICIENCY + EFFICIENCY_PER_WARP * lookup_grads_plan.RESIDENT * MOST_WARPS / 4

    def computed(kernel, cycles):
        """Return the time of a kernel, by the cycles of all of a multiprocessor's units."""
        fullest = -(-blocks[kernel] // device.multiprocessors) / blocks[kernel]
        return max(cycles) * fullest / efficiency / (figures.gigahertz * 1e3)

    def units(multiply_adds, instructions, wavefronts):
        """Return the cycles of the FMA units, issue and shared memory; the counts are of warps."""
        return (
            multiply_adds * LANES / device.multiply_adds,
            (multiply_adds + instructions) * LANES / ISSUE,
            wavefronts * 128 / device.shared_rate,
        )

    def moved(count):
        return count / (DRAM_SHARE * figures.dram * 1e3)

    of_lane = CHANNELS // LANES
    lines = of_lane * itemsize * LANES / 128  # wavefronts of an item's channels
    words = {one.name: prod(one.shape) for one in plan.workspaces}
    upstream = lookup.levels * prod(lookup.patch_size) * prod(size) * itemsize
    total = moved(upstream + 4 * words["windows"]) + moved(4 * words.get("parts", 0))
    for kernel, counts in (
        ("lookup_grad_fmap1", count_fmap1(lookup, coords, cells, at_once)),
        ("lookup_grad_levels", count_levels(lookup, coords, cells, at_once, segments_of(plan))),
    ):
        level2 = counts.vectors * CHANNELS * itemsize / device.level2_rate
        if tensor:
            steps = counts.items // STEP_ITEMS
            overhead = counts.lists * TENSOR_LIST + counts.tiles * TILE
            products = PARTS[dtype] * counts.items * TARGETS * CHANNELS
            cycles = (
                *units(0, steps * STEP + overhead, counts.items * lines + steps * STEP_WAVEFRONTS),
                (steps * INTEGERS + overhead / 2) * LANES / INTEGER_RATE,
                products / matrix_rate(device),
            )
        else:
            instructions = counts.items * ITEM + counts.lists * LIST + counts.tiles * TILE
            cycles = units(
                counts.items * TARGETS * of_lane, instructions,
                counts.items * (lines + 2 * BROADCAST),
            )  # fmt: skip
        total += max(computed(kernel, (*cycles, level2)), moved(4 * words["windows"]))
    window = prod(lookup_grads_plan._span(lookup))
    of_coords = lookup.levels * prod(size) * window
    slopes = computed(
        "lookup_grad_coords",
        units(
            of_coords * of_lane, of_coords * (CELL - of_lane) + of_coords / LANES * CELLS,
            of_coords * (lines + 2 * BROADCAST + 1),
        ),
    )  # fmt: skip
    return total, slopes
