"""The results of ``cupycorr bench``: as a table, and as an entry of its JSON document."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from statistics import fmean, median
from typing import Any

import click
import numpy as np

from .. import cuda, environment
from ..options import GEOMETRY_FIELDS, LookupProblem, Problem, description
from . import floors
from .measure import ALL_PASSES, PASSES, Outcome

SCHEMA = 1
"""The number of the JSON document's meaning, which docs/command-line.md describes."""
SCALES = {"s": 1.0, "ms": 1e3, "us": 1e6}
LOOKUPS = 12
"""Lookups of a pair of maps in one pass of RAFT."""
TOGETHER = (f"{LOOKUPS} lookups", "with gradients")
WIDTH = 100
"""Columns of the screen where that is no terminal, and at most."""
COLUMNS = {
    "cpu": ("min", "vs ours", "median", "q1-q3", "GEMM", "copy", "extra MB", "runs", "first"),
    "cuda": ("min", "vs ours", "median", "q1-q3", "GB/s", "GFMA/s", "copy", "host", "extra MB",
             "runs", "first"),
}  # fmt: skip
"""The columns of a table, the more important ones first: the last need a wide screen."""
SHOWN = ("min", "median", "q1-q3", "runs", "GEMM", "GFMA/s", "GB/s", "copy", "host",
         "extra MB", "first", "vs ours")  # fmt: skip
