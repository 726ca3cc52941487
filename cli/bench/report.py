"""The results of ``cupycorr bench``: as a table, and as an entry of its JSON document."""

from __future__ import annotations

import sys
from math import prod
from statistics import median
from typing import Any

import click

from .. import cuda
from ..options import GEOMETRY_FIELDS, Problem, description
from .measure import PASSES, Outcome
from .peers import ITEMSIZE

SCALES = {"s": 1.0, "ms": 1e3, "us": 1e6}
WIDTH = 100
# The columns of a table after the times and runs.
COLUMNS = {
    "cpu": ("GEMM", "extra MB", "vs ours", "by min"),
    "cuda": ("GFMA/s", "GB/s", "host", "extra MB", "vs ours"),
}
MEANING = (
    "extra: peak of what NumPy (tracemalloc) and torch (profiler) allocate beyond inputs and "
    "outputs,\n"
    "  in a run that is not timed. vs ours: time over cupycorr's, by median and by minimum."
)
MEANING_ON_CUDA = (
    "GFMA/s: multiply-adds of positions inside the images, each pair once; twice that backward.\n"
    "GB/s: every input and output once. In brackets the share of the device's peak.\n"
    "host: median of the time that launching takes Python, which does not count.\n"
    "extra: peak of device memory beyond inputs and outputs, in a run that is not timed.\n"
    "vs ours: median over cupycorr's."
)


def heading(document: dict[str, Any]) -> None:
    """Print the machine and what the columns mean."""
    machine = document["machine"]
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    if document["device"] == "cuda":
        click.echo(cuda.line(document["cuda"]))
        click.echo(libraries)
        click.echo(_peaks(document))
        click.echo(MEANING_ON_CUDA)
        return
    gemm = document["gemm"]
    load = "" if machine["load"] is None else f" (load before: {machine['load']:.1f})"
    click.echo(f"{machine['processor']}, {document['threads']} threads{load}")
    click.echo(libraries)
    rate = 2 * gemm["size"] ** 3 / min(gemm["seconds"]) / 1e9
    click.echo(
        f"GEMM: share of the rate of a dense {gemm['size']}^3 np.matmul in this run, "
        f"{rate:.1f} GFLOP/s;\n"
        "  counts the multiply-adds of positions inside the images (or absolute differences), each "
        f"pair once; twice that backward.\n{MEANING}"
    )


def entry(problem: Problem, dtype: str, outcomes: list[Outcome]) -> dict[str, Any]:
    """Return the problem and its outcomes for the JSON document."""
    geometry = problem.layer.geometry
    useful = geometry.multiply_adds(problem.shape)
    maps, cost = prod(problem.shape), prod(problem.cost_shape)
    return {
        "name": problem.name,
        "shape": list(problem.shape),
        "geometry": {name: list(getattr(geometry, name)) for name in GEOMETRY_FIELDS.values()},
        "similarity": problem.layer.similarity,
        "description": description(problem),
        "multiply_adds": {"forward": useful, "backward": 2 * useful},
        # Every input and output once.
        "bytes": {
            "forward": (2 * maps + cost) * ITEMSIZE[dtype],
            "backward": (4 * maps + cost) * ITEMSIZE[dtype],
        },
        "implementations": [_implementation(outcome) for outcome in outcomes],
    }


def _implementation(outcome: Outcome) -> dict[str, Any]:
    result: dict[str, Any] = {"name": outcome.name, "status": outcome.status}
    if outcome.passes is None:
        return result | {"reason": outcome.reason}
    for name, measured in outcome.passes.items():
        result[name] = {
            "min": measured.least,
            "median": measured.median,
            "mean": measured.mean,
            "runs": len(measured.seconds),
            "extra_bytes": measured.extra_bytes,
            "seconds": measured.seconds,
        }
        if measured.host_seconds:
            result[name]["host_seconds"] = measured.host_seconds
    return result


