"""The cost volume and its gradients on CUDA devices.

A plan (`cuda_plan`) lists launches; here their sources are compiled at run time by NVRTC through
`cupy.RawModule`, kept, and launched on the current stream of the arrays' device. Nothing here
waits for the device.

The engine trusts its arguments: contiguous CuPy arrays of one dtype on one device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import cupy
import numpy as np
import numpy.typing as npt

from cupycorr.cuda import plan as cuda_plan
from cupycorr.cuda.cost import Device
from cupycorr.cuda.plan import Launch, Plan, Shape
from cupycorr.cuda.sources import source
from cupycorr.geometry import Geometry

Allocate = Callable[[Shape, str], Any]

# C++17 is not CuPy's default. No fast-math: a sum must not depend on what is nearly equal.
OPTIONS = ("-std=c++17",)
_SUM = {"float32": np.float32, "float64": np.float64}
ALIGNMENT = 16  # bytes, of arrays that are read and written several elements at a time

_functions: dict[tuple[Any, ...], Any] = {}
_compiling = threading.Lock()


class Compiled(NamedTuple):
    """A kernel that was made ready."""

    kernel: str
    seconds: float
    """That compiling and loading it took; next to nothing if it was there."""
    registers: int
    """Of a thread."""
    local_bytes: int
    """Of a thread's local memory: registers that were spilled."""


def forward(
    fmap1: Any,
    fmap2: Any,
    cost: Any,
    geometry: Geometry,
    *,
    divisor: int = 1,
    plain: bool = False,
    similarity: str = "product",
    dtype: str | None = None,
    allocate: Allocate | None = None,
) -> None:
    """Compute the cost volume of two maps.

    Parameters
    ----------
    fmap1, fmap2 : cupy.ndarray (N, C, H, W), float16|bfloat16|float32|float64, contiguous
        The feature maps.
    cost : cupy.ndarray (N, PH, PW, OH, OW), of the maps' dtype, contiguous
        Where the result is written.
    geometry : Geometry
        What is compared.
    divisor : int, default 1
        Every sum is divided by it before it is rounded.
    plain : bool, default False
        Use only the kernels that compute one output per thread.
    similarity : {"product", "l1"}, default "product"
        What is summed: products, or absolute differences of maps that are 0 outside.
    dtype : {"float16", "bfloat16", "float32", "float64"}, optional
        What the arrays' bits mean, if they are of another dtype of that size.
    allocate : callable (shape, dtype name) -> cupy.ndarray, optional
        Where workspace comes from; by default CuPy's memory pool.

    Raises
    ------
    RuntimeError
        If a kernel cannot be compiled, or the device cannot launch it.
    """
    if 0 in fmap1.shape:
        cost.fill(0)
        return
    arrays = {"fmap1": fmap1, "fmap2": fmap2, "cost": cost}
    plan = partial(cuda_plan.forward, plain=plain, similarity=similarity)
    _compute(plan, arrays, geometry, divisor, dtype, allocate)


def backward(
    grad_cost: Any,
    fmap1: Any,
    fmap2: Any,
    grad_fmap1: Any | None,
    grad_fmap2: Any | None,
    geometry: Geometry,
    *,
    divisor: int = 1,
    plain: bool = False,
    similarity: str = "product",
    dtype: str | None = None,
    allocate: Allocate | None = None,
) -> None:
    """Compute the gradients with respect to the maps.

    Parameters
    ----------
    grad_cost : cupy.ndarray (N, PH, PW, OH, OW), of the maps' dtype, contiguous
        The gradient with respect to the cost volume.
    fmap1, fmap2 : cupy.ndarray (N, C, H, W), float16|bfloat16|float32|float64, contiguous
        The feature maps.
    grad_fmap1, grad_fmap2 : cupy.ndarray (N, C, H, W), of the maps' dtype, contiguous, or None
        Where the gradients are written; None where not needed.
    geometry, divisor, plain, similarity, dtype, allocate
        As for `forward`. Of absolute differences these are subgradients, with sign(0) = 0.

    Raises
    ------
    RuntimeError
        As `forward`.
    """
    if 0 in fmap1.shape:
        for grad in (grad_fmap1, grad_fmap2):
            if grad is not None:
                grad.fill(0)
        return
    arrays = {"grad_cost": grad_cost, "fmap1": fmap1, "fmap2": fmap2}
    outputs = {"grad_fmap1": grad_fmap1, "grad_fmap2": grad_fmap2}
    arrays.update({name: array for name, array in outputs.items() if array is not None})
    needs = (grad_fmap1 is not None, grad_fmap2 is not None)
    plan = partial(cuda_plan.backward, needs=needs, plain=plain, similarity=similarity)
    _compute(plan, arrays, geometry, divisor, dtype, allocate)


def tangent(
    fmap1: Any,
    fmap2: Any,
    tangent1: Any,
    tangent2: Any,
    cost: Any,
    geometry: Geometry,
    *,
    divisor: int = 1,
    dtype: str | None = None,
    allocate: Allocate | None = None,
) -> None:
    """Compute the derivative of sums of absolute differences along tangents of the maps.

    Parameters
    ----------
    fmap1, fmap2 : cupy.ndarray (N, C, H, W), float16|bfloat16|float32|float64, contiguous
        The feature maps.
    tangent1, tangent2 : cupy.ndarray (N, C, H, W), of the maps' dtype, contiguous
        The directions in which they change.
    cost : cupy.ndarray (N, PH, PW, OH, OW), of the maps' dtype, contiguous
        Where the derivative of the cost volume is written.
    geometry, divisor, dtype, allocate
        As for `forward`.

    Raises
    ------
    RuntimeError
        As `forward`.

    Notes
    -----
    The sum over c, i, j of sign(fmap1 - fmap2) * (tangent1 - tangent2), taken where `forward` takes
    |fmap1 - fmap2|, with sign(0) = 0.
    """
    if 0 in fmap1.shape:
        cost.fill(0)
        return
    arrays = {"fmap1": fmap1, "fmap2": fmap2, "tangent1": tangent1, "tangent2": tangent2}
    arrays["cost"] = cost
    _compute(cuda_plan.tangent, arrays, geometry, divisor, dtype, allocate)