"""The columns from left to right."""
LEFT_OUT = ("vs ours", "runs", "first")
"""The columns that a page's table has no room for."""
ENGINES = ("cupycorr torch", "cupycorr numpy", "cupycorr cupy", "cupycorr plain")
"""Ours, the first of which that was timed is compared with others."""
TIMES = ("min", "median", "q1-q3", "host", "first")
NOISY = 0.1
"""Part of the median that lies between the quartiles of a machine that does something else too."""
QUARTILES = (
    "q1-q3: half of the runs took between so much. first: the first call, before all checks."
)
COPY = "copy: the least time of copying as many bytes as inputs and outputs have, over the row's."
MEANING = (
    "GEMM: the least time of an np.matmul of as many multiply-adds, over the row's. These are of "
    "positions inside the images (or absolute differences), each pair once; twice that backward.",
    COPY,
    QUARTILES,
    "extra: peak of what NumPy (tracemalloc) and torch (profiler) allocate beyond inputs and "
    "outputs, in a run that is not timed.",
    "vs ours: the least time over cupycorr's.",
)
MEANING_ON_CUDA = (
    COPY,
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
    libraries = environment.versions(machine)
    if document["device"] == "cuda":
        _say(cuda.line(document["cuda"]), libraries, *_peaks(document), *MEANING_ON_CUDA)
        return
    load = "" if machine["load"] is None else f" (load before: {machine['load']:.1f})"
    _say(
        f"{machine['processor']}, {document['threads']} threads{load}",
        libraries,
        *MEANING,
    )
    for text in document["warnings"]:
        _say(f"Warning: {text}", colour="yellow")


def _say(*paragraphs: str, colour: str | None = None) -> None:
    """Print paragraphs; on a terminal break them between words, and indent further lines."""
    for text in paragraphs:
        if sys.stdout.isatty():
            text = textwrap.fill(text, _width(), subsequent_indent="  ", break_on_hyphens=False)
        click.secho(text, fg=colour, reset=colour is not None)


def _width() -> int:
    return min(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDTH


def entry(
    problem: Problem | LookupProblem, dtype: str, outcomes: list[Outcome], bounds: list[Outcome]
) -> dict[str, Any]:
    """Return the problem, its outcomes and those of its floors for the JSON document."""
    if isinstance(problem, LookupProblem):
        what: dict[str, Any] = {"lookup": problem.lookup.parameters()}
    else:
        geometry = problem.layer.geometry
        what = {
            "geometry": {name: list(getattr(geometry, name)) for name in GEOMETRY_FIELDS.values()},
            "similarity": problem.layer.similarity,
        }
    result = {
        "name": problem.name,
        "sweep": None
        if problem.swept is None
        else dict(zip(("parameter", "value"), problem.swept, strict=True)),
        "shape": list(problem.shape),
        **what,
        "channels_last": problem.channels_last,
        "description": description(problem),
        **floors.work(problem, dtype),
        "floors": {one.name: _passes(one) for one in bounds},
        "implementations": [_implementation(outcome) for outcome in outcomes],
    }
    for one in result["implementations"]:
        for step in (step for step in PASSES if step in one):
            # Others' lookups may have multiplied before, and read other arrays.
            counts = "lookup" not in what or one["name"].startswith("cupycorr")
            one[step]["shares"] = {
                name: floor[step]["min"] / one[step]["min"] if counts else None
                for name, floor in result["floors"].items()
            }
    return result | {"warnings": noise(result)}


def _implementation(outcome: Outcome) -> dict[str, Any]:
    result: dict[str, Any] = {"name": outcome.name, "status": outcome.status}
    if outcome.passes is None:
        return result | {"reason": outcome.reason}
    return result | _passes(outcome)


def _passes(outcome: Outcome) -> dict[str, Any]:
    result = {}
    assert outcome.passes is not None
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
    timed = [*_timed(problem).values()]
    ours = _ours(problem)
    left_out: set[str] = set()
    for step in ALL_PASSES:
        rows = [one for one in timed if step in one]
        if not rows:
            continue
        shortest = min(one[step]["min"] for one in rows)
        suited = _unit(shortest) if unit is None else unit
        bounds = {f"({name})": one[step] for name, one in problem["floors"].items() if step in one}
        cells = [_cells(document, problem, one, ours, step, suited) for one in rows]
        cells += [_times(measured, suited) for measured in bounds.values()]
        names = [*(one["name"] for one in rows), *bounds]
        left_out |= _table(step, suited, names, cells, COLUMNS[document["device"]])
    if left_out:
        columns = ", ".join(column for column in SHOWN if column in left_out)
        _say(f"No room for {columns}; --json FILE has every run.")
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


def _timed(problem: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the implementations that were timed, by their names."""
    return {one["name"]: one for one in problem["implementations"] if one["status"] == "timed"}


def _ours(problem: dict[str, Any]) -> dict[str, Any] | None:
    """Return the row of this package that others are compared with."""
    timed = _timed(problem)
    return next((timed[name] for name in ENGINES if name in timed), None)


def _unit(seconds: float) -> str:
    """Return the unit in which a time has one to three digits before the point."""
    return "s" if seconds >= 1 else "ms" if seconds >= 1e-3 else "us"


def _table(
    step: str, unit: str, names: list[str], rows: list[dict[str, str]], columns: tuple[str, ...]
) -> set[str]:
    """Print as many of the columns as the screen has room for, and return the others."""
    titles = {column: f"{column} {unit}" if column in TIMES else column for column in columns}
    widths = {
        column: max(len(text) for text in (titles[column], *(row.get(column, "") for row in rows)))
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
        cells = [f"  {row.get(column, ''):>{widths[column]}}" for column in SHOWN if column in kept]
        click.echo(f"{name:{first}}{''.join(cells)}".rstrip())
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
    cells = _times(measured, unit)
    cells["extra MB"] = number(measured["extra_bytes"] / 1e6)
    known = ours is not None and step in ours
    cells["vs ours"] = f"{measured['min'] / ours[step]['min']:.2f}" if ours and known else ""
    shares = {name: s for name, s in measured.get("shares", {}).items() if s is not None}
    for title, name in (("GEMM", "matmul"), ("copy", "copy")):
        cells[title] = _share(shares[name]) if name in shares else ""
    if document["device"] == "cuda":
        kind = "float64" if document["dtype"] == "float64" else "float32"
        for title, amount, peak in (
            ("GFMA/s", "multiply_adds", kind),
            ("GB/s", "bytes", "memory"),
        ):
            peaks = document["cuda"]["peaks"]
            rate = problem[amount][step] / measured["median"] if shares else None
            cells[title] = "" if rate is None else _rate(rate, peaks[peak])
        cells["host"] = number(median(measured["host_seconds"]) * SCALES[unit])
    return cells


def _times(measured: dict[str, Any], unit: str) -> dict[str, str]:
    """Return what every row says of its runs."""
    cells = {key: number(measured[key] * SCALES[unit]) for key in ("min", "median", "first")}
    cells["q1-q3"] = "-".join(number(measured[key] * SCALES[unit]) for key in ("q1", "q3"))
    cells["runs"] = str(measured["runs"])
    return cells


def _share(share: float) -> str:
    """Show a floor's share; a floor that took longer than the row was disturbed."""
    return f"{100 * share:.1f}%" if share <= 1 else ">100%"


def _rate(rate: float, peak: float | None) -> str:
    """Show a rate in billions, and its share of the peak if that is known."""
    share = "" if peak is None else f" ({100 * rate / peak:.0f}%)"
    return number(rate / 1e9) + share


def _peer_line(one: dict[str, Any], scale: str) -> str:
    """Return the line that spatial-correlation-sampler's benchmark prints."""
    parts = []
    for step in (step for step in ALL_PASSES if step in one):
        least, mean = (one[step][key] * SCALES[scale] for key in ("min", "mean"))
        parts.append(f"{step.capitalize()}: {least:.3f}/{mean:.3f} {scale}")
    return f"{one['name']}  {' | '.join(parts)}"


def _together(one: dict[str, Any]) -> str:
    """Return what a network's lookups take with their preparation, and what is kept for them."""
    forward, *both = (f"{1e3 * seconds:.1f} ms" for seconds in lookups(one).values())
    text = f"{one['name']}  {LOOKUPS} lookups with preparation: {forward}"
    text += "".join(f", with gradients {seconds}" for seconds in both)
    return f"{text}; prepared: {number(one['prepare']['output_bytes'] / 1e6)} MB"


def lookups(one: dict[str, Any]) -> dict[str, float]:
    """Return the least seconds of a network's lookups with their preparation, and of gradients."""
    least = {step: one[step]["min"] for step in ALL_PASSES if step in one}
    forward = least["prepare"] + LOOKUPS * least["forward"]
    if "prepare backward" not in least:
        return {TOGETHER[0]: forward}
    both = forward + LOOKUPS * least["backward"] + least["prepare backward"]
    return dict(zip(TOGETHER, (forward, both), strict=True))


def markdown(document: dict[str, Any]) -> str:
    """Return the document as a page's table: a row for each pass, a column for each of others."""
    machine = document["machine"]
    place = (
        cuda.line(document["cuda"])
        if document["device"] == "cuda"
        else f"{machine['processor']}, {document['threads']} threads"
    )
    names = dict.fromkeys(name for problem in document["problems"] for name in _timed(problem))
    ours = next((name for name in ENGINES if name in names), "")
    others = [name for name in names if name != ours]
    columns = [c for c in SHOWN if c in COLUMNS[document["device"]] and c not in LEFT_OUT]
    rows = [["case", "pass", *(f"{c} ms" if c in TIMES else c for c in columns), *others]]
    rows.append(["---"] * len(rows[0]))
    cases: dict[str, list[str]] = {text: [] for text in document["warnings"]}
    for problem in document["problems"]:
        for step, cells in _page_rows(document, problem, ours):
            known = (cells.get(title, "") for title in (*columns, *others))
            rows.append([problem["name"], step, *known])
        texts = [
            f"{one['name']}: {one['status']}: {one['reason']}"
            for one in problem["implementations"]
            if one["status"] != "timed"
        ]
        if problem["warnings"]:
            texts.append(f"quartiles are over {NOISY:.0%} of a median apart")
        for text in texts:
            cases.setdefault(text, []).append(problem["name"])
    notes = [f"- {text}" + (f" ({'; '.join(found)})" if found else "")
             for text, found in cases.items()]  # fmt: skip
    head = f"{place}; {document['dtype']}; {environment.versions(machine)}."
    head += f" Up to {columns[-1]}: {ours}." if ours else ""
    head += " Others: least time in ms, and over ours." if ours and others else ""
    table = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "", *table, *([""] if notes else []), *notes])


def _page_rows(
    document: dict[str, Any], problem: dict[str, Any], ours: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the name of each pass, and what stands in its columns."""
    timed = _timed(problem)
    least = {
        name: {step: one[step]["min"] for step in ALL_PASSES if step in one}
        | (lookups(one) if "lookup" in problem else {})
        for name, one in timed.items()
    }
    own = timed.get(ours, {})
    for step in (*ALL_PASSES, *TOGETHER):
        if not any(step in steps for steps in least.values()):
            continue
        base = least.get(ours, {}).get(step)
        cells = {} if base is None else {"min": number(1e3 * base)}
        if step in own:
            cells = _cells(document, problem, own, own, step, "ms")
        for name, steps in least.items():
            if name != ours and step in steps:
                cells[name] = number(1e3 * steps[step])
                if base is not None:
                    cells[name] += f"\N{NO-BREAK SPACE}({_digits(steps[step] / base)}x)"
        yield step, cells


def _digits(value: float) -> str:
    """Show three digits or all before the point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def number(value: float) -> str:
    """Show four digits or all before the point; three below 1."""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:#.4g}".rstrip(".") if value >= 1 else f"{value:#.3g}"
