"""The flow-guided lookup, its gradients and its levels on CUDA devices.

As `cuda.engine`: nothing here waits for the device, and a second call for the same shapes finds its
launches by one look-up (`_prepared`). The engine trusts its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import cupy
import numpy as np

from cupycorr.cuda.engine import (
    ALIGNMENT,
    Allocate,
    Grid,
    Stream,
    current_device,
    device_of,
    from_pool,
    kernel_of,
)
from cupycorr.cuda.launch import Plan
from cupycorr.cuda.lookup_plan import Problem, plan_cost, plan_pyramid
from cupycorr.layer import DTYPES
from cupycorr.lookup import Lookup


def run(
    what: str,
    arrays: Mapping[str, Any],
    lookup: Lookup,
    scale: float = 1.0,
    *,
    plain: bool = False,
    dtype: str | None = None,
    allocate: Allocate = from_pool,
) -> None:
    """Compute a lookup's result into arrays of the current device, on its current stream.

    Parameters
    ----------
    what : {"cost", "grads", "pyramid", "pyramid_grads"}
        The cost, or the gradients with respect to the maps and coords; the levels of a map, or the
        map's gradient from theirs.
    arrays : mapping of name to cupy.ndarray or sequence of them
        Inputs "fmap1" (A, C, *P), "levels", a sequence of ``lookup.levels`` maps (F, C, h, w), all
        float16, bfloat16, float32 or float64; "coords" (E, 2, *P), float32 (float64 with float64
        maps); "index1" and "index2", int32 or int64 (E,), or None: then A = F = E. P has any
        axes. The result "cost" (E, L, PH, PW, *P) is contiguous; in the order "xy" it is
        (E, L, PW, PH, *P). The arrays of gradients: `cuda.lookup_grads`; of pyramids: "fmap2" and
        "levels", as for `pyramid`, or "grad_levels" and "grad_fmap2", as for
        `cuda.lookup_grads.pyramid_grads`.
    lookup : Lookup
        What is sampled.
    scale : float
        What the cost is multiplied by.
    plain : bool, default False
        Use only the kernel that computes one output per thread.
    dtype : str, optional
        The dtype of the maps, where arrays have its bits: torch hands bfloat16 over like that.
    allocate : callable (bytes) -> (address, owner), optional
        Where workspace comes from; by default CuPy's pool.

    Raises
    ------
    RuntimeError
        If the device cannot launch a kernel; otherwise as `cuda.engine.load`.

    Notes
    -----
    Maps whose channels lie side by side, (A, *P, C) in memory, are read where they are.
    """
    if what.endswith("grads"):
        from cupycorr.cuda import lookup_grads

        if what == "grads":
            lookup_grads.run_grads(arrays, lookup, scale, plain, dtype, allocate)
        else:
            both = arrays["grad_levels"], arrays["grad_fmap2"]
            lookup_grads.pyramid_grads(*both, lookup, dtype, allocate)
        return
    if what == "pyramid":
        pyramid(arrays["fmap2"], arrays["levels"], lookup, dtype, allocate)
        return
    cost, maps = arrays["cost"], [arrays["fmap1"], *arrays["levels"]]
    if cost.size == 0:
        return
    if any(one.size == 0 for one in maps):
        cost.fill(0)
        return
    problem, given = described(arrays)
    addresses = {name: array.data.ptr for name, array in given.items()} | {"cost": cost.data.ptr}
    dtype = str(cost.dtype) if dtype is None else dtype
    launch(what, problem, addresses, lookup, dtype, allocate, scale=scale, plain=plain)


def pyramid(
    fmap2: Any,
    levels: Sequence[Any],
    lookup: Lookup,
    dtype: str | None = None,
    allocate: Allocate = from_pool,
) -> None:
    """Compute the levels of a map on the current device, on its current stream.

    Parameters
    ----------
    fmap2 : cupy.ndarray (F, C, H, W), float16|bfloat16|float32|float64
        The map; it may have any strides.
    levels : sequence of cupy.ndarray (F, C, h, w)
        The results, of the sizes of `Lookup.level_sizes` and (F, h, w, C) in memory. The first is a
        copy of the map, or the map itself, which then lies in memory like that.
    lookup : Lookup
        How many levels there are, and what is averaged to a cell.
    dtype, allocate
        As for `run`.

    Raises
    ------
    RuntimeError
        As `run`.
    """
    if fmap2.size == 0:
        return
    fmap2, last = lying(fmap2)
    cells = tuple(level.shape[2:] for level in levels)
    problem = Problem(0, (len(fmap2),) * 2, fmap2.shape[1], fmap2.shape[2:], cells, (last,))
    addresses = {f"level{level}": array.data.ptr for level, array in enumerate(levels)}
    addresses["fmap2"] = fmap2.data.ptr
    dtype = str(fmap2.dtype) if dtype is None else dtype
    launch("pyramid", problem, addresses, lookup, dtype, allocate)


def launch(
    what: str,
    problem: Problem,
    addresses: dict[str, int],
    lookup: Lookup,
    dtype: str,
    allocate: Allocate,
    *,
    scale: float = 1.0,
    stream: Stream | None = None,
    plain: bool = False,
) -> None:
    """Compute a lookup's cost, or the levels of a map, into memory given by addresses.

    Parameters
    ----------
    what : {"cost", "pyramid"}
        What is computed.
    problem : Problem
        The arrays' shapes, and how they lie; no size is 0.
    addresses : dict of name to int
        Where arrays begin: of the cost "fmap1", "level0", "level1" ..., "coords", "cost", and
        "index1" and "index2" if there are any; of a pyramid "fmap2", "level0", "level1" ...
    dtype : {"float16", "bfloat16", "float32", "float64"}
        The maps' dtype.
    lookup, scale, plain
        As for `run`.
    allocate : callable (bytes) -> (address, owner)
        Where workspace comes from; the owner is kept until all is launched.
    stream : object with an attribute ptr, optional
        The CUDA stream; by default CuPy's current one.

    Raises
    ------
    RuntimeError
        As `run`.
    """
    bits = 0
    for address in addresses.values():
        bits |= address
    ready = _prepared(
        what, problem, lookup, dtype, scale, current_device(), bits % ALIGNMENT == 0,
        addresses.get("fmap2") != addresses["level0"], plain,
    )  # fmt: skip
    carry_out(ready, addresses, allocate, stream)


def described(arrays: Mapping[str, Any]) -> tuple[Problem, dict[str, Any]]:
    """Return the shapes of a lookup's inputs, and the inputs as kernels read them, by name.

    Maps that lie neither way are copied, and so are coords and indices that are not contiguous.
    """
    fmap1, last = lying(arrays["fmap1"])
    found, lies = {"fmap1": fmap1}, [last]
    for level, array in enumerate(arrays["levels"]):
        found[f"level{level}"], last = lying(array)
        lies.append(last)
    coords = found["coords"] = cupy.ascontiguousarray(arrays["coords"])
    kinds = {arrays[name].dtype for name in ("index1", "index2") if arrays.get(name) is not None}
    kind = "int64" if len(kinds) != 1 else str(next(iter(kinds)))
    for name in ("index1", "index2"):
        if arrays.get(name) is not None:
            found[name] = cupy.ascontiguousarray(arrays[name], kind)
    cells = tuple(level.shape[2:] for level in arrays["levels"])
    maps = len(fmap1), len(arrays["levels"][0])
    return Problem(
        len(coords), maps, fmap1.shape[1], fmap1.shape[2:], cells, tuple(lies), kind
    ), found


def lying(fmap: Any) -> tuple[Any, bool]:
    """Return a map (N, C, *P), and whether its channels lie side by side, or else its positions.

    A map with neither is copied.
    """
    if cupy.moveaxis(fmap, 1, -1).flags.c_contiguous:
        return fmap, True
    return cupy.ascontiguousarray(fmap), False


class Ready(NamedTuple):
    """A plan whose kernels are loaded."""

    workspaces: tuple[tuple[str, int], ...]
    """Names and bytes of the arrays that launches hand to each other."""
    structs: tuple[tuple[str, tuple[str, ...], np.dtype[Any]], ...]
    """The structs of addresses that kernels get by value: name, arrays, dtype."""
    launches: tuple[tuple[Any, Grid, Grid, tuple[str, ...], tuple[Any, Any], int], ...]
    """Function, grid, block, names of arrays, sizes and scale, bytes of shared memory."""


def ready_of(plan: Plan, dtype: str, scale: float) -> Ready:
    """Load the kernels of a plan for maps of some dtype."""
    scalar = np.dtype(DTYPES[dtype].accumulator).type
    loaded = []
    for one in plan.launches:
        fields, values = zip(*one.sizes, strict=True)
        # CuPy passes a structured array of one element by value.
        sizes = np.array([values], [(name, np.int32) for name in fields])
        loaded.append(
            (kernel_of(one).kernel, (one.blocks, 1, 1), (one.threads, 1, 1), one.arrays,
             (sizes, scalar(scale)), one.shared_bytes)
        )  # fmt: skip
    return Ready(
        tuple((one.name, prod(one.shape) * DTYPES[one.dtype].itemsize) for one in plan.workspaces),
        tuple(
            (name, arrays, np.dtype([(one, np.uint64) for one in arrays]))
            for name, arrays in plan.structs
        ),
        tuple(loaded),
    )


def carry_out(
    ready: Ready, addresses: dict[str, int], allocate: Allocate, stream: Stream | None
) -> None:
    """Launch what is ready on arrays of some addresses; 0 is that of an array that is not there."""
    owners = []  # of workspaces, until all is launched
    operands: dict[str, Any] = dict(addresses)
    for name, size in ready.workspaces:
        operands[name], owner = allocate(size)
        owners.append(owner)
    for name, arrays, struct in ready.structs:
        operands[name] = np.array([tuple(operands.get(one, 0) for one in arrays)], struct)
    for function, grid, block, names, constants, shared_bytes in ready.launches:
        values = [operands.get(name, 0) for name in names]
        function(grid, block, (*values, *constants), shared_bytes, stream)


@lru_cache(maxsize=1024)
def _prepared(
    what: str,
    problem: Problem,
    lookup: Lookup,
    dtype: str,
    scale: float,
    number: int,
    aligned: bool,
    copied: bool,
    plain: bool,
) -> Ready:
    """Plan a lookup's results on the current device, and load the kernels."""
    if what == "pyramid":
        plan = plan_pyramid(problem, lookup, dtype, copied=copied)
    else:
        plan = plan_cost(problem, lookup, dtype, device_of(number), aligned=aligned, plain=plain)
    return ready_of(plan, dtype, scale)
