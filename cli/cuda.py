"""CUDA for the commands: what the device can do, what runs on it, and how long that takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

from cupycorr import api, sampling, verify
from cupycorr.cuda.cost import LANES
from cupycorr.verify import plain_cost, plain_grads

from .bench.measure import Implementation, Timing, ours
from .environment import Unavailable, has
from .options import LookupProblem, Problem, described

LEAD_SECONDS = 1e-3
RESOLUTION = 5e-7  # of events, in seconds
HOLD = r"""
extern "C" __global__ void hold(long long cycles)
{
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}
"""


class Peaks(NamedTuple):
    """A device's peak rates per second; None where its properties do not tell."""

    float32: float | None
    """Multiply-adds."""
    float64: float | None
    memory: float | None
    """Bytes."""


def peaks(attributes: Mapping[str, int], capability: int) -> Peaks:
    """Compute peaks of a device from its attributes.

    Parameters
    ----------
    attributes : mapping
        As `cupy.cuda.Device.attributes` names them: clocks in kHz, the bus in bits.
    capability : int
        The compute capability, 90 for 9.0.

    Notes
    -----
    multiply-adds = multiprocessors * lanes * clock; bytes = 2 * memory clock * bus / 8, as memory
    transfers on both edges of its clock. The clocks are the highest that the device reports; under
    load it may run slower.
    """
    lanes, clock = LANES.get(capability), 1000 * attributes.get("ClockRate", 0)
    memory = 2 * 1000 * attributes.get("MemoryClockRate", 0)
    bytes_per_transfer = attributes.get("GlobalMemoryBusWidth", 0) / 8
    float32 = None
    if lanes is not None and clock:
        float32 = float(attributes["MultiProcessorCount"] * lanes * clock)
    ratio = attributes.get("SingleToDoublePrecisionPerfRatio", 0)
    return Peaks(
        float32,
        float32 / ratio if float32 is not None and ratio else None,
        memory * bytes_per_transfer or None,
    )


def device() -> dict[str, Any]:
    """Describe the current device and the libraries that drive it, for a report."""
    import cupy
    from cupy.cuda import nvrtc, runtime

    current = cupy.cuda.Device()
    attributes, capability = current.attributes, int(current.compute_capability)
    return {
        "name": runtime.getDeviceProperties(current.id)["name"].decode(),
        "capability": capability,
        "multiprocessors": attributes["MultiProcessorCount"],
        "clock_hz": 1000 * attributes.get("ClockRate", 0),
        "memory_clock_hz": 1000 * attributes.get("MemoryClockRate", 0),
        "memory_bus_bits": attributes.get("GlobalMemoryBusWidth", 0),
        "memory_bytes": current.mem_info[1],
        "l2_bytes": attributes["L2CacheSize"],
        "peaks": peaks(attributes, capability)._asdict(),
        "driver": _version(runtime.driverGetVersion()),
        "runtime": _version(runtime.runtimeGetVersion()),
        "nvrtc": "{}.{}".format(*nvrtc.getVersion()),
    }


def line(found: dict[str, Any]) -> str:
    """Return one line about what `device` found."""
    return (
        f"{found['name']}, sm_{found['capability']}, {found['multiprocessors']} multiprocessors; "
        f"driver for CUDA {found['driver']}, NVRTC {found['nvrtc']}"
    )


def implementation(engine: str) -> Implementation:
    """Return this package on CuPy arrays, all of it or its plain kernels, or on torch tensors."""
    if engine == "torch":
        return ours("torch")
    plain = engine == "plain"
    correlate, vjp = (plain_cost, plain_grads) if plain else (api.correlate, api.differentiate)
    return Implementation(f"cupycorr {engine}", "cupy", correlate, vjp)


def kernels(
    problem: Problem | LookupProblem, dtype: str, tf32: bool = False
) -> list[dict[str, Any]]:
    """Make the kernels of a problem ready, maybe those of TF32; return what each took and takes.

    The kernels of a lookup are made ready by calls on zeros; those that were ready are left out.

    Raises
    ------
    RuntimeError
        As `cuda.engine.warm_up`.
    """
    from cupycorr.cuda import engine as cuda_engine

    if 0 in problem.shape:
        return []  # nothing will be launched
    if isinstance(problem, LookupProblem):
        before = len(cuda_engine.made)
        _call_lookup(problem, dtype)
        return [one._asdict() for one in cuda_engine.made[before:]]
    compiled = cuda_engine.warm_up(
        problem.layer, problem.shape, dtype, channels_last=problem.channels_last, tf32=tf32
    )
    return [one._asdict() for one in compiled]


