"""Floors of a problem, timed in turns with its implementations, and whether BLAS is what it can be.

No implementation multiplies faster than a matrix product, and none moves its arrays faster than a
copy. So a product of as many multiply-adds and a copy of as many bytes tell how much is left to
gain, and on a busy machine they are met by the same noise as all else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from math import ceil, prod
from typing import Any

import numpy as np

from cupycorr.cpu.threads import WORTH_THREADS, Team

from ..options import LookupProblem, Problem
from .measure import PASSES, Array, Job, by_clock
from .peers import ITEMSIZE

PROBE = 384
"""Size of a product that a core's caches hold."""
CRIPPLED = 3.0
"""FLOP of a product, in the time of an addition to a sum, below which BLAS lacks this core's SIMD.

A core adds to a sum in its first cache at most one SIMD register per cycle. It starts two fused
multiply-adds of such registers, which are four FLOP per lane, and a good BLAS reaches most of that.
"""


def work(problem: Problem | LookupProblem, dtype: str) -> dict[str, dict[str, int]]:
    """Return the multiply-adds and the bytes of each pass.

    Multiply-adds are those of positions inside the images, each pair once (for a lookup each cell
    that a position reads), and twice as many backward. Bytes are every input and output once.
    """
    maps, cost = prod(problem.shape), prod(problem.cost_shape)
    if isinstance(problem, LookupProblem):
        lookup = problem.lookup
        # Neighbours share corners unless the patch has gaps.
        cells = [2 * r + 2 if d == 1 else 2 * (2 * r + 1)
                 for r, d in zip(lookup.radius, lookup.dilation_patch, strict=True)]  # fmt: skip
        useful = maps * lookup.levels * prod(cells)
        area = sum(h * w for h, w in lookup.level_sizes(*problem.shape[2:]))
        others = maps // max(1, prod(problem.shape[2:])) * area
    else:
        useful, others = problem.layer.geometry.multiply_adds(problem.shape), maps
    size = ITEMSIZE[dtype]
    return {
        "multiply_adds": {"forward": useful, "backward": 2 * useful},
        "bytes": {
            "forward": (maps + others + cost) * size,
            "backward": (2 * maps + 2 * others + cost) * size,
        },
    }


def needed_bytes(problem: Problem | LookupProblem, dtype: str) -> int:
    """Return the memory of the floors' arrays."""
    amounts = work(problem, dtype)
    rows, depth = _product(amounts["multiply_adds"]["forward"])
    return amounts["bytes"]["backward"] + 8 * rows * (rows + 2 * depth)


def jobs(problem: Problem | LookupProblem, dtype: str, device: str) -> list[Job]:
    """Return a matrix product of the problem's multiply-adds and a copy of its bytes, to be timed.

    On a CUDA device the copy alone: a product would need cuBLAS. The product is float32 for the
    16-bit dtypes.
    """
    amounts = work(problem, dtype)
    library = "cupy" if device == "cuda" else "numpy"
    copies = _copies(amounts["bytes"], library)
    result = [Job("copy", library, lambda: None, copies)]
    if device == "cpu":
        kind = np.float64 if dtype == "float64" else np.float32
        rows, depth = _product(amounts["multiply_adds"]["forward"])
        one, two = np.ones((rows, depth), kind), np.ones((depth, rows), kind)
        product = np.empty((rows, rows), kind)

        def multiply(times: int) -> Callable[[dict[str, Any]], None]:
            def step(done: dict[str, Any]) -> None:
                for _ in range(times):
                    np.matmul(one, two, out=product)

            return step

        steps = {"forward": multiply(1), "backward": multiply(2)}
        result.insert(0, Job("matmul", library, lambda: None, steps))
    return result


def _product(multiply_adds: int) -> tuple[int, int]:
    """Return rows (and columns) and depth of a product of so many multiply-adds, nearly a cube."""
    rows = max(1, round(multiply_adds ** (1 / 3)))
    return rows, ceil(multiply_adds / rows**2)


def _copies(nbytes: dict[str, int], library: str) -> dict[str, Callable[[dict[str, Any]], None]]:
    """Return steps that read and write so many bytes together."""
    most = max(nbytes.values()) // 2
    if library == "cupy":
        import cupy

        # The runtime's own copies, as CuPy's functions compile kernels.
        source, target = cupy.empty(most, cupy.uint8), cupy.empty(most, cupy.uint8)
        source.data.memset_async(1, most)

        def copy(size: int) -> None:
            target.data.copy_from_device_async(source.data, size)

    else:
        source, target = np.ones(most, np.uint8), np.empty(most, np.uint8)

        def copy(size: int) -> None:
            if size < WORTH_THREADS:
                np.copyto(target[:size], source[:size])
                return
            with Team(size, None) as team:
                halves = (np.array_split(one[:size], team.size) for one in (target, source))
                team.work([partial(_copy, *part) for part in zip(*halves, strict=True)])

    def step(size: int) -> Callable[[dict[str, Any]], None]:
        return lambda done: copy(size)

    return {name: step(nbytes[name] // 2) for name in PASSES}


def _copy(target: Array, source: Array, scratch: object) -> None:
    np.copyto(target, source)


def core_rates(runs: int = 15) -> dict[str, float]:
    """Return what one core does per second: FLOP of a matrix product, additions to a sum."""
    import threadpoolctl

    one, product = np.ones((PROBE, PROBE), np.float32), np.empty((PROBE, PROBE), np.float32)
    # The same row again and again, so that the sum waits for no memory.
    rows = np.broadcast_to(np.ones(2048, np.float32), (1000, 2048))
    total = np.empty(2048, np.float32)

    def multiply() -> None:
        np.matmul(one, one, out=product)

    def add() -> None:
        np.add.reduce(rows, 0, out=total)

    with threadpoolctl.threadpool_limits(1):
        multiplying, adding = (
            min(by_clock(call)[0].seconds for _ in range(runs)) for call in (multiply, add)
        )
    return {"matmul_flops": 2 * PROBE**3 / multiplying, "sum_flops": rows.size / adding}


def warnings(machine: dict[str, Any], rates: dict[str, float]) -> list[str]:
    """Say what makes times of this machine say little: its load, or a BLAS that it cripples."""
    texts = []
    load, cores = machine["load"], machine["cores"]
    if load is not None and load > cores:
        texts.append(f"the load is {load:.1f} on {cores} cores: others' work is in the times")
    if kernels := os.environ.get("OPENBLAS_CORETYPE"):
        texts.append(f"OPENBLAS_CORETYPE={kernels} keeps OpenBLAS from choosing its kernels")
    ratio = rates["matmul_flops"] / rates["sum_flops"]
    if ratio < CRIPPLED:
        multiplying, adding = (rates[name] / 1e9 for name in ("matmul_flops", "sum_flops"))
        blas = ", ".join(machine["blas"]) or "unknown"
        texts.append(
            f"NumPy's BLAS ({blas}) is slow: {multiplying:.1f} GFLOP/s on one core, which should "
            f"do at least {CRIPPLED:.0f} times the {adding:.1f} G/s that it adds to a sum"
        )
    return texts
