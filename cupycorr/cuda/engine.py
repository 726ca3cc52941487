"""The cost volume and its gradients on CUDA devices.

A plan (`cuda.plan`) lists launches. Here their sources are compiled at run time by NVRTC through
`cupy.RawModule`, kept, and launched on the current stream. Nothing here waits for the device. A
second call of the same layer on the same shapes finds its launches by one look-up (`_prepared`).

The engine trusts its arguments: contiguous arrays of one dtype, on the current device.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple, Protocol

import cupy
import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from cupycorr.cuda import plan as cuda_plan
from cupycorr.cuda.cost import Device
from cupycorr.cuda.launch import GRADIENTS as GRADIENTS
from cupycorr.cuda.launch import MAPS as MAPS
from cupycorr.cuda.launch import Launch, Shape
from cupycorr.cuda.sources import source
from cupycorr.layer import DTYPES, Layer

Allocate = Callable[[int], tuple[int, Any]]
Grid = tuple[int, int, int]

# C++17 is not CuPy's default. No fast-math: the bound of `verify` assumes IEEE arithmetic (CuPy's
# -ftz aside).
OPTIONS = ("-std=c++17",)
OLDEST_CUPY = 14  # older ones do not find the NVRTC that pip installs
IN_MEMORY = "CUPY_CACHE_IN_MEMORY"  # set, CuPy keeps no compiled kernels on disk
LOCKS = 64  # files in CuPy's cache; sources that share one are compiled one after the other
ALIGNMENT = 16  # bytes, of arrays that are read and written several elements at a time

RESULTS = {"cost": ("cost",), "tangent": ("cost",), "grads": ("grad_fmap1", "grad_fmap2")}
"""The arrays that are written."""

_functions: dict[tuple[Any, ...], Any] = {}
_compiling = threading.Lock()


class Unusable(RuntimeError):
    """CuPy or NVRTC cannot be used as they are; the message says why, and has a remedy."""


if int(cupy.__version__.partition(".")[0]) < OLDEST_CUPY:
    raise Unusable(
        f"cupycorr needs CuPy >= {OLDEST_CUPY}, this is {cupy.__version__}; "
        "pip install 'cupycorr[cuda12]' (cuda13 if the driver is for CUDA 13)"
    )


class Stream(Protocol):
    """A CUDA stream."""

    @property
    def ptr(self) -> int:
        """Its address."""


class Compiled(NamedTuple):
    """A kernel that was made ready."""

    kernel: str
    seconds: float
    """The time to compile and load it; next to nothing if it was there."""
    registers: int
    """Registers per thread."""
    local_bytes: int
    """Local memory per thread: registers that were spilled."""


made: list[Compiled] = []
"""The kernels that this process made ready, on all devices, in this order."""


def current_device() -> int:
    """Return the number of the current device."""
    number: int = cupy.cuda.runtime.getDevice()
    return number


def run(
    what: str,
    arrays: Mapping[str, Any],
    layer: Layer,
    *,
    plain: bool = False,
    channels_last: bool = False,
    tf32: bool = False,
) -> None:
    """Compute a layer's result into arrays of the current device, on its current stream.

    Parameters
    ----------
    what : {"cost", "grads", "tangent"}
        The cost volume; the gradients with respect to the maps, for an upstream gradient (for "l1"
        subgradients, with sign(0) = 0); or, for "l1", the change of the cost volume with changes
        of the maps: the sum of sign(fmap1 - fmap2) * (tangent1 - tangent2).
    arrays : mapping of name to cupy.ndarray, float16|bfloat16|float32|float64, contiguous
        Inputs "fmap1" and "fmap2" (N, C, H, W), for "grads" also "grad_cost" (N, PH, PW, OH, OW),
        for "tangent" also "tangent1" and "tangent2" (N, C, H, W). Results, which are written:
        "cost", or those of "grad_fmap1" and "grad_fmap2" that are there and not None. All have one
        dtype and lie on one device.
    layer : Layer
        What is computed.
    plain : bool, default False
        Use only the kernels that compute one output per thread.
    channels_last : bool, default False
        Whether the maps, tangents and gradients, of shape (N, C, H, W), lie in memory as
        (N, H, W, C).
    tf32 : bool, default False
        Whether the tensor cores may round float32 maps and upstream gradients to TF32.

    Raises
    ------
    RuntimeError
        If the device cannot launch a kernel; otherwise as `load`.
    """
    fmap1 = arrays["fmap1"]
    if 0 in fmap1.shape:
        for name in RESULTS[what]:
            if arrays.get(name) is not None:
                arrays[name].fill(0)
        return
    addresses = {name: array.data.ptr for name, array in arrays.items() if array is not None}
    dtype = _name(fmap1.dtype)
    launch(
        what, fmap1.shape, addresses, layer, dtype, from_pool,
        plain=plain, channels_last=channels_last, tf32=tf32,
    )  # fmt: skip


def launch(
    what: str,
    shape: Shape,
    addresses: dict[str, int],
    layer: Layer,
    dtype: str,
    allocate: Allocate,
    *,
    stream: Stream | None = None,
    plain: bool = False,
    channels_last: bool = False,
    tf32: bool = False,
) -> None:
    """Compute a layer's result on the current device, into memory given by addresses.

    Parameters
    ----------
    what, layer, plain, channels_last, tf32
        As for `run`.
    shape : (N, C, H, W)
        Shape of the maps; not empty.
    addresses : dict of name to int
        Where the arrays of `run` begin. It is changed.
    dtype : {"float16", "bfloat16", "float32", "float64"}
        The arrays' dtype.
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
    aligned = bits % ALIGNMENT == 0
    how = (what, (*addresses,), layer, dtype, current_device(), aligned, plain, channels_last, tf32)
    ready = _prepared(shape, *how)
    at_once = ready.samples
    for start in range(0, shape[0], at_once):
        if start > 0:
            for name, step in ready.steps:
                addresses[name] += at_once * step
            ready = _prepared((min(at_once, shape[0] - start), *shape[1:]), *how)
        elif at_once < shape[0]:
            ready = _prepared((at_once, *shape[1:]), *how)
        owners = []  # of workspaces, until all is launched
        for name, size in ready.workspaces:
            addresses[name], owner = allocate(size)
            owners.append(owner)
        for function, grid, block, names, constants, shared_bytes in ready.launches:
            operands = [addresses[name] for name in names]
            function(grid, block, (*operands, *constants), shared_bytes, stream)


