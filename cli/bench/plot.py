"""The results of ``cupycorr bench`` as a picture: bars, curves of sweeps, and a roofline."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from itertools import groupby
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..environment import Unavailable, has
from ..options import shown
from .measure import ALL_PASSES, PASSES
from .report import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = Callable[["Axes"], None]
Document = dict[str, Any]
FORMATS = ("svg", "png", "pdf")
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#7F6000", "#444444")
GREY = "#777777"
APART = 0.017
"""Part of the roofline's width between two names."""
MARKERS = {"forward": "o", "backward": "^"}
DASHES: dict[str, Any] = {"matmul": "--", "copy": ":"}
WIDTH, LINE, CURVES, ROOFLINE = 11.0, 0.21, 3.4, 4.6
"""Inches: the width of the picture, and the heights of a bar, of curves and of the roofline."""
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.grid": True, "grid.color": "#e6e6e6", "axes.axisbelow": True,
    "axes.edgecolor": GREY, "axes.spines.top": False, "axes.spines.right": False,
    "figure.facecolor": "white", "svg.hashsalt": "cupycorr", "axes.titlesize": 10,
}  # fmt: skip


def require(path: Path) -> None:
    """Refuse what cannot be drawn before anything is measured.

    Raises
    ------
    Unavailable
        If matplotlib is missing.
    click.UsageError
        If the suffix is of no picture.
    """
    if not has("matplotlib"):
        raise Unavailable("--plot needs matplotlib: pip install 'cupycorr[plot]'")
    if path.suffix.lstrip(".") not in FORMATS:
        raise click.UsageError(f"--plot must end in .{', .'.join(FORMATS)}, got {path}")


def picture(document: Document, kind: str) -> bytes:
    """Draw a document of ``--json`` in a format of `FORMATS`."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        figure(document).savefig(content, format=kind, metadata=metadata, dpi=120)
    return content.getvalue()


def figure(document: Document) -> Any:
    """Lay out the panels, two in a row: each sweep, all other problems, and the roofline."""
    from matplotlib.figure import Figure

    problems = [p for p in document["problems"] if any(map(_is_timed, p["implementations"]))]
    names = dict.fromkeys(one["name"] for p in problems for one in filter(_is_timed, _rows(p)))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    panels: list[tuple[float, Panel]] = []
    plain = [problem for problem in problems if problem["sweep"] is None]
    swept = groupby(
        (problem for problem in problems if problem["sweep"] is not None),
        lambda problem: (problem["name"].partition(",")[0], problem["sweep"]["parameter"]),
    )
    if plain:
        panels += _by_pass(plain, colours, _bars, LINE)
    for _, group in swept:
        panels += _by_pass(list(group), colours, _curves, 0)
    rows = [panels[number : number + 2] for number in range(0, len(panels), 2)]
    if problems:
        rows.append([(ROOFLINE, partial(_roofline, document=document, problems=problems,
                                        colours=colours))])  # fmt: skip
    heights = [max(height for height, _ in row) for row in rows]
    drawn = Figure(figsize=(WIDTH, max(2.0, sum(heights)) + 0.9), layout="constrained")
    grid = drawn.add_gridspec(max(1, len(rows)), 2, height_ratios=heights or [1])
    for y, row in enumerate(rows):
        for x, (_, draw) in enumerate(row):
            draw(drawn.add_subplot(grid[y, x] if len(row) > 1 else grid[y, :]))
    machine = document["machine"]
    place = document["cuda"]["name"] if document["device"] == "cuda" else machine["processor"]
    threads = f", {document['threads']} threads" if document["device"] == "cpu" else ""
    drawn.suptitle(f"cupycorr {document['cupycorr']} on {place}{threads}, {document['dtype']}")
    beside = {name for problem in problems if problem["sweep"] for name in problem["floors"]}
    handles = _handles(colours, beside)
    drawn.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return drawn


def _handles(colours: dict[str, str], floors: set[str]) -> list[Any]:
    """Return what the legend explains: implementations, floors beside curves, and passes."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=colour, label=name) for name, colour in colours.items()]
    handles += [Line2D([], [], color=GREY, linestyle=dashes, label=f"{name}, least time")
                for name, dashes in DASHES.items() if name in floors]  # fmt: skip
    handles += [Line2D([], [], color=GREY, linestyle="", marker=marker, label=f"roofline: {step}")
                for step, marker in MARKERS.items()]  # fmt: skip
    return handles