def show(document: dict[str, Any], problem: dict[str, Any], scale: str) -> None:
    """Print the tables of one problem, and a line per implementation."""
    from rich.console import Console
    from rich.table import Table

    # Rich breaks lines by the terminal; piped output has one width everywhere.
    console = Console(file=sys.stdout, highlight=False)
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    name, shape = problem["name"], tuple(problem["shape"])
    click.echo(f"\n{name}: maps {shape} {document['dtype']}, {problem['description']}")
    if problem.get("kernels"):
        seconds = sum(kernel["seconds"] for kernel in problem["kernels"])
        count = len(problem["kernels"])
        click.echo(f"{count} kernels ready in {seconds:.2f} s; CuPy keeps on disk what it compiled")
    timed = [one for one in problem["implementations"] if one["status"] == "timed"]
    own = {one["name"]: one for one in timed if one["name"].startswith("cupycorr")}
    names = ("cupycorr torch", "cupycorr numpy", "cupycorr cupy", "cupycorr plain")
    ours = next((own[name] for name in names if name in own), None)
    for step in PASSES if timed else ():
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(step)
        for title in ("min", "median", "mean"):
            table.add_column(f"{title} {scale}", justify="right", no_wrap=True)
        for title in ("runs", *COLUMNS[document["device"]]):
            table.add_column(title, justify="right", no_wrap=True)
        for one in timed:
            table.add_row(one["name"], *_cells(document, problem, one, ours, step, scale))
        console.print(table)
    for one in timed:
        click.echo(_peer_line(one, scale))
    for one in problem["implementations"]:
        if one["status"] != "timed":
            click.echo(f"{one['name']}: {one['status']}: {one['reason']}")


def own_failure(document: dict[str, Any]) -> bool:
    """Return whether cupycorr itself failed or was wrong anywhere."""
    return any(
        one["name"].startswith("cupycorr") and one["status"] in ("failed", "wrong")
        for problem in document["problems"]
        for one in problem["implementations"]
    )


def _peaks(document: dict[str, Any]) -> str:
    """Return the line about the device's peaks, and how runs are timed."""
    found, peaks = document["cuda"], document["cuda"]["peaks"]
    rates = [
        f"{peaks[kind] / 1e9:.0f} GFMA/s in {kind}" if peaks[kind] else f"unknown in {kind}"
        for kind in ("float32", "float64")
    ]
    rates.append(f"{peaks['memory'] / 1e9:.0f} GB/s" if peaks["memory"] else "unknown GB/s")
    cache = "overwritten before each run" if document["cold"] else "as the run before leaves it"
    return (
        f"peak: {', '.join(rates)}, at {found['clock_hz'] / 1e6:.0f} MHz and "
        f"{found['memory_clock_hz'] / 1e6:.0f} MHz\n"
        f"Times are the device's, by events; its L2 cache is {cache}."
    )


def _cells(
    document: dict[str, Any],
    problem: dict[str, Any],
    one: dict[str, Any],
    ours: dict[str, Any] | None,
    step: str,
    scale: str,
) -> list[str]:
    measured = one[step]
    cells = [_number(measured[key] * SCALES[scale]) for key in ("min", "median", "mean")]
    cells.append(str(measured["runs"]))
    extra = _number(measured["extra_bytes"] / 1e6)
    against = [
        "" if ours is None else f"{measured[key] / ours[step][key]:.2f}"
        for key in ("median", "min")
    ]
    if document["device"] == "cuda":
        kind = "float64" if document["dtype"] == "float64" else "float32"
        for amount, peak in (("multiply_adds", kind), ("bytes", "memory")):
            rate = problem[amount][step] / measured["median"]
            cells.append(_rate(rate, document["cuda"]["peaks"][peak]))
        host = median(measured["host_seconds"]) * SCALES[scale]
        return [*cells, _number(host), extra, against[0]]
    gemm = document["gemm"]
    least = 2 * problem["multiply_adds"][step] * min(gemm["seconds"]) / (2 * gemm["size"] ** 3)
    return [*cells, f"{100 * least / measured['median']:.1f}%", extra, *against]


def _rate(rate: float, peak: float | None) -> str:
    """Show a rate in billions, and its share of the peak if that is known."""
    share = "" if peak is None else f" ({100 * rate / peak:.0f}%)"
    return _number(rate / 1e9) + share


def _peer_line(one: dict[str, Any], scale: str) -> str:
    """Return the line that spatial-correlation-sampler's benchmark prints."""
    parts = []
    for step in PASSES:
        least, mean = (one[step][key] * SCALES[scale] for key in ("min", "mean"))
        parts.append(f"{step.capitalize()}: {least:.3f}/{mean:.3f} {scale}")
    return f"{one['name']}  {' | '.join(parts)}"


def _number(value: float) -> str:
    """Show four digits or all before the point."""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.4g}" if value >= 1 else f"{value:.3f}"
