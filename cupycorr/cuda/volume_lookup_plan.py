"""Plan the CUDA launches of the volume lookup: constants, grids, and how much a block stages.

Pure arithmetic, as `cuda.plan` is. A result is one launch, whatever the levels.
"""

from __future__ import annotations

from math import prod

from cupycorr.cuda.cost import Constants
from cupycorr.cuda.launch import Launch, Shape, types
from cupycorr.cuda.lookup_plan import MOST_BLOCKS, Problem, constants, sizes
from cupycorr.layer import DTYPES
from cupycorr.lookup import Lookup

GRADIENTS = ("grad_levels", "grad_coords")
WARP = 32
MOST_WARPS = 8
GRADIENT_THREADS = 256
GRADIENT_TILE = 16  # positions; 16 bits of so many fill a sector
MOST_SHARED = 32 << 10
"""Bytes of shared memory of a block: less than every device has, so that several blocks fit."""
MOST_CELLS = 1 << 25
"""Cells of a map and of the windows above and below it: those of a tile are counted by an int."""


def problem_of(coords: Shape, cells: tuple[tuple[int, int], ...]) -> Problem:
    """Describe a volume's levels of so many cells (h, w), for coords (N, 2, *P).

    It is the problem of a lookup with one channel, and a map for each sample.
    """
    return Problem(coords[0], (coords[0],) * 2, 1, coords[2:], cells, ())


def plan_cost(problem: Problem, lookup: Lookup, dtype: str) -> Launch:
    """Plan the cost of a volume lookup.

    Parameters
    ----------
    problem : Problem
        Shapes, as `problem_of` describes them; no size is 0.
    lookup : Lookup
        What is sampled.
    dtype : {"float16", "bfloat16", "float32", "float64"}
        The volume's dtype.

    Returns
    -------
    Launch
        Its arrays are "levels", a struct of the levels' addresses, "coords" and "cost".

    Raises
    ------
    RuntimeError
        If no device can launch the plan.
    """
    window_bytes = _window_bytes(dtype)
    wide = DTYPES[DTYPES[dtype].accumulator].itemsize
    most = (MOST_SHARED // WARP - window_bytes) // wide - 1  # the pitch may be one more
    (rows, columns), (down, across) = lookup.patch_size, lookup.dilation_patch
    # As many columns of a row of outputs as fit, then as many rows of that many columns.
    i = _band(columns, most // _reads(1, down), across)
    j = _band(rows, most // _reads(i, across), down)
    warps = -(-i // -(-i // MOST_WARPS))  # as many columns for each
    bands = -(-rows // j) * -(-columns // i)
    words = _pitch(_reads(j, down) * _reads(i, across))
    return _launch(
        "volume_lookup.cu",
        "volume_cost",
        (("tile", WARP), ("outputs_j", j), ("outputs_i", i)),
        -(-prod(problem.positions) // WARP) * bands * lookup.levels,
        WARP * warps,
        WARP * (words * wide + window_bytes),
        ("levels", "coords", "cost"),
        problem,
        lookup,
        dtype,
    )


def plan_grads(results: tuple[str, ...], problem: Problem, lookup: Lookup, dtype: str) -> Launch:
    """Plan the gradients of a volume lookup.

    Parameters
    ----------
    results : tuple of "grad_levels" and "grad_coords"
        Which are computed.
    problem, lookup, dtype
        As for `plan_cost`.

    Returns
    -------
    Launch
        Its arrays are "grad_cost", "levels", "coords", "grad_levels" and "grad_coords"; levels are
        structs of addresses. Those of "levels" are not read without "grad_coords".

    Raises
    ------
    RuntimeError
        If no device can launch the plan.
    """
    of_volume, of_coords = (name in results for name in GRADIENTS)
    wide = DTYPES[DTYPES[dtype].accumulator].itemsize
    reads = (
        _reads(outputs, spacing)
        for outputs, spacing in zip(lookup.patch_size, lookup.dilation_patch, strict=True)
    )
    cells = _pitch(prod(reads))  # the volume's, and their gradients
    staged = (_pitch(prod(lookup.patch_size)) + (of_coords + of_volume) * cells) * wide
    windows = lookup.levels * _window_bytes(dtype)
    slopes = of_coords * GRADIENT_THREADS * 2 * wide
    tile = GRADIENT_TILE
    while tile > 1 and tile * (windows + staged) + slopes > MOST_SHARED:
        tile //= 2
    is_staged = tile * (windows + staged) + slopes <= MOST_SHARED
    if not is_staged:
        tile, staged = GRADIENT_TILE, 0
    return _launch(
        "volume_lookup_grad.cu",
        "volume_gradients",
        (("tile", tile), ("staged", is_staged), ("of_volume", of_volume), ("of_coords", of_coords)),
        -(-prod(problem.positions) // tile),
        GRADIENT_THREADS,
        tile * (windows + staged) + slopes,
        ("grad_cost", "levels", "coords", *GRADIENTS),
        problem,
        lookup,
        dtype,
    )


def _launch(
    file: str,
    kernel: str,
    tile: Constants,
    blocks_of_sample: int,
    threads: int,
    shared_bytes: int,
    arrays: tuple[str, ...],
    problem: Problem,
    lookup: Lookup,
    dtype: str,
) -> Launch:
    blocks = problem.samples * blocks_of_sample
    for height, width in problem.cells:
        if (height + 2 * (lookup.reach[0] + 2)) * width > MOST_CELLS:
            raise RuntimeError(
                f"a level and its windows must have at most {MOST_CELLS} cells for a position, "
                f"got {(height, width)} and {lookup}"
            )
    if blocks > MOST_BLOCKS:
        raise RuntimeError(f"{kernel} must have at most {MOST_BLOCKS} blocks, got {blocks}")
    return Launch(
        file,
        kernel,
        (*types(dtype), *constants(lookup, problem), *tile, ("threads", threads)),
        blocks,
        threads,
        shared_bytes,
        arrays,
        sizes(problem, problem.channels),
        scaled=False,
    )


def _window_bytes(dtype: str) -> int:
    """Return the bytes of a ``Window``: two places of an int and a number."""
    return 4 * DTYPES[DTYPES[dtype].accumulator].itemsize


def _reads(outputs: int, spacing: int) -> int:
    """Return how many cells so many outputs read along an axis."""
    return outputs + 1 if spacing == 1 else 2 * outputs


def _pitch(words: int) -> int:
    return words | 1


def _band(outputs: int, cells: int, spacing: int) -> int:
    """Return how many outputs a block computes along an axis, if it has room for so many cells."""
    most = cells - 1 if spacing == 1 else cells // 2
    return -(-outputs // -(-outputs // most))