def _rows(problem: Document) -> list[Document]:
    rows: list[Document] = problem["implementations"]
    return rows


def _is_timed(one: Document) -> bool:
    return bool(one["status"] == "timed")


def _by_pass(
    problems: list[Document], colours: dict[str, str], draw: Callable[..., None], line: float
) -> list[tuple[float, Panel]]:
    """Return a panel for each pass that was timed, with its height."""
    panels: list[tuple[float, Panel]] = []
    for step in ALL_PASSES:
        having = [
            (problem, rows)
            for problem in problems
            if (rows := [one for one in _rows(problem) if step in one])
        ]
        if having:
            bars = sum(len(rows) + 1 for _, rows in having)
            height = max(1.2, 0.7 + line * bars) if line else CURVES
            panels.append((height, partial(draw, having=having, step=step, colours=colours)))
    return panels


def _bars(
    axes: Axes, having: list[tuple[Document, list[Document]]], step: str, colours: dict[str, str]
) -> None:
    """Draw medians as bars, with quartiles and a number, case by case."""
    place, ticks = 0.0, []
    most = max(one[step]["q3"] for _, rows in having for one in rows)
    least = min(one[step]["q1"] for _, rows in having for one in rows)
    wide = most > 30 * least
    for problem, rows in having:
        ticks.append((place + (len(rows) - 1) / 2, problem["name"]))
        for one in rows:
            middle = 1e3 * one[step]["median"]
            ends = [1e3 * one[step]["q1"], 1e3 * one[step]["q3"]]
            axes.barh(place, middle, 0.85, color=colours[one["name"]])
            axes.plot(ends, [place] * 2, color="black", linewidth=1)
            axes.annotate(number(middle), (max(middle, ends[1]), place), (3, 0),
                          textcoords="offset points", va="center", fontsize=7)  # fmt: skip
            place += 1
        place += 1
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.set_ylim(place - 1.2, -0.8)
    axes.grid(axis="y", visible=False)
    if wide:
        _logarithmic(axes, "x")
        axes.set_xlim(1e3 * least / 2, 1e3 * most * 4)
    else:
        axes.set_xlim(0, 1e3 * most * 1.15)
    axes.set_xlabel("ms, median and quartiles" + (", logarithmic" if wide else ""))
    axes.set_title(step, loc="left")


def _curves(
    axes: Axes, having: list[tuple[Document, list[Document]]], step: str, colours: dict[str, str]
) -> None:
    """Draw medians over the values of a sweep, quartiles as bands, and the floors in grey."""
    problems = [problem for problem, _ in having]
    values = [problem["sweep"]["value"] for problem in problems]
    is_number = all(isinstance(value, int) for value in values)
    order = list(range(len(values)))
    if is_number:
        order.sort(key=lambda i: values[i])
    places = [values[i] if is_number else i for i in range(len(values))]
    for name, colour in colours.items():
        found = {
            i: one[step] for i in order for one in having[i][1] if one["name"] == name
        }  # fmt: skip
        x = [places[i] for i in found]
        low, middle, high = (
            [1e3 * timing[key] for timing in found.values()] for key in ("q1", "median", "q3")
        )
        axes.plot(x, middle, marker="o", markersize=4, color=colour)
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    for name, dashes in DASHES.items():
        floors = [problem["floors"].get(name, {}).get(step) for problem in problems]
        if None not in floors:
            x, y = [places[i] for i in order], [1e3 * floors[i]["min"] for i in order]
            axes.plot(x, y, dashes, color=GREY, linewidth=1)
    _logarithmic(axes, "y")
    if is_number and min(values) > 0 and max(values) >= 8 * min(values):
        _logarithmic(axes, "x", 2)
    axes.set_xticks(places, [shown(tuple(v) if isinstance(v, list) else v) for v in values])
    parameter = problems[0]["sweep"]["parameter"]
    axes.set_xlabel(parameter.replace("_", " "))
    axes.set_ylabel("ms, median and quartiles")
    axes.set_title(f"{problems[0]['name'].partition(',')[0]}: {step}", loc="left")


