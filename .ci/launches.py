"""Time every launch of known layers on a GPU, beside the time that the model of tiles predicts.

    python .ci/launches.py FILE [--preset NAME]... [--dtype NAME]... [--tf32] [--tiles N] [--runs N]

Prints a line for each launch, and appends one of JSON to FILE. With --tiles also those launches
whose tiles the model ranks next; their results must equal those of the first, on small integers.
"""

import json
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import cupy
import ml_dtypes  # noqa: F401 - makes bfloat16 known to NumPy
import numpy as np
from cupycorr.cli import cuda
from cupycorr.cli.options import Problem, Sizes
from cupycorr.cli.presets import chosen_problems, preset_option

from cupycorr.cuda import engine
from cupycorr.cuda import plan as cuda_plan
from cupycorr.cuda.launch import Launch, Plan
from cupycorr.layer import DTYPES

MEMORY_SHARE = 0.85  # of the peak rate, that kernels reach which only move memory


class Prepared(NamedTuple):
    """A launch that can be made again and again."""

    launch: Launch
    function: Any
    call: Callable[[], Any]
    predicted: float | None
    """Seconds."""
    seconds: list[float]


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@preset_option
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)))
@click.option("--tf32", is_flag=True, help="Allow TF32 in float32.")
@click.option("--tiles", type=click.IntRange(min=1), default=1)
@click.option("--runs", type=click.IntRange(min=1), default=50)
def main(
    file: Path,
    presets: tuple[str, ...],
    dtypes: tuple[str, ...],
    tf32: bool,
    tiles: int,
    runs: int,
) -> None:
    """Time the launches."""
    print(cuda.line(cuda.device()))
    print(f"{'layer':12} {'dtype':8} {'kernel':16} rank  predicted us  min us  median us  factor")
    stopwatch = cuda.Stopwatch(cold=False)
    with file.open("a") as written:
        for dtype in dtypes or ("float32",):
            for problem in chosen_problems(Sizes({}, frozenset()), presets or ("all",)):
                if not isinstance(problem, Problem):
                    continue  # its launches have shapes of their own
                for results in (engine.RESULTS["cost"], engine.RESULTS["grads"]):
                    for line in measured(problem, dtype, results, tf32, tiles, runs, stopwatch):
                        print(json.dumps(line), file=written, flush=True)


def measured(
    problem: Problem,
    dtype: str,
    results: tuple[str, ...],
    tf32: bool,
    tiles: int,
    runs: int,
    stopwatch: cuda.Stopwatch,
) -> Iterator[dict[str, Any]]:
    """Time the launches that compute some results; yield a dictionary for each."""
    layer, device = problem.layer, engine.device_of(cupy.cuda.Device().id)
    samples = cuda_plan.samples_at_once(layer.geometry, problem.shape, dtype)
    problem = problem._replace(shape=(samples, *problem.shape[1:]))
    plans = [
        cuda_plan.plan(results, layer, problem.shape, dtype, device, rank=rank, tf32=tf32)
        for rank in range(tiles)
    ]
    rng = np.random.default_rng(0)
    arrays = allocate(problem, dtype, plans[0], lambda s: rng.integers(-1, 2, s).astype("f"))
    ready, want = {}, None
    for rank, plan in enumerate(plans):
        if rank and plan.launches in (other.launches for other in plans[:rank]):
            continue  # fewer tiles fit
        for name in results:
            arrays[name].fill(0)
        ready[rank] = [prepare(launch, arrays, dtype) for launch in plan.launches]
        for one in ready[rank]:
            one.call()
        got = [arrays[name].get().astype(np.float64) for name in results]
        want = got if want is None else want
        if not all(map(np.array_equal, got, want)):
            raise click.ClickException(f"{problem.name} {dtype}: tiles of rank {rank} are wrong")
    random = allocate(problem, dtype, plans[0], lambda s: rng.standard_normal(s, np.float32))
    for name, array in random.items():
        arrays[name].data.copy_from_device(array.data, array.nbytes)
    for _ in range(runs):
        for launches in ready.values():  # in turns
            for one in launches:
                one.seconds.append(stopwatch(one.call)[0].seconds)
    for rank, launches in ready.items():
        for one in launches:
            yield report(problem, "TF32" if tf32 and dtype == "float32" else dtype, rank, one)


def allocate(
    problem: Problem, dtype: str, plan: Plan, values: Callable[[tuple[int, ...]], Any]
) -> dict[str, cupy.ndarray]:
    """Return all arrays of a layer, with values that a function makes for a shape."""
    shapes = dict.fromkeys(("fmap1", "fmap2", "grad_fmap1", "grad_fmap2"), problem.shape)
    shapes |= dict.fromkeys(("cost", "grad_cost"), problem.cost_shape)
    arrays = {name: cupy.asarray(values(shape).astype(dtype)) for name, shape in shapes.items()}
    for workspace in plan.workspaces:
        arrays[workspace.name] = cupy.zeros(workspace.shape, workspace.dtype)
    return arrays


def prepare(launch: Launch, arrays: dict[str, cupy.ndarray], dtype: str) -> Prepared:
    """Compile a launch, and predict its time."""
    function = engine.kernel_of(launch)
    names, values = zip(*launch.sizes, strict=True)
    operands = [arrays[name] for name in launch.arrays]
    moved = sum(array.nbytes for array in operands)
    operands.append(np.array([values], [(name, np.int32) for name in names]))
    operands.append(np.dtype(DTYPES[dtype].accumulator).type(1))
    device, predicted = cuda.device(), None
    if launch.cycles is not None and device["clock_hz"]:
        predicted = launch.cycles / device["clock_hz"]
    elif launch.source in ("taps.cu", "transpose.cu") and device["peaks"]["memory"]:
        predicted = moved / device["peaks"]["memory"] / MEMORY_SHARE

    def call() -> None:
        function((launch.blocks,), (launch.threads,), operands, shared_mem=launch.shared_bytes)

    return Prepared(launch, function, call, predicted, [])


def report(problem: Problem, dtype: str, rank: int, one: Prepared) -> dict[str, Any]:
    """Print a launch's times, and return them with all that tells launches apart."""
    launch, least, middle = one.launch, min(one.seconds), median(one.seconds)
    result = launch.arrays[-1].removesuffix("_turned")
    which = f"{launch.kernel}{result[-1] if 'grad_fmap' in result else ''}"
    predicted, factor = ("-", "-")
    if one.predicted is not None:
        predicted, factor = f"{1e6 * one.predicted:.1f}", f"{middle / one.predicted:.2f}"
    print(
        f"{problem.name:12} {dtype:8} {which:16} {rank:4}  {predicted:>12}  {1e6 * least:6.1f}  "
        f"{1e6 * middle:9.1f}  {factor:>6}",
        flush=True,
    )
    return {
        "layer": problem.name, "shape": problem.shape, "dtype": dtype, "kernel": which,
        "rank": rank, "predicted_seconds": one.predicted, "seconds": one.seconds,
        "blocks": launch.blocks, "threads": launch.threads, "shared_bytes": launch.shared_bytes,
        "registers": one.function.num_regs, "local_bytes": one.function.local_size_bytes,
        "constants": dict(launch.constants), "cost_elements": prod(problem.cost_shape),
    }  # fmt: skip


if __name__ == "__main__":
    main()