def _call_lookup(problem: LookupProblem, dtype: str) -> None:
    """Compute levels, costs and gradients of maps of zeros."""
    import cupy

    samples, channels, height, width = problem.shape
    if dtype == "bfloat16" and not has("ml_dtypes"):
        raise Unavailable("arrays of bfloat16 need ml_dtypes: pip install ml_dtypes")
    kind: Any = verify.to_dtype(np.zeros(0), dtype).dtype
    order = (samples, height, width, channels) if problem.channels_last else problem.shape
    fmap = cupy.zeros(order, kind)
    fmap = fmap.transpose(0, 3, 1, 2) if problem.channels_last else fmap
    wide = cupy.float64 if dtype == "float64" else cupy.float32
    coords = cupy.zeros((samples, 2, height, width), wide)
    grad = cupy.zeros(problem.cost_shape, kind)
    levels = sampling.pyramid(fmap, problem.lookup)
    sampling.correlation_lookup(fmap, levels, coords, problem.lookup)
    # The gradient of a map is that of its levels, and their sum.
    for fmap2 in (fmap, levels):
        sampling.correlation_lookup_vjp(
            grad, fmap, fmap2, coords, problem.lookup, needs=(True, True, True)
        )


def refuse_too_large(problems: list[Problem | LookupProblem], itemsize: int, cold: bool) -> None:
    """Refuse problems that do not fit into the device's memory together.

    Raises
    ------
    Unavailable
        If it does not.
    """
    import cupy

    maps = sum(prod(problem.shape) for problem in problems)
    cost = sum(prod(problem.cost_shape) for problem in problems)
    # At most at once: the maps that are timed, those that are compared, and results of these. The
    # workspace is bounded (`cuda_plan.WORKSPACE_BYTES`). A copy of all of them is timed too.
    needed = (10 * maps + 4 * cost) * itemsize + (_flushed_bytes() if cold else 0)
    available = cupy.cuda.Device().mem_info[0] + cupy.get_default_memory_pool().free_bytes()
    if needed > available:
        raise Unavailable(
            f"{described(*problems)} needs about {needed / 1e9:.1f} GB, "
            f"got {available / 1e9:.1f} GB of free memory on the device"
        )


class Stopwatch:
    """Times calls by events on the current stream.

    A call takes Python tens of microseconds before the device has all of its launches: where the
    kernels take less, the device would wait, and the time would be that of Python. So the device
    is held for a moment before the first event, and meanwhile all is launched; what the call took
    Python is reported beside it.

    Parameters
    ----------
    cold : bool
        Overwrite the L2 cache before each call.
    """

    def __init__(self, cold: bool) -> None:
        import cupy

        from cupycorr.cuda import engine as cuda_engine

        clock = 1000 * cupy.cuda.Device().attributes.get("ClockRate", 0)
        self._cycles = int(LEAD_SECONDS * (clock or 1e9))
        self._hold = cuda_engine.load(HOLD, "hold")
        self._flushed = cupy.cuda.alloc(_flushed_bytes()) if cold else None
        self._events = cupy.cuda.Event(), cupy.cuda.Event()

    def __call__(self, call: Callable[[], Any]) -> tuple[Timing, Any]:
        """Return how long a call takes the device and Python, and its result."""
        import cupy

        start, stop = self._events
        if self._flushed is not None:
            stream = cupy.cuda.get_current_stream()
            self._flushed.memset_async(0, self._flushed.mem.size, stream)
        self._hold((1,), (1,), (self._cycles,))
        start.record()
        begin = time.perf_counter()
        result = call()
        host = time.perf_counter() - begin
        stop.record()
        stop.synchronize()  # synchronises
        milliseconds = cupy.cuda.get_elapsed_time(start, stop)
        return Timing(max(RESOLUTION, milliseconds / 1e3), host), result


def _flushed_bytes() -> int:
    """Return the bytes to write that leave nothing of what the L2 cache held."""
    import cupy

    # A size that is not reported: more than any cache of today.
    return 2 * cupy.cuda.Device().attributes.get("L2CacheSize", 0) or 256 << 20


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