_name = lru_cache(maxsize=16)(str)  # of a dtype


def from_pool(size: int) -> tuple[int, Any]:
    """Allocate bytes from CuPy's pool; returns their address and their owner."""
    memory = cupy.cuda.alloc(size)
    return memory.ptr, memory


class _Ready(NamedTuple):
    """A plan whose kernels are loaded."""

    samples: int
    """Samples at a time; the launches are for no more."""
    steps: tuple[tuple[str, int], ...]
    """Bytes of a sample of each array."""
    workspaces: tuple[tuple[str, int], ...]
    """Names and bytes of the arrays that launches hand to each other."""
    launches: tuple[tuple[Any, Grid, Grid, tuple[str, ...], tuple[Any, Any], int], ...]
    """Function, grid, block, names of arrays, sizes and scale, bytes of shared memory."""


@lru_cache(maxsize=1024)
def _prepared(
    shape: Shape,
    what: str,
    names: tuple[str, ...],
    layer: Layer,
    dtype: str,
    number: int,
    aligned: bool,
    plain: bool,
    channels_last: bool,
    tf32: bool,
) -> _Ready:
    """Plan a layer's results on the current device, and load the kernels."""
    samples = cuda_plan.samples_at_once(layer.geometry, shape, dtype)
    plan = cuda_plan.plan(
        tuple(name for name in RESULTS[what] if name in names),
        layer,
        (samples, *shape[1:]),
        dtype,
        device_of(number),
        tangent=what == "tangent",
        aligned=aligned,
        plain=plain or None,
        channels_last=channels_last,
        tf32=tf32,
    )
    scalar = np.dtype(DTYPES[dtype].accumulator).type
    launches = []
    for launch in plan.launches:
        fields, values = zip(*launch.sizes, strict=True)
        # CuPy passes a structured array of one element by value.
        sizes = np.array([values], [(name, np.int32) for name in fields])
        scale = scalar(1 / layer.divisor(shape[1]) if launch.scaled else 1)
        launches.append(
            (kernel_of(launch).kernel, (launch.blocks, 1, 1), (launch.threads, 1, 1),
             launch.arrays, (sizes, scale), launch.shared_bytes)
        )  # fmt: skip
    sample = {"cost": layer.geometry.cost_shape(shape)[1:]}
    sample["grad_cost"] = sample["cost"]
    itemsize = DTYPES[dtype].itemsize
    steps = tuple((name, prod(sample.get(name, shape[1:])) * itemsize) for name in names)
    workspaces = tuple(
        (one.name, prod(one.shape) * DTYPES[one.dtype].itemsize) for one in plan.workspaces
    )
    return _Ready(samples, steps, workspaces, tuple(launches))


