"""Time and memory of implementations, measured side by side on the same maps."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from math import prod, sqrt
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupycorr import verify
from cupycorr.api import correlate, differentiate
from cupycorr.layer import Layer

from ..options import Problem
from .memory import peak

Array = npt.NDArray[Any]
PASSES = ("forward", "backward")
ALL_PASSES = ("prepare", *PASSES, "prepare backward")
"""Those of lookups: what all lookups of a pair of maps share is prepared apart."""
LEAST_RUNS = 3
STEADY_RUNS = 20
"""Runs before which no median counts as steady."""
STEADY = 0.01
"""Part of the median by which it may have moved in the later half of the runs."""
SETTLE_SECONDS = 0.025
"""How long an implementation runs before it is timed, unless that is little beside a run."""


class Implementation(NamedTuple):
    """An implementation to be measured.

    correlate : (fmap1, fmap2, layer) -> cost, on arrays of the library
    vjp : (grad_cost, fmap1, fmap2, layer) -> (grad_fmap1, grad_fmap2), or None for autograd's
    """

    name: str
    library: str
    correlate: Callable[[Any, Any, Layer], Any]
    vjp: Callable[[Any, Any, Any, Layer], tuple[Any, Any]] | None = None


class Timing(NamedTuple):
    """The seconds of one run, and on a CUDA device those that launching it took Python."""

    seconds: float
    host_seconds: float | None = None


Stopwatch = Callable[[Callable[[], Any]], tuple[Timing, Any]]


class Measured(NamedTuple):
    """One pass: the time of each run and of the first call, and its memory."""

    timings: list[Timing]
    extra_bytes: int
    """The peak beyond inputs and outputs."""
    output_bytes: int = 0
    first_seconds: float = 0.0
    """The first call, before anything was compared: it plans, allocates and may compile."""

    @property
    def seconds(self) -> list[float]:
        """The seconds of each run."""
        return [timing.seconds for timing in self.timings]

    @property
    def host_seconds(self) -> list[float]:
        """The seconds until each run was launched; none on the CPU."""
        return [t.host_seconds for t in self.timings if t.host_seconds is not None]


class Outcome(NamedTuple):
    """The result of one implementation: its passes if it was timed, else the reason."""

    name: str
    status: str
    reason: str = ""
    passes: dict[str, Measured] | None = None


class Job(NamedTuple):
    """An implementation with its arrays."""

    name: str
    library: str
    mistake: Callable[[], str | None]
    """Describes the first result that is wrong, or returns None."""
    steps: dict[str, Callable[[dict[str, Any]], Any]]
    """What is timed, by the names of passes: each gets the results of those before it."""


class _Maps(NamedTuple):
    fmap1: Any
    fmap2: Any
    grad_cost: Any


def ours(library: str) -> Implementation:
    """Return this package on NumPy arrays or on torch tensors."""
    vjp = differentiate if library == "numpy" else None
    return Implementation(f"cupycorr {library}", library, correlate, vjp)


@contextlib.contextmanager
def threads(count: int, torch_too: bool) -> Iterator[None]:
    """Hold BLAS, OpenMP and torch to so many threads."""
    import threadpoolctl

    if torch_too:
        # Its profiler, which `extra memory` is read from, reports each start and stop otherwise.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(count)
    try:
        with threadpoolctl.threadpool_limits(count):
            yield
    finally:
        if torch_too:
            torch.set_num_threads(before)


def random_maps(shape: tuple[int, ...], dtype: str) -> tuple[Array, Array]:
    """Return normally distributed maps, float32 unless the dtype is float64."""
    kind = np.float64 if dtype == "float64" else np.float32
    generator = np.random.default_rng(0)
    return generator.standard_normal(shape, kind), generator.standard_normal(shape, kind)


def jobs(
    implementations: list[Implementation],
    problem: Problem,
    maps: tuple[Array, Array],
    dtype: str,
    device: str = "cpu",
) -> list[Job]:
    """Give implementations of a cost volume their arrays.

    Parameters
    ----------
    implementations : list of Implementation
        What is measured, forward and backward.
    problem : Problem
        Shape and layer.
    maps : (array (N, C, H, W), array (N, C, H, W))
        The maps that are timed; values of this dtype's kind.
    dtype : {"float16", "bfloat16", "float32", "float64"}
        What is computed in.
    device : {"cpu", "cuda"}, default "cpu"
        Where torch's tensors lie.
    """
    generator = np.random.default_rng(1)
    grad = generator.standard_normal(problem.cost_shape, np.float32)
    # Made when it is first needed, after all first calls: what it plans must not shorten them.
    reference = cache(partial(_reference, problem, dtype))
    arrays = {
        library: library_maps((*maps, grad), library, dtype, device, problem.channels_last)
        for library in dict.fromkeys(one.library for one in implementations)
    }
    return [
        Job(
            one.name,
            one.library,
            partial(_mistake, one, problem, dtype, reference, device),
            _steps(one, arrays[one.library], problem.layer),
        )
        for one in implementations
    ]


def _steps(
    one: Implementation, maps: _Maps, layer: Layer
) -> dict[str, Callable[[dict[str, Any]], Any]]:
    return {
        "forward": lambda done: one.correlate(maps.fmap1, maps.fmap2, layer),
        "backward": lambda done: _gradients(one, maps, layer, done["forward"]),
    }


def compare(
    jobs: list[Job],
    *,
    runs: int,
    max_seconds: float,
    advance: Callable[[str], None],
    until_steady: bool = False,
    stopwatch: Stopwatch | None = None,
    device: str = "cpu",
) -> list[Outcome]:
    """Check implementations against this package, then time them in turns.

    Parameters
    ----------
    jobs : list of Job
        What is measured.
    runs : int
        Rounds at most; in each, all passes of every job run once.
    max_seconds : float
        A job that has used so much time stops after at least three rounds.
    advance : (name) -> None
        Called after each step of a name.
    until_steady : bool, default False
        Stop a job when the medians of all its passes are steady (see `is_steady`).
    stopwatch : call -> (Timing, result), optional
        What measures the time of a call; by default `by_clock`.
    device : {"cpu", "cuda"}, default "cpu"
        Where torch's tensors lie.

    Returns
    -------
    list of Outcome
        One for each job.
    """
    stopwatch = by_clock if stopwatch is None else stopwatch
    outcomes: dict[int, Outcome] = {}
    first: dict[int, dict[str, Timing]] = {}
    memory: dict[int, dict[str, tuple[int, int]]] = {}
    for number, one in enumerate(jobs):
        with _failures(outcomes, number, one.name):
            first[number] = _round(one, stopwatch)
    for number in first:
        one = jobs[number]
        with _failures(outcomes, number, one.name):
            error = one.mistake()
            if error is None:
                memory[number] = _memory(one, device)
            else:
                outcomes[number] = Outcome(one.name, "wrong", error)
        advance(one.name)
    timings = _rounds(
        [jobs[number] for number in memory], stopwatch, runs=runs, max_seconds=max_seconds,
        until_steady=until_steady, advance=advance, device=device,
    )  # fmt: skip
    for (number, taken), times in zip(memory.items(), timings, strict=True):
        passes = {
            # On a GPU the host compiles while the device waits.
            p: Measured(times[p], *taken[p], max(t for t in first[number][p] if t is not None))
            for p in taken
        }
        outcomes[number] = Outcome(jobs[number].name, "timed", passes=passes)
    return [outcomes[number] for number in range(len(jobs))]


@contextlib.contextmanager
def _failures(outcomes: dict[int, Outcome], number: int, name: str) -> Iterator[None]:
    """Keep a job's exception as its outcome."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, MemoryError) as failure:
        text = " ".join(str(failure).split())
        outcomes[number] = Outcome(name, "failed", f"{type(failure).__name__}: {text[:200]}")


