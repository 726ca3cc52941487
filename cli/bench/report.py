"""The results of ``cupycorr bench``: as a table, and as an entry of its JSON document."""

from __future__ import annotations

import shutil
import sys
import textwrap
from math import prod
from statistics import fmean, median
from typing import Any

import click
import numpy as np

from .. import cuda
from ..options import GEOMETRY_FIELDS, LookupProblem, Problem, description
from .measure import ALL_PASSES, PASSES, Outcome
from .peers import ITEMSIZE

SCALES = {"s": 1.0, "ms": 1e3, "us": 1e6}
LOOKUPS = 12
"""Lookups of a pair of maps in one pass of RAFT."""
WIDTH = 100
"""Columns of the screen where that is no terminal, and at most."""
COLUMNS = {
    "cpu": ("min", "vs ours", "median", "q1-q3", "GEMM", "extra MB", "runs", "first"),
    "cuda": ("min", "vs ours", "median", "q1-q3", "GB/s", "GFMA/s", "host", "extra MB", "runs",
             "first"),
}  # fmt: skip
"""The columns of a table, the more important ones first: the last need a wide screen."""
SHOWN = ("min", "median", "q1-q3", "runs", "GEMM", "GFMA/s", "GB/s", "host", "extra MB", "first",
         "vs ours")  # fmt: skip
"""The columns from left to right."""
TIMES = ("min", "median", "q1-q3", "host", "first")
NOISY = 0.1
"""Part of the median that lies between the quartiles of a machine that does something else too."""
QUARTILES = (
    "q1-q3: half of the runs took between so much. first: the first call, before all checks."
)
MEANING = (
    QUARTILES,
    "extra: peak of what NumPy (tracemalloc) and torch (profiler) allocate beyond inputs and "
    "outputs, in a run that is not timed.",
    "vs ours: the least time over cupycorr's.",
)
MEANING_ON_CUDA = (
    QUARTILES,
    "GFMA/s: multiply-adds of positions inside the images, each pair once; twice that backward.",
    "GB/s: every input and output once. In brackets the share of the device's peak.",
    "host: median of the time that launching takes Python, which does not count.",
    "extra: peak of device memory beyond inputs and outputs, in a run that is not timed.",
    "vs ours: the least time over cupycorr's.",
)


def heading(document: dict[str, Any]) -> None:
    """Print the machine and what the columns mean."""
    machine = document["machine"]
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    if document["device"] == "cuda":
        _say(cuda.line(document["cuda"]), libraries, *_peaks(document), *MEANING_ON_CUDA)
        return
    load = "" if machine["load"] is None else f" (load before: {machine['load']:.1f})"
    _say(
        f"{machine['processor']}, {document['threads']} threads{load}",
        libraries,
        f"GEMM: share of the rate of a dense {document['gemm']['size']}^3 np.matmul in this run; "
        "counts the multiply-adds of positions inside the images (or absolute differences), each "
        "pair once; twice that backward.",
        *MEANING,
    )


def _say(*paragraphs: str, colour: str | None = None) -> None:
    """Print paragraphs; on a terminal break them between words, and indent further lines."""
    for text in paragraphs:
        if sys.stdout.isatty():
            text = textwrap.fill(text, _width(), subsequent_indent="  ", break_on_hyphens=False)
        click.secho(text, fg=colour, reset=colour is not None)