def warm_up(
    geometry: Geometry, shape: Shape, dtype: str, *, similarity: str = "product"
) -> list[Compiled]:
    """Compile what forward and backward need on the current device.

    Parameters
    ----------
    geometry : Geometry
        The layer.
    shape : (N, C, H, W)
        Of its maps; other images of about this size (to three binary digits) share the kernels.
    dtype : {"float16", "bfloat16", "float32", "float64"}
        Of its maps.
    similarity : {"product", "l1"}, default "product"
        As for `forward`.

    Returns
    -------
    list of Compiled
        One for each kernel.

    Raises
    ------
    RuntimeError
        As `forward`.
    """
    device = device_of(cupy.cuda.Device().id)
    shape = (cuda_plan.samples_at_once(geometry, shape, dtype), *shape[1:])
    compiled = []
    for plan in (cuda_plan.forward, cuda_plan.backward):
        for launch in plan(geometry, shape, dtype, device, similarity=similarity).launches:
            start = time.perf_counter()
            function = _function(launch)
            seconds = time.perf_counter() - start
            compiled.append(
                Compiled(launch.kernel, seconds, function.num_regs, function.local_size_bytes)
            )
    return compiled


@cache
def device_of(number: int) -> Device:
    """Describe a CUDA device by its number."""
    attributes = cupy.cuda.Device(number).attributes
    return Device(
        capability=int(cupy.cuda.Device(number).compute_capability),
        multiprocessors=attributes["MultiProcessorCount"],
        shared_bytes=attributes["MaxSharedMemoryPerBlockOptin"],
        shared_bytes_of_multiprocessor=attributes["MaxSharedMemoryPerMultiprocessor"],
    )


def _compute(
    plan: Callable[..., Plan],
    arrays: dict[str, Any],
    geometry: Geometry,
    divisor: int,
    dtype: str | None,
    allocate: Allocate | None,
) -> None:
    """Plan and run; in parts of the batch where the workspace of all of it would be too large."""
    fmap = arrays["fmap1"]
    dtype = str(fmap.dtype) if dtype is None else dtype
    device = device_of(fmap.device.id)
    aligned = all(array.data.ptr % ALIGNMENT == 0 for array in arrays.values())
    at_once = cuda_plan.samples_at_once(geometry, fmap.shape, dtype)
    for start in range(0, len(fmap), at_once):
        part = {name: array[start : start + at_once] for name, array in arrays.items()}
        launches = plan(geometry, part["fmap1"].shape, dtype, device, aligned=aligned)
        _run(launches, part, dtype, divisor, allocate or cupy.empty)


def _run(plan: Plan, arrays: dict[str, Any], dtype: str, divisor: int, allocate: Allocate) -> None:
    """Launch on the current stream of the arrays' device."""
    accumulator = cuda_plan.accumulator(dtype)
    with arrays["fmap1"].device:
        if plan.volume is not None:
            arrays = {**arrays, "volume": allocate(plan.volume, accumulator)}
        for launch in plan.launches:
            scale = _SUM[accumulator](1 / divisor if launch.scaled else 1)
            operands = (arrays[name] for name in launch.arrays)
            _function(launch)(
                (launch.blocks,),
                (launch.threads,),
                (*operands, _struct(launch.sizes), scale),
                shared_mem=launch.shared_bytes,
            )


@lru_cache(maxsize=1024)
def _struct(fields: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return a struct of 32-bit integers, as CuPy passes it by value."""
    return np.array([fields], [(f"field{i}", np.int32) for i in range(len(fields))])


def _function(launch: Launch) -> Any:
    """Return a launch's kernel for the current device; compile it if it is not there."""
    key = (cupy.cuda.runtime.getDevice(), launch.source, launch.constants, launch.kernel)
    function = _functions.get(key)
    if function is None:
        with _compiling:
            function = _functions.get(key)
            if function is None:
                function = _functions[key] = _compile(launch)
    return function


def _compile(launch: Launch) -> Any:
    try:
        module = cupy.RawModule(code=source(launch), options=OPTIONS)
        function = module.get_function(launch.kernel)
        function.compile()
    except cupy.cuda.compiler.CompileException as error:
        unknown = "--gpu-architecture" in str(error)
        remedy = "update nvidia-cuda-nvrtc-cu12" if unknown else "please report it"
        raise RuntimeError(
            f"{launch.source} must compile for sm_{cupy.cuda.Device().compute_capability}, got "
            f"from NVRTC ({remedy}):\n{error}"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeError(
            f"NVRTC must be there to compile {launch.source}, got: {error}; "
            "pip install nvidia-cuda-nvrtc-cu12"
        ) from error
    if launch.shared_bytes > function.max_dynamic_shared_size_bytes:
        function.max_dynamic_shared_size_bytes = launch.shared_bytes
    return function