def _rounds(
    jobs: list[Job],
    stopwatch: Stopwatch,
    *,
    runs: int,
    max_seconds: float,
    until_steady: bool,
    advance: Callable[[str], None],
    device: str,
) -> list[dict[str, list[Timing]]]:
    """Run everything once per round, so that what else the machine does meets all alike.

    On the CPU each is first run untimed for a moment: threads of the one before it, OpenMP's above
    all, keep a core busy for some 20 ms while they wait for more work.

    Everything has run before, for its results and for its memory. On a GPU it runs here once more,
    because CuPy's pool does not yet hold the memory of the results: that is the warm-up.
    """
    timings: list[dict[str, list[Timing]]] = [{name: [] for name in one.steps} for one in jobs]
    if device == "cuda":
        for one in jobs:
            _round(one, stopwatch)
    beside = len(jobs) > 1 and device == "cpu"
    for _ in range(runs):
        for one, taken in zip(jobs, timings, strict=True):
            seconds = [[timing.seconds for timing in times] for times in taken.values()]
            if len(seconds[0]) >= LEAST_RUNS and (
                sum(map(sum, seconds)) >= max_seconds or (until_steady and is_steady(seconds))
            ):
                continue
            settle = beside and sum(times[-1] for times in seconds if times) <= 10 * SETTLE_SECONDS
            start = time.perf_counter()
            while settle and time.perf_counter() - start < SETTLE_SECONDS:
                _round(one, stopwatch)
            for name, timing in _round(one, stopwatch).items():
                taken[name].append(timing)
            advance(one.name)
    return timings