def _width() -> int:
    return min(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDTH


def _gemm_rate(document: dict[str, Any]) -> float:
    gemm = document["gemm"]
    rate: float = 2 * gemm["size"] ** 3 / min(gemm["seconds"])
    return rate


def _gemm_share(
    document: dict[str, Any], problem: dict[str, Any], seconds: float, step: str
) -> float:
    share: float = 2 * problem["multiply_adds"][step] / seconds / _gemm_rate(document)
    return share


def exceeds_gemm(document: dict[str, Any], problem: dict[str, Any]) -> bool:
    """Tell whether anything was faster than the dense product, which was timed too slow then."""
    return any(
        _gemm_share(document, problem, one[step]["median"], step) > 1
        for one in problem["implementations"]
        if one["status"] == "timed"
        for step in PASSES
        if _multiplies(problem, one, step)
    )


def _multiplies(problem: dict[str, Any], one: dict[str, Any], step: str) -> bool:
    """Tell whether a pass makes the problem's products: others' lookups may have made them."""
    return step in PASSES and ("lookup" not in problem or one["name"].startswith("cupycorr"))


def entry(problem: Problem | LookupProblem, dtype: str, outcomes: list[Outcome]) -> dict[str, Any]:
    """Return the problem and its outcomes for the JSON document."""
    maps, cost = prod(problem.shape), prod(problem.cost_shape)
    if isinstance(problem, LookupProblem):
        lookup = problem.lookup
        # Cells that a position reads: neighbours share corners unless the patch has gaps.
        cells = [2 * r + 2 if d == 1 else 2 * (2 * r + 1)
                 for r, d in zip(lookup.radius, lookup.dilation_patch, strict=True)]  # fmt: skip
        useful = maps * lookup.levels * prod(cells)
        area = sum(h * w for h, w in lookup.level_sizes(*problem.shape[2:]))
        others = maps // max(1, prod(problem.shape[2:])) * area
        what: dict[str, Any] = {"lookup": lookup.parameters()}
    else:
        geometry = problem.layer.geometry
        useful, others = geometry.multiply_adds(problem.shape), maps
        what = {
            "geometry": {name: list(getattr(geometry, name)) for name in GEOMETRY_FIELDS.values()},
            "similarity": problem.layer.similarity,
        }
    result = {
        "name": problem.name,
        "shape": list(problem.shape),
        **what,
        "channels_last": problem.channels_last,
        "description": description(problem),
        "multiply_adds": {"forward": useful, "backward": 2 * useful},
        # Every input and output once.
        "bytes": {
            "forward": (maps + others + cost) * ITEMSIZE[dtype],
            "backward": (2 * maps + 2 * others + cost) * ITEMSIZE[dtype],
        },
        "implementations": [_implementation(outcome) for outcome in outcomes],
    }
    return result | {"warnings": noise(result)}


def _implementation(outcome: Outcome) -> dict[str, Any]:
    result: dict[str, Any] = {"name": outcome.name, "status": outcome.status}
    if outcome.passes is None:
        return result | {"reason": outcome.reason}
    for name, measured in outcome.passes.items():
        result[name] = statistics(measured.seconds) | {
            "first": measured.first_seconds,
            "extra_bytes": measured.extra_bytes,
            "output_bytes": measured.output_bytes,
            "seconds": measured.seconds,
        }
        if measured.host_seconds:
            result[name]["host_seconds"] = measured.host_seconds
    return result


def statistics(seconds: list[float]) -> dict[str, Any]:
    """Return what a row says of its runs; the quartiles lie between runs, as the median does."""
    lower, upper = np.quantile(seconds, [0.25, 0.75]).tolist()
    return {
        "min": min(seconds),
        "q1": lower,
        "median": median(seconds),
        "q3": upper,
        "mean": fmean(seconds),
        "runs": len(seconds),
    }


def noise(problem: dict[str, Any]) -> list[str]:
    """Name the passes whose quartiles lie so far apart that the machine must do something else."""
    noisy = [
        f"{step} of {one['name']}"
        for one in problem["implementations"]
        for step in ALL_PASSES
        if step in one and one[step]["q3"] - one[step]["q1"] > NOISY * one[step]["median"]
    ]
    if not noisy:
        return []
    more = f" and {len(noisy) - 2} more" if len(noisy) > 2 else ""
    return [f"the quartiles of {', '.join(noisy[:2])}{more} are over {NOISY:.0%} of the median "
            "apart: something else keeps this machine busy"]  # fmt: skip


def show(
    document: dict[str, Any], problem: dict[str, Any], scale: str, unit: str | None = None
) -> None:
    """Print the tables of one problem, and a line per implementation.

    Parameters
    ----------
    document, problem : dict
        The JSON document, and one of its problems.
    scale : {"s", "ms", "us"}
        Unit of the lines.
    unit : {"s", "ms", "us"}, optional
        Unit of the tables; by default what suits each of them.
    """
    name, shape = problem["name"], tuple(problem["shape"])
    click.echo()
    _say(f"{name}: maps {shape} {document['dtype']}, {problem['description']}")
    if problem.get("kernels"):
        seconds = sum(kernel["seconds"] for kernel in problem["kernels"])
        count = len(problem["kernels"])
        _say(f"{count} kernels ready in {seconds:.2f} s; CuPy keeps on disk what it compiled")
    timed = [one for one in problem["implementations"] if one["status"] == "timed"]
    own = {one["name"]: one for one in timed if one["name"].startswith("cupycorr")}
    names = ("cupycorr torch", "cupycorr numpy", "cupycorr cupy", "cupycorr plain")
    ours = next((own[name] for name in names if name in own), None)
    left_out: set[str] = set()
    for step in ALL_PASSES:
        rows = [one for one in timed if step in one]
        if not rows:
            continue
        shortest = min(one[step]["min"] for one in rows)
        suited = _unit(shortest) if unit is None else unit
        left_out |= _table(step, suited, [one["name"] for one in rows],
                           [_cells(document, problem, one, ours, step, suited) for one in rows],
                           COLUMNS[document["device"]])  # fmt: skip
    if left_out:
        columns = ", ".join(column for column in SHOWN if column in left_out)
        _say(f"No room for {columns}; --json FILE has every run.")
    if timed and document["device"] == "cpu":
        _say(f"GEMM: 100% is {_gemm_rate(document) / 1e9:.1f} GFLOP/s.")
        if exceeds_gemm(document, problem):
            _say("GEMM ?: faster than np.matmul; the machine was busy while that was timed.")
    for one in timed:
        click.echo(_peer_line(one, scale))
        if "lookup" in problem:
            _say(_together(one))
    for text in problem.get("warnings", ()):
        _say(f"Warning: {text}", colour="yellow")
    for one in problem["implementations"]:
        if one["status"] != "timed":
            colour = None if one["status"] == "skipped" else "red"
            _say(f"{one['name']}: {one['status']}: {one['reason']}", colour=colour)


def _unit(seconds: float) -> str:
    """Return the unit in which a time has one to three digits before the point."""
    return "s" if seconds >= 1 else "ms" if seconds >= 1e-3 else "us"


def _table(
    step: str, unit: str, names: list[str], rows: list[dict[str, str]], columns: tuple[str, ...]
) -> set[str]:
    """Print as many of the columns as the screen has room for, and return the others."""
    titles = {column: f"{column} {unit}" if column in TIMES else column for column in columns}
    widths = {
        column: max(len(text) for text in (titles[column], *(row[column] for row in rows)))
        for column in columns
    }
    first = max(len(text) for text in (step, *names))
    kept: list[str] = []
    room = _width() - first
    for column in columns:
        room -= 2 + widths[column]
        if room >= 0:
            kept.append(column)
    for name, row in ((step, titles), *zip(names, rows, strict=True)):
        cells = [f"  {row[column]:>{widths[column]}}" for column in SHOWN if column in kept]
        click.echo(f"{name:{first}}{''.join(cells)}")
    return set(columns) - set(kept)


def own_failure(document: dict[str, Any]) -> bool:
    """Return whether cupycorr itself failed or was wrong anywhere."""
    return any(
        one["name"].startswith("cupycorr") and one["status"] in ("failed", "wrong")
        for problem in document["problems"]
        for one in problem["implementations"]
    )


def _peaks(document: dict[str, Any]) -> tuple[str, str]:
    """Return the lines about the device's peaks, and how runs are timed."""
    found, peaks = document["cuda"], document["cuda"]["peaks"]
    rates = [
        f"{peaks[kind] / 1e9:.0f} GFMA/s in {kind}" if peaks[kind] else f"unknown in {kind}"
        for kind in ("float32", "float64")
    ]
    rates.append(f"{peaks['memory'] / 1e9:.0f} GB/s" if peaks["memory"] else "unknown GB/s")
    cache = "overwritten before each run" if document["cold"] else "as the run before leaves it"
    return (
        f"peak: {', '.join(rates)}, at {found['clock_hz'] / 1e6:.0f} MHz and "
        f"{found['memory_clock_hz'] / 1e6:.0f} MHz",
        f"Times are the device's, by events; its L2 cache is {cache}.",
    )


def _cells(
    document: dict[str, Any],
    problem: dict[str, Any],
    one: dict[str, Any],
    ours: dict[str, Any] | None,
    step: str,
    unit: str,
) -> dict[str, str]:
    """Return what stands in each column."""
    measured = one[step]
    cells = {key: _number(measured[key] * SCALES[unit]) for key in ("min", "median", "first")}
    cells["q1-q3"] = "-".join(_number(measured[key] * SCALES[unit]) for key in ("q1", "q3"))
    cells["runs"] = str(measured["runs"])
    cells["extra MB"] = _number(measured["extra_bytes"] / 1e6)
    known = ours is not None and step in ours
    cells["vs ours"] = f"{measured['min'] / ours[step]['min']:.2f}" if ours and known else ""
    if document["device"] == "cuda":
        kind = "float64" if document["dtype"] == "float64" else "float32"
        for title, amount, peak in (
            ("GFMA/s", "multiply_adds", kind),
            ("GB/s", "bytes", "memory"),
        ):
            counts = _multiplies(problem, one, step)
            done = problem[amount][step] if counts else None
            peaks = document["cuda"]["peaks"]
            cells[title] = "" if done is None else _rate(done / measured["median"], peaks[peak])
        cells["host"] = _number(median(measured["host_seconds"]) * SCALES[unit])
    elif not _multiplies(problem, one, step):
        cells["GEMM"] = ""
    else:
        share = _gemm_share(document, problem, measured["median"], step)
        cells["GEMM"] = f"{100 * share:.1f}%" if share <= 1 else "?"
    return cells


def _rate(rate: float, peak: float | None) -> str:
    """Show a rate in billions, and its share of the peak if that is known."""
    share = "" if peak is None else f" ({100 * rate / peak:.0f}%)"
    return _number(rate / 1e9) + share


def _peer_line(one: dict[str, Any], scale: str) -> str:
    """Return the line that spatial-correlation-sampler's benchmark prints."""
    parts = []
    for step in (step for step in ALL_PASSES if step in one):
        least, mean = (one[step][key] * SCALES[scale] for key in ("min", "mean"))
        parts.append(f"{step.capitalize()}: {least:.3f}/{mean:.3f} {scale}")
    return f"{one['name']}  {' | '.join(parts)}"


def _together(one: dict[str, Any]) -> str:
    """Return what a network's lookups take with their preparation, and what is kept for them."""
    least = {step: one[step]["min"] for step in ALL_PASSES if step in one}
    forward = least["prepare"] + LOOKUPS * least["forward"]
    text = f"{one['name']}  {LOOKUPS} lookups with preparation: {1e3 * forward:.1f} ms"
    if "prepare backward" in least:
        both = forward + LOOKUPS * least["backward"] + least["prepare backward"]
        text += f", with gradients {1e3 * both:.1f} ms"
    return f"{text}; prepared: {_number(one['prepare']['output_bytes'] / 1e6)} MB"


def _number(value: float) -> str:
    """Show four digits or all before the point; three below 1."""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:#.4g}".rstrip(".") if value >= 1 else f"{value:#.3g}"
