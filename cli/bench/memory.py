"""The peak of the memory that a call holds."""

from __future__ import annotations

import contextlib
import json
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cupycorr.cpu.threads import release_scratch

from ..environment import torch_finds_cuda


def peak(call: Callable[[], Any], library: str, device: str = "cpu") -> tuple[int, Any]:
    """Return the most bytes that a call held at once beyond what was there, and its result.

    For NumPy that is the peak of its arrays (tracemalloc), for torch it and that of tensors on the
    CPU (its profiler), or on cuda that of tensors there; for CuPy what it takes from the device.
    Memory that cupycorr keeps from call to call counts as the call's.
    """
    if library == "cupy":
        return _cupy_peak(call)
    if device == "cuda":
        return _torch_cuda_peak(call)
    release_scratch()
    tracemalloc.start()
    try:
        with _torch_peak() if library == "torch" else contextlib.nullcontext([0]) as torch_peak:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            result = call()
            numpy_peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    return numpy_peak + torch_peak[0], result


def release() -> None:
    """Give the GPU back what CuPy and torch keep of it: neither can use what the other keeps."""
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    if torch_finds_cuda():
        import torch

        torch.cuda.empty_cache()


def _cupy_peak(call: Callable[[], Any]) -> tuple[int, Any]:
    """Run a call on a pool of its own, which asks the device only for what it cannot reuse."""
    import cupy

    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        result = call()
    return pool.total_bytes(), result


def _torch_cuda_peak(call: Callable[[], Any]) -> tuple[int, Any]:
    import torch

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    return torch.cuda.max_memory_allocated() - before, result


@contextlib.contextmanager
def _torch_peak() -> Iterator[list[int]]:
    """Fill a list of one with the peak of torch's allocations on the CPU, at the end."""
    from torch.profiler import ProfilerActivity, profile

    peak = [0]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [
        (event["ts"], event["args"]["Ev Idx"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    ]
    level = 0
    for _, _, change in sorted(changes):
        level += change
        peak[0] = max(peak[0], level)