def _roofline(
    axes: Axes, document: Document, problems: list[Document], colours: dict[str, str]
) -> None:
    """Draw rates over FLOP per byte, below what the machine multiplies and moves at most."""
    points = []
    for problem in problems:
        for one in filter(_is_timed, _rows(problem)):
            for step in (step for step in PASSES if step in one):
                if None not in one[step]["shares"].values() and problem["multiply_adds"][step]:
                    flop = 2 * problem["multiply_adds"][step]
                    points.append((flop / problem["bytes"][step], flop / one[step]["min"] / 1e9,
                                   one["name"], step, problem["name"]))  # fmt: skip
    roof, slope = _roofs(document, problems)
    if not points:
        axes.set_axis_off()
        return
    ends = [min(point[0] for point in points) / 2, max(point[0] for point in points) * 2]
    if roof and slope:
        ends[1] = max(ends[1], 4 * roof / slope)
    x = sorted([*ends, *([roof / slope] if roof and slope else [])])
    if roof or slope:
        infinite = float("inf")
        y = [min(roof or infinite, (slope or infinite) * one) for one in x]
        axes.plot(x, y, color=GREY, linewidth=1.2)
    most = [f"{number(rate)} {unit}" for rate, unit in ((slope, "GB/s"), (roof, "GFLOP/s")) if rate]
    for intensity, rate, name, step, _ in points:
        axes.plot(intensity, rate, MARKERS[step], color=colours[name], markersize=5,
                  markeredgecolor="white", markeredgewidth=0.5)  # fmt: skip
    _logarithmic(axes, "x", 2)
    _logarithmic(axes, "y")
    axes.set_xlim(ends[0], ends[1])
    cores = " without tensor cores" if document["device"] == "cuda" else ""
    line = f"; the line: at most {' and '.join(most)}{cores}" if most else ""
    axes.set_xlabel(f"FLOP per byte of inputs and outputs{line}")
    axes.set_ylabel("roofline: GFLOP/s, least time")
    _name_above(axes, {point[4]: point[0] for point in reversed(points)})


def _name_above(axes: Axes, places: dict[str, float]) -> None:
    """Write names above an axes, each with a line to its place, and apart from one another."""
    left, right = (log(end) for end in axes.get_xlim())
    ordered = sorted(places, key=lambda name: places[name])
    wanted = [(log(places[name]) - left) / (right - left) for name in ordered]
    room = min(APART, 1 / max(1, len(ordered) - 1))
    written: list[float] = []
    for before, place in enumerate(wanted):
        least = written[-1] + room if written else 0
        # Those that come after need their room too.
        written.append(min(max(place, least), 1 - room * (len(wanted) - 1 - before)))
    for name, place, text in zip(ordered, wanted, written, strict=True):
        axes.plot([place, text], [1, 1.05], color=GREY, linewidth=0.6, clip_on=False,
                  transform=axes.transAxes)  # fmt: skip
        axes.annotate(name, (text, 1.06), xycoords="axes fraction", rotation=90, ha="center",
                      va="bottom", fontsize=7)  # fmt: skip


def _logarithmic(axes: Axes, which: str, base: int = 10) -> None:
    """Give an axis a logarithmic scale, with plain numbers at its steps."""
    getattr(axes, f"set_{which}scale")("log", base=base)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(lambda value, _: f"{value:g}")

    def minor(value: float, _: object) -> str:
        low, high = axis.get_view_interval()
        few = base == 10 and high < 30 * low
        return f"{value:g}" if few and f"{value:e}"[0] in "25" else ""

    axis.set_minor_formatter(minor)


def _roofs(document: Document, problems: list[Document]) -> tuple[float | None, float | None]:
    """Return the most GFLOP/s and GB/s: the floors' best rates, on CUDA the device's peaks."""
    if document["device"] == "cuda":
        peaks = document["cuda"]["peaks"]
        compute = peaks["float64" if document["dtype"] == "float64" else "float32"]
        return compute and 2 * compute / 1e9, peaks["memory"] and peaks["memory"] / 1e9
    rates = [
        max(
            factor * problem[amount][step] / problem["floors"][name][step]["min"] / 1e9
            for problem in problems
            for step in PASSES
        )
        for name, amount, factor in (("matmul", "multiply_adds", 2), ("copy", "bytes", 1))
    ]
    return rates[0], rates[1]
