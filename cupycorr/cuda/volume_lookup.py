"""The volume lookup and its gradients on CUDA devices.

As `cuda.lookup`: nothing here waits for the device, a second call for the same shapes finds its
launch by one look-up (`_prepared`), and the engine trusts its arguments. Every sum has one owner
and one order: a repeated call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import cupy

from cupycorr.cuda.engine import Allocate, Stream, current_device, from_pool
from cupycorr.cuda.launch import Plan, Shape
from cupycorr.cuda.lookup import Ready, carry_out, ready_of
from cupycorr.cuda.volume_lookup_plan import GRADIENTS, plan_cost, plan_grads, problem_of
from cupycorr.lookup import Lookup


def run(
    what: str,
    arrays: Mapping[str, Any],
    lookup: Lookup,
    *,
    dtype: str | None = None,
    allocate: Allocate = from_pool,
    stream: Stream | None = None,
) -> None:
    """Compute a volume lookup's result into arrays of the current device.

    Parameters
    ----------
    what : {"cost", "grads"}
        The cost, or the gradients with respect to the volume and coords.
    arrays : mapping of name to cupy.ndarray or sequence of them
        Inputs "levels", a sequence of ``lookup.levels`` arrays (N, *P, h, w), contiguous, all
        float16, bfloat16, float32 or float64, and "coords" (N, 2, *P), float32 (float64 with
        a float64 volume). P has one to four axes, and no level is without cells. The result "cost"
        (N, L, PH, PW, *P), or (N, L, PW, PH, *P) in the order "xy", has the volume's dtype. For
        gradients also the input "grad_cost", of the cost's shape and dtype, and the results that
        are there and not None: "grad_levels", a sequence of arrays as the levels, and
        "grad_coords", as coords. Results are contiguous, and written everywhere.
    lookup : Lookup
        What is sampled.
    dtype : {"float16", "bfloat16", "float32", "float64"}, optional
        The volume's dtype, where arrays hold its bits; by default that of the levels.
    allocate : callable (bytes) -> (address, owner), optional
        Where copies of inputs that are not contiguous lie; by default in CuPy's pool.
    stream : object with an attribute ptr, optional
        The CUDA stream; by default CuPy's current one.

    Raises
    ------
    RuntimeError
        If no device can launch the kernel; otherwise as `cuda.engine.load`.
    """
    levels, coords = arrays["levels"], arrays["coords"]
    if coords.size == 0:
        return
    names = ("cost",) if what == "cost" else GRADIENTS
    results = {name: arrays[name] for name in names if arrays.get(name) is not None}
    if not results:
        return
    inputs = ("coords",) if what == "cost" else ("coords", "grad_cost")
    given = {name: _contiguous(arrays[name], allocate, stream) for name in inputs}
    ready = _prepared(
        tuple(results),
        coords.shape,
        tuple(level.shape[-2:] for level in levels),
        lookup,
        str(levels[0].dtype) if dtype is None else dtype,
        current_device(),
    )
    addresses: dict[str, int] = {}
    for name, value in {**given, **results, "levels": levels}.items():
        if name in ("levels", "grad_levels"):
            addresses |= {f"{name[:-1]}{n}": one.data.ptr for n, one in enumerate(value)}
        else:
            addresses[name] = value.data.ptr
    carry_out(ready, addresses, allocate, stream)


@lru_cache(maxsize=1024)
def _prepared(
    results: tuple[str, ...],
    coords: Shape,
    cells: tuple[tuple[int, int], ...],
    lookup: Lookup,
    dtype: str,
    number: int,
) -> Ready:
    """Plan results on the current device, of this number, and load their kernel."""
    problem = problem_of(coords, cells)
    if results == ("cost",):
        launch = plan_cost(problem, lookup, dtype)
    else:
        launch = plan_grads(results, problem, lookup, dtype)
    structs = tuple(
        (name, tuple(f"{name[:-1]}{level}" for level in range(lookup.levels)))
        for name in ("levels", "grad_levels")
        if name in launch.arrays
    )
    return ready_of(Plan((launch,), (), structs), dtype, 1.0)


def _contiguous(array: Any, allocate: Allocate, stream: Stream | None) -> Any:
    """Return an array whose elements lie in their order, or a copy of its bits that does."""
    if array.flags.c_contiguous:
        return array
    address, owner = allocate(array.nbytes)
    memory = cupy.cuda.UnownedMemory(address, array.nbytes, owner)
    bits = f"int{8 * array.itemsize}"
    copy = cupy.ndarray(array.shape, bits, cupy.cuda.MemoryPointer(memory, 0))
    _copy(array.view(bits), copy, stream=stream)
    return copy


# CuPy's own copies go to its current stream only.
_copy = cupy.ElementwiseKernel("T given", "T copy", "copy = given", "cupycorr_copy")