def is_steady(passes: list[list[float]]) -> bool:
    """Tell whether in the later half of the runs no pass's median has moved by more than 1 %."""
    for seconds in passes:
        count = len(seconds)
        if count < STEADY_RUNS:
            return False
        medians = [median(seconds[:runs]) for runs in range(count // 2, count + 1)]
        if max(medians) - min(medians) > STEADY * medians[-1]:
            return False
    return True


def _round(one: Job, stopwatch: Stopwatch) -> dict[str, Timing]:
    timings: dict[str, Timing] = {}
    results: dict[str, Any] = {}
    for name, step in one.steps.items():
        timings[name], results[name] = stopwatch(partial(step, results))
    return timings


def _gradients(one: Implementation, maps: _Maps, layer: Layer, cost: Any) -> tuple[Any, Any]:
    """Compute both gradients; torch's graph comes from the forward pass."""
    if one.vjp is not None:
        return one.vjp(maps.grad_cost, maps.fmap1, maps.fmap2, layer)
    import torch

    grad1, grad2 = torch.autograd.grad(cost, (maps.fmap1, maps.fmap2), maps.grad_cost)
    return grad1, grad2


def _reference(problem: Problem, dtype: str) -> tuple[list[Array], list[Array]]:
    """Return maps on which every sum is exact in the dtype, and this package's results.

    Values are -1, 0 and 1, and so few are not 0 that absolute values add up to about 64, partial
    sums that every dtype holds exactly in every order (bfloat16 up to 256).
    """
    shape, layer = problem.shape, problem.layer
    geometry = layer.geometry
    generator = np.random.default_rng(2)
    terms = max(shape[1], prod(geometry.patch_size)) * geometry.taps
    share = 64 / max(1, terms)
    chance = min(2 / 3, share / 2 if layer.l1 else sqrt(share))
    kind = np.float64 if dtype == "float64" else np.float32
    exact = []
    for size in (shape, shape, geometry.cost_shape(shape)):
        uniform = generator.random(size, np.float32)
        values = (uniform < chance).astype(kind)
        values[uniform < chance / 2] = -1
        exact.append(values)
    cost = correlate(exact[0], exact[1], layer)
    return exact, [cost, *differentiate(exact[2], exact[0], exact[1], layer)]


def _mistake(
    one: Implementation,
    problem: Problem,
    dtype: str,
    reference: Callable[[], tuple[list[Array], list[Array]]],
    device: str = "cpu",
) -> str | None:
    """Describe the first result that is not equal to this package's, or return None."""
    exact, want = reference()
    maps = library_maps(exact, one.library, dtype, device, problem.channels_last)
    cost = one.correlate(maps.fmap1, maps.fmap2, problem.layer)
    got = (cost, *_gradients(one, maps, problem.layer, cost))
    for name, result, wanted in zip(("cost", "grad_fmap1", "grad_fmap2"), got, want, strict=True):
        error = verify.difference(widened(result, wanted.dtype), wanted)
        if error is not None:
            return f"{name}: {error}"
    return None


def library_maps(
    values: Sequence[Array], library: str, dtype: str, device: str, channels_last: bool
) -> _Maps:
    """Bring values into a library's arrays of a dtype; torch's maps want gradients."""
    one, two, grad = values
    if channels_last:
        one, two = (fmap.transpose(0, 2, 3, 1) for fmap in (one, two))
    arrays = [library_array(array, library, dtype, device) for array in (one, two, grad)]
    if channels_last:
        arrays[:2] = (
            fmap.permute(0, 3, 1, 2) if library == "torch" else fmap.transpose(0, 3, 1, 2)
            for fmap in arrays[:2]
        )
    if library == "torch":
        arrays[:2] = (fmap.requires_grad_() for fmap in arrays[:2])
    return _Maps(*arrays)


def library_array(values: Array, library: str, dtype: str, device: str) -> Any:
    """Bring values into a contiguous array of a library."""
    if library == "torch":
        import torch

        contiguous = np.ascontiguousarray(values)
        return torch.from_numpy(contiguous).to(device, getattr(torch, dtype), copy=True)
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    array = values.astype(dtype, order="C")
    if library == "cupy":
        import cupy

        return cupy.asarray(array)
    return array


def widened(result: Any, kind: np.dtype[Any]) -> Array:
    """Return a result of any library as a NumPy array of a kind that holds its values."""
    if hasattr(result, "detach"):
        result = result.detach().double().cpu().numpy()  # synchronises on a GPU
    elif not isinstance(result, np.ndarray):
        result = result.get()  # CuPy's; synchronises
    array: Array = result.astype(kind)
    return array


def by_clock(call: Callable[[], Any]) -> tuple[Timing, Any]:
    """Time a call by the wall clock; return its result too."""
    start = time.perf_counter()
    result = call()
    return Timing(time.perf_counter() - start), result


def _memory(one: Job, device: str = "cpu") -> dict[str, tuple[int, int]]:
    """Return each pass's peak beyond inputs and outputs, and its outputs, in bytes."""
    results: dict[str, Any] = {}
    memory = {}
    for name, step in one.steps.items():
        most, results[name] = peak(partial(step, results), one.library, device)
        outputs = _bytes(results[name])
        memory[name] = max(0, most - outputs), outputs
    return memory


def _bytes(result: Any) -> int:
    if isinstance(result, (tuple, list)):
        return sum(_bytes(one) for one in result)
    return 0 if result is None else int(result.nbytes)
