"""``cupycorr bench compare``: what became slower between two runs, beyond their noise."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

from .measure import ALL_PASSES
from .report import SCHEMA, number

LEAST_RUNS = 10
"""Runs of a row from which on its quartiles say how much it varies."""
SAME = (
    "device", "dtype", "threads", "cold", "flow", "input", "machine.processor", "machine.cores",
    "machine.system", "cuda.name",
)  # fmt: skip
"""What two documents must have in common."""
COLOURS = {"slower": "red", "failed": "red", "wrong": "red", "faster": "green"}
WORSE = ("slower", "failed", "wrong")


class Row(NamedTuple):
    """A pass of an implementation in two documents: a line, what it tells, and whether it counts.

    A floor does not count: it tells whether the machine is as it was.
    """

    cells: tuple[str, ...]
    verdict: str
    is_floor: bool = False
    reason: str = ""


@click.command(short_help="Tell what became slower from noise.")
@click.argument("a", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("b", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--anyway", is_flag=True, help="Compare runs of other machines, settings and schemas too."
)
def compare(a: Path, b: Path, anyway: bool) -> None:
    """Compare two documents of --json, A before and B after a change.

    A row is slower if three quarters of its runs in B took longer than three quarters of those in
    A (its lower quartile is above the upper one), and its least time is longer too; faster is the
    reverse. Both need 10 runs. All else is noise, "same". Floors, in brackets, tell whether the
    machine is as it was.

    Exits with 1 if a row is slower, or is wrong or fails in B alone; with 2 if the documents
    cannot be compared.
    """
    documents = read(a), read(b)
    _refuse(documents, (a, b), anyway)
    with complete():
        rows = list(_rows(*documents))
    if not rows:
        raise click.UsageError("the documents have no row in common")
    _show(rows)
    if any(row.verdict in WORSE for row in rows if not row.is_floor):
        raise click.exceptions.Exit(1)


def read(path: Path) -> dict[str, Any]:
    """Return a document of --json.

    Raises
    ------
    click.UsageError
        If the file has none.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{path} is no JSON document: {error}") from None
    if not isinstance(document, dict) or "problems" not in document:
        raise click.UsageError(f"{path} is no document of cupycorr bench --json")
    return document


@contextlib.contextmanager
def complete() -> Iterator[None]:
    """Refuse documents that lack what is read here."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise click.UsageError(f"a document lacks a field of schema {SCHEMA}: {error}") from None


def other_schema(document: dict[str, Any], path: Path) -> str | None:
    """Say which schema a document has, unless it is the one of this cupycorr."""
    if document.get("schema") == SCHEMA:
        return None
    return f"{path} has schema {document.get('schema')}, this cupycorr reads {SCHEMA}"


def _refuse(documents: tuple[dict[str, Any], ...], paths: tuple[Path, ...], anyway: bool) -> None:
    """Refuse documents that do not tell of the same machine and settings."""
    differences = [*filter(None, map(other_schema, documents, paths))]
    for field in SAME:
        one, two = (_value(document, field) for document in documents)
        if one != two:
            differences.append(f"{field} is {one} in A and {two} in B")
    if not differences:
        return
    if not anyway:
        raise click.UsageError(f"{'; '.join(differences)} (--anyway compares them)")
    for text in differences:
        click.echo(f"Warning: {text}", err=True)


def _value(document: dict[str, Any], field: str) -> Any:
    value: Any = document
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _rows(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Row]:
    """Yield all rows that both documents have, in the order of the first."""
    others = {_key(problem): problem for problem in after["problems"]}
    for problem in before["problems"]:
        other = others.get(_key(problem))
        if other is None:
            continue
        found = {one["name"]: one for one in other["implementations"]}
        for one in problem["implementations"]:
            two, title = found.get(one["name"]), (problem["name"], one["name"])
            if two is None or one["status"] != "timed":
                continue
            if two["status"] != "timed":
                blank = ("",) * 5
                yield Row((*title, *blank), two["status"], reason=two["reason"])
            else:
                yield from _passes(title, one, two, False)
        for name, floor in problem["floors"].items():
            title = problem["name"], f"({name})"
            yield from _passes(title, floor, other["floors"].get(name, {}), True)


def _key(problem: dict[str, Any]) -> str:
    """Return what is equal for equal problems."""
    fields = ("name", "shape", "geometry", "similarity", "lookup", "channels_last")
    return json.dumps([problem.get(field) for field in fields], sort_keys=True)


def _passes(
    title: tuple[str, str], one: dict[str, Any], two: dict[str, Any], is_floor: bool
) -> Iterator[Row]:
    for step in ALL_PASSES:
        if step in one and step in two:
            a, b = one[step], two[step]
            noise = max((timing["q3"] - timing["q1"]) / timing["median"] for timing in (a, b))
            times = (number(1e3 * timing["median"]) for timing in (a, b))
            ratio = f"{b['median'] / a['median']:.3f}"
            yield Row((*title, step, *times, ratio, f"{noise:.1%}"), verdict(a, b), is_floor)


def verdict(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Tell whether timings differ by more than noise.

    Parameters
    ----------
    a, b : dict
        A pass before and after, as `report.statistics` describes it.

    Returns
    -------
    {"slower", "faster", "same", "few runs"}
    """
    if min(a["runs"], b["runs"]) < LEAST_RUNS:
        return "few runs"
    if b["q1"] > a["q3"] and b["min"] > a["min"]:
        return "slower"
    if b["q3"] < a["q1"] and b["min"] < a["min"]:
        return "faster"
    return "same"


def _show(rows: list[Row]) -> None:
    """Print a line for each row, and how many rows have which verdict."""
    titles = ("case", "implementation", "pass", "A ms", "B ms", "B / A", "noise")
    lines = [(titles, "", ""), *((r.cells, r.verdict, r.reason) for r in rows)]
    widths = [max(map(len, column)) for column in zip(*(line[0] for line in lines), strict=True)]
    for cells, text, reason in lines:
        words = [cell.ljust(w) for cell, w in zip(cells[:3], widths[:3], strict=True)]
        words += [cell.rjust(w) for cell, w in zip(cells[3:], widths[3:], strict=True)]
        words.append(click.style(text, fg=COLOURS[text]) if text in COLOURS else text)
        click.echo("  ".join([*words, reason]).rstrip())
    if any(row.is_floor and row.verdict in COLOURS for row in rows):
        click.secho("Warning: floors differ too: the machine is not as it was.", fg="yellow")
    verdicts = [row.verdict for row in rows if not row.is_floor]
    counts = (f"{verdicts.count(text)} {text}" for text in dict.fromkeys(verdicts))
    click.echo(f"{', '.join(counts)}.")