def warm_up(
    layer: Layer, shape: Shape, dtype: str, *, channels_last: bool = False, tf32: bool = False
) -> list[Compiled]:
    """Compile what the cost volume and its gradients need on the current device.

    Parameters
    ----------
    layer : Layer
        What will be computed.
    shape : (N, C, H, W)
        Shape of the maps; other images of about this size (to four binary digits, on tensor
        cores to three) share the kernels.
    dtype : {"float16", "bfloat16", "float32", "float64"}
        Dtype of the maps.
    channels_last : bool, default False
        Whether the maps lie in memory as (N, H, W, C).
    tf32 : bool, default False
        Whether the tensor cores may round float32 maps to TF32.

    Returns
    -------
    list of Compiled
        One for each kernel.

    Raises
    ------
    RuntimeError
        As `run`.
    """
    device = device_of(cupy.cuda.Device().id)
    layer = layer.ascending
    shape = (cuda_plan.samples_at_once(layer.geometry, shape, dtype), *shape[1:])
    compiled = []
    for results in (RESULTS["cost"], RESULTS["grads"]):
        plan = cuda_plan.plan(
            results, layer, shape, dtype, device, channels_last=channels_last, tf32=tf32
        )
        for launch in plan.launches:
            start = time.perf_counter()
            function = kernel_of(launch)
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


def kernel_of(launch: Launch) -> Any:
    """Return a launch's kernel for the current device; compile it if it is not there."""
    key = (cupy.cuda.runtime.getDevice(), launch.source, launch.constants, launch.kernel)
    function = _functions.get(key)
    if function is None:
        with _compiling:
            function = _functions.get(key)
            if function is None:
                start = time.perf_counter()
                function = _functions[key] = _compile(launch)
                seconds = time.perf_counter() - start
                taken = function.num_regs, function.local_size_bytes
                made.append(Compiled(launch.kernel, seconds, *taken))
    return function


def _compile(launch: Launch) -> Any:
    function = load(source(launch), launch.kernel)
    if launch.shared_bytes > function.max_dynamic_shared_size_bytes:
        function.max_dynamic_shared_size_bytes = launch.shared_bytes
    return function


def load(code: str, kernel: str) -> Any:
    """Compile a source, and load one of its kernels on the current device.

    A cache folder that cannot be written costs a warning, and the next process time.

    Raises
    ------
    Unusable
        If NVRTC is missing or does not compile for the device.
    cupy.cuda.compiler.CompileException
        If NVRTC refuses the source.
    cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError, MemoryError
        If CUDA fails.
    """
    try:
        version = cupy.cuda.nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:  # CuPy's releases differ
        raise Unusable(
            f"NVRTC must be there to compile {kernel}, got: {error}; pip install {nvrtc_wheel()}"
        ) from error
    if version >= (13, 0):
        _refuse_older_than(min(cupy.cuda.nvrtc.getSupportedArchs()), kernel)
    try:
        with _alone(code):
            return _compiled(code, kernel)
    except OSError as error:
        warnings.warn(
            f"CuPy must be able to write {kernel} to its cache, got: {error}; it is compiled in "
            "each process anew; set CUPY_CACHE_DIR to a folder that can be written",
            stacklevel=2,
        )
    before = os.environ.get(IN_MEMORY)
    os.environ[IN_MEMORY] = "1"
    try:
        return _compiled(code, kernel)
    finally:
        del os.environ[IN_MEMORY]
        if before is not None:
            os.environ[IN_MEMORY] = before


def _compiled(code: str, kernel: str) -> Any:
    function = cupy.RawModule(code=code, options=OPTIONS).get_function(kernel)
    function.compile()
    return function


@contextmanager
def _alone(code: str) -> Iterator[None]:
    """Keep other processes from compiling a source, so that they find it in CuPy's cache later."""
    if fcntl is None:
        yield
        return
    with ExitStack() as stack:
        # Where there can be no lock there can be no cache: CuPy tells about that.
        with suppress(OSError):
            path = os.path.join(
                cache_folder(), f"cupycorr-{zlib.crc32(code.encode()) % LOCKS}.lock"
            )
            file = stack.enter_context(open(path, "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cache_folder() -> str:
    """Return the folder in which CuPy keeps compiled kernels."""
    return os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))


def nvrtc_wheel() -> str:
    """Return what pip calls the NVRTC of the CUDA that this CuPy was built for."""
    major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    return "nvidia-cuda-nvrtc-cu12" if major == 12 else f"'nvidia-cuda-nvrtc=={major}.*'"


def _refuse_older_than(oldest: int, kernel: str) -> None:
    """Refuse the current device if its compute capability is below that of the oldest."""
    capability = int(cupy.cuda.Device().compute_capability)
    if capability < oldest:
        major, minor = cupy.cuda.nvrtc.getVersion()
        raise Unusable(
            f"{kernel} must be compiled for a compute capability of at least {oldest / 10} by "
            f"NVRTC {major}.{minor}, got {capability / 10}; CUDA 12 compiles for this device: "
            "pip install 'cupycorr[cuda12]' in an environment without cupy-cuda13x and "
            "nvidia-cuda-nvrtc"
        )
