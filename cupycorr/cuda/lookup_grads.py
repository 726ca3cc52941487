"""The gradients of a flow-guided lookup, and of the pooling of its levels, on CUDA devices.

As `cuda.lookup`: nothing here waits for the device, a second call for the same shapes finds its
launches by one look-up (`_prepared`), and the engine trusts its arguments. Every sum has one owner
and one order: a repeated call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import cupy

from cupycorr.cuda.engine import (
    ALIGNMENT,
    Allocate,
    Stream,
    current_device,
    device_of,
    from_pool,
)
from cupycorr.cuda.lookup import Ready, carry_out, described, ready_of
from cupycorr.cuda.lookup_grads_plan import (
    RESULTS,
    plan_grads,
    plan_pyramid_grads,
    samples_at_once,
)
from cupycorr.cuda.lookup_plan import Problem
from cupycorr.layer import DTYPES
from cupycorr.lookup import Lookup


def run_grads(
    arrays: Mapping[str, Any],
    lookup: Lookup,
    scale: float,
    plain: bool = False,
    dtype: str | None = None,
    allocate: Allocate = from_pool,
) -> None:
    """Compute a lookup's gradients into arrays of the current device, on its current stream.

    Parameters
    ----------
    arrays : mapping of name to cupy.ndarray or sequence of them
        Inputs "fmap1", "levels", "coords", "index1" and "index2", as for `cuda.lookup.run`, and
        "grad_cost", of the cost's shape and the maps' dtype. Results, those that are there and not
        None: "grad_fmap1" (A, C, *P), "grad_levels", a sequence of (F, C, h, w) that lie in memory
        as (F, h, w, C), both of the maps' dtype, and "grad_coords" (E, 2, *P), contiguous, of the
        dtype of coords.
    lookup : Lookup
        What is sampled.
    scale : float
        What the cost was multiplied by.
    plain : bool, default False
        Use only the kernels that compute one element per thread, or a position per warp.
    dtype, allocate
        As for `cuda.lookup.run`.

    Raises
    ------
    RuntimeError
        As `cuda.lookup.run`.

    Notes
    -----
    Where the maps' gradients are computed from stored windows, these take 4 bytes for each of the
    (2 * reach + 2)^2 cells of a window, position and level: 256 MiB at most, by some samples or
    some levels at a time, unless one level of one sample, or of all with indices, needs more.
    """
    results = tuple(name for name in RESULTS if arrays.get(name) is not None)
    written = [one for name in results for one in _listed(arrays[name])]
    if any(one.size == 0 for one in (arrays["grad_cost"], arrays["fmap1"], *arrays["levels"])):
        for one in written:
            one.fill(0)
        return
    if not any(one.size for one in written):
        return
    problem, given = described(arrays)
    given["grad_cost"] = cupy.ascontiguousarray(arrays["grad_cost"])
    last = True
    if "grad_fmap1" in results:
        given["grad_fmap1"], last = _written(arrays["grad_fmap1"])
    if "grad_levels" in results:
        given |= {f"grad_level{n}": one for n, one in enumerate(arrays["grad_levels"])}
    if "grad_coords" in results:
        given["grad_coords"] = arrays["grad_coords"]
    launch_grads(
        results, problem, {name: array.data.ptr for name, array in given.items()}, lookup,
        str(arrays["fmap1"].dtype) if dtype is None else dtype, allocate,
        scale=scale, last=last, plain=plain,
    )  # fmt: skip
    if "grad_fmap1" in results and given["grad_fmap1"] is not arrays["grad_fmap1"]:
        arrays["grad_fmap1"][...] = given["grad_fmap1"]


def launch_grads(
    results: tuple[str, ...],
    problem: Problem,
    addresses: dict[str, int],
    lookup: Lookup,
    dtype: str,
    allocate: Allocate,
    *,
    scale: float,
    last: bool = True,
    stream: Stream | None = None,
    plain: bool = False,
) -> None:
    """Compute a lookup's gradients into memory given by addresses.

    Parameters
    ----------
    results : tuple of "grad_fmap1", "grad_levels" and "grad_coords"
        What is computed.
    problem : Problem
        The arrays' shapes, and how they lie; no size is 0.
    addresses : dict of name to int
        Where arrays begin: "grad_cost", "fmap1", "level0", "level1" ..., "coords", "index1" and
        "index2" if there are any, and of the results "grad_fmap1", "grad_level0", "grad_level1"
        ..., "grad_coords". It is changed.
    dtype : {"float16", "bfloat16", "float32", "float64"}
        The maps' dtype.
    last : bool, default True
        Whether the channels of "grad_fmap1" lie side by side, or else its positions.
    lookup, scale, plain
        As for `run_grads`.
    allocate, stream
        As for `cuda.lookup.launch`.

    Raises
    ------
    RuntimeError
        As `run_grads`.
    """
    indexed = "index1" in addresses, "index2" in addresses
    at_once = samples_at_once(problem, lookup, any(indexed))
    steps = _steps(problem, lookup, dtype, results)
    bits = 0
    for address in addresses.values():
        bits |= address
    for step in steps.values() if at_once < problem.samples else ():
        bits |= step
    for start in range(0, problem.samples, at_once):
        count = min(at_once, problem.samples - start)
        part = problem
        if count < problem.samples:
            part = problem._replace(samples=count, maps=(count, count))
        ready = _prepared(
            results, part, lookup, dtype, scale, current_device(), indexed, last,
            bits % ALIGNMENT == 0, plain,
        )  # fmt: skip
        carry_out(ready, addresses, allocate, stream)
        for name, step in steps.items():
            addresses[name] += count * step


def pyramid_grads(
    grad_levels: Sequence[Any],
    grad_fmap2: Any,
    lookup: Lookup,
    dtype: str | None = None,
    allocate: Allocate = from_pool,
) -> None:
    """Compute the gradient of a map from those of its levels: the adjoint of `cuda.lookup.pyramid`.

    Parameters
    ----------
    grad_levels : sequence of cupy.ndarray (F, C, h, w), float16|bfloat16|float32|float64
        The gradients, which lie in memory as (F, h, w, C); their sizes are those of
        `Lookup.level_sizes`.
    grad_fmap2 : cupy.ndarray (F, C, H, W), contiguous, of the same dtype
        The result.
    lookup : Lookup
        How many levels there are, and what was averaged to a cell.
    dtype, allocate
        As for `cuda.lookup.run`.

    Raises
    ------
    RuntimeError
        As `run_grads`.
    """
    if grad_fmap2.size == 0:
        return
    dtype = str(grad_fmap2.dtype) if dtype is None else dtype
    cells = tuple(one.shape[2:] for one in grad_levels)
    maps, channels, *size = grad_fmap2.shape
    problem = Problem(0, (maps, maps), channels, tuple(size), cells, ())
    addresses = {f"grad_level{n}": one.data.ptr for n, one in enumerate(grad_levels)}
    addresses["grad_fmap2"] = grad_fmap2.data.ptr
    ready = _prepared((), problem, lookup, dtype, 1.0, current_device())
    carry_out(ready, addresses, allocate, None)


@lru_cache(maxsize=1024)
def _prepared(
    results: tuple[str, ...],
    problem: Problem,
    lookup: Lookup,
    dtype: str,
    scale: float,
    number: int,
    indexed: tuple[bool, bool] = (False, False),
    last: bool = True,
    aligned: bool = True,
    plain: bool = False,
) -> Ready:
    """Plan gradients on the current device, without results that of a pyramid; load kernels."""
    device = device_of(number)
    if results:
        plan = plan_grads(
            results, problem, lookup, dtype, device,
            indexed=indexed, last=last, aligned=aligned, plain=plain,
        )  # fmt: skip
    else:
        plan = plan_pyramid_grads(problem, lookup, dtype, device)
    return ready_of(plan, dtype, scale)


@lru_cache(maxsize=1024)
def _steps(
    problem: Problem, lookup: Lookup, dtype: str, results: tuple[str, ...]
) -> dict[str, int]:
    """Return the bytes of a sample of each array."""
    itemsize = DTYPES[dtype].itemsize
    positions = prod(problem.positions)
    map_bytes = problem.channels * positions * itemsize
    coords_bytes = 2 * positions * DTYPES[DTYPES[dtype].accumulator].itemsize
    steps = {
        "grad_cost": lookup.levels * prod(lookup.patch_size) * positions * itemsize,
        "fmap1": map_bytes,
        "coords": coords_bytes,
    }
    for number, size in enumerate(problem.cells):
        steps[f"level{number}"] = problem.channels * prod(size) * itemsize
        if "grad_levels" in results:
            steps[f"grad_level{number}"] = steps[f"level{number}"]
    if "grad_fmap1" in results:
        steps["grad_fmap1"] = map_bytes
    if "grad_coords" in results:
        steps["grad_coords"] = coords_bytes
    return steps


def _written(grad: Any) -> tuple[Any, bool]:
    """Return an array to write a gradient to, and whether its channels lie side by side."""
    if cupy.moveaxis(grad, 1, -1).flags.c_contiguous:
        return grad, True
    return grad if grad.flags.c_contiguous else cupy.empty(grad.shape, grad.dtype), False


def _listed(result: Any) -> list[Any]:
    """Return the arrays of a result: one, or those of a sequence."""
    return list(result) if isinstance(result, (list, tuple)) else [result]
