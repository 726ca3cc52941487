"""What ``cupycorr bench`` found: as a table, and as an entry of its JSON document."""

from __future__ import annotations

import sys
from typing import Any

import click

from .measure import PASSES, Outcome
from .options import GEOMETRY_FIELDS, Problem

SCALES = {"s": 1.0, "ms": 1e3, "us": 1e6}
WIDTH = 100


def heading(document: dict[str, Any]) -> None:
    """Print the machine and what the columns mean."""
    machine, gemm = document["machine"], document["gemm"]
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    load = "" if machine["load"] is None else f" (load before: {machine['load']:.1f})"
    click.echo(f"{machine['processor']}, {document['threads']} threads{load}")
    click.echo(libraries)
    rate = 2 * gemm["size"] ** 3 / min(gemm["seconds"]) / 1e9
    click.echo(
        f"GEMM: share of the rate of a dense {gemm['size']}^3 np.matmul in this run, "
        f"{rate:.1f} GFLOP/s;\n"
        "  counts the multiply-adds of positions inside the images, each pair once; twice that "
        "backward.\n"
        "extra: peak of what NumPy (tracemalloc) and torch (profiler) allocate beyond inputs and "
        "outputs,\n"
        "  in a run that is not timed. vs ours: time over cupycorr's, by median and by minimum."
    )


def entry(problem: Problem, outcomes: list[Outcome]) -> dict[str, Any]:
    """Return the problem and its outcomes for the JSON document."""
    geometry = problem.geometry
    useful = geometry.multiply_adds(problem.shape)
    return {
        "name": problem.name,
        "shape": list(problem.shape),
        "geometry": {name: list(getattr(geometry, name)) for name in GEOMETRY_FIELDS.values()},
        "description": repr(geometry),
        "multiply_adds": {"forward": useful, "backward": 2 * useful},
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
    timed = [one for one in problem["implementations"] if one["status"] == "timed"]
    own = {one["name"]: one for one in timed if one["name"].startswith("cupycorr")}
    ours = own.get("cupycorr torch") or own.get("cupycorr numpy")
    for step in PASSES if timed else ():
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column(step)
        for title in ("min", "median", "mean"):
            table.add_column(f"{title} {scale}", justify="right", no_wrap=True)
        for title in ("runs", "GEMM", "extra MB", "vs ours", "by min"):
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


def _cells(
    document: dict[str, Any],
    problem: dict[str, Any],
    one: dict[str, Any],
    ours: dict[str, Any] | None,
    step: str,
    scale: str,
) -> list[str]:
    measured, gemm = one[step], document["gemm"]
    least = 2 * problem["multiply_adds"][step] * min(gemm["seconds"]) / (2 * gemm["size"] ** 3)
    cells = [_number(measured[key] * SCALES[scale]) for key in ("min", "median", "mean")]
    cells += [str(measured["runs"]), f"{100 * least / measured['median']:.1f}%"]
    cells.append(_number(measured["extra_bytes"] / 1e6))
    for key in ("median", "min"):
        cells.append("" if ours is None else f"{measured[key] / ours[step][key]:.2f}")
    return cells


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
