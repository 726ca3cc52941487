"""Print the host time of repeated calls on a CUDA device: all of it but the launches themselves.

    python tests/support/host_time.py

It needs CuPy and a device for it. Where torch has no CUDA, tensors of the CPU pass for ones of the
device: launches do nothing here, so nobody touches their memory.
"""

import sys
import time
import types

import cupy
import torch

import cupycorr
from cupycorr import Geometry
from cupycorr.cuda import engine
from cupycorr.torch import memory

SHAPE, GEOMETRY = (1, 8, 4, 4), Geometry(patch_size=9)


def microseconds(call, seconds):
    """Return the least and the median time of a call."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6, sorted(times)[len(times) // 2] * 1e6


def device():
    """Return the device of torch's tensors; have some of the CPU pass for CUDA's if need be."""
    if torch.cuda.is_available():
        return "cuda"
    torch.Tensor.is_cuda = True
    torch.Tensor.get_device = lambda tensor: 0
    torch.cuda.current_device = lambda: 0
    memory.current_stream = lambda number: 0
    memory._exchanged |= {(0, dtype) for dtype in memory._DTYPES}
    return "cpu"


def main(seconds=1.0):
    """Print a line for each kind of call."""
    idle = types.SimpleNamespace(kernel=lambda grid, block, operands, shared_bytes, stream: None)
    engine.kernel_of = lambda launch: idle
    one, two = (torch.randn(SHAPE, device=device()) for _ in range(2))
    there, elsewhere = (one.detach().clone().requires_grad_() for _ in range(2))
    cost = cupycorr.correlation(there, elsewhere, GEOMETRY)
    upstream = torch.ones_like(cost)
    arrays = [cupy.zeros(SHAPE, cupy.float32) for _ in range(2)]

    def gradients():
        torch.autograd.grad(cost, (there, elsewhere), upstream, retain_graph=True)

    calls = {
        "torch, forward": lambda: cupycorr.correlation(one, two, GEOMETRY),
        "torch, forward with grad": lambda: cupycorr.correlation(there, elsewhere, GEOMETRY),
        "torch, both gradients": gradients,
        "cupy, forward": lambda: cupycorr.correlation(*arrays, GEOMETRY),
    }
    print(f"{'µs':<26}  least  median")
    for name, call in calls.items():
        call()
        least, median = microseconds(call, seconds)
        print(f"{name:<26}  {least:>5.1f}  {median:>6.1f}")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
