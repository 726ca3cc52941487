"""``cupycorr convert``: one layer's parameters in the words of every system."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import click

from cupycorr.compat import vocabularies
from cupycorr.compat.vocabularies import REQUIRED, VOCABULARIES, Inexpressible, Setting

from .options import IntOrPairType

IMPORTS = (
    "from cupycorr import Geometry, correlation, spatial_correlation_sample\n"
    "from cupycorr.compat import caffe, mmcv, nvidia, sniklaus, taichi"
)
CHOICES = {"similarity": ("product", "l1"), "correlation_type": ("multiply", "subtract")}


class Row(NamedTuple):
    """A system, the Python for its layer or why there is none, and the shape of its own result."""

    system: str
    python: str
    shape: str
    possible: bool


def flag(parameter: str) -> str:
    """Return a parameter's option."""
    words = {"intStride": "int-stride"}.get(parameter, parameter)
    return f"--{words.replace('_', '-')}"


def _vocabulary_options(function: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command with an option per parameter; it gets those given as ``given``."""
    systems: dict[str, list[str]] = {}
    for system, vocabulary in VOCABULARIES.items():
        for parameter in vocabulary.defaults:
            systems.setdefault(parameter, []).append(system)
    pairs = VOCABULARIES["cupycorr"].defaults
    # Each decorator puts its option in front of those before it.
    for parameter, names in reversed(systems.items()):
        options: dict[str, Any] = {"type": IntOrPairType() if parameter in pairs else int}
        options["metavar"] = "INT|Y,X" if parameter in pairs else "INT"
        if parameter in CHOICES:
            options = {"type": click.Choice(CHOICES[parameter])}
        if parameter == "normalize":
            options = {"is_flag": True, "default": None}
        function = click.option(
            flag(parameter), parameter, help=f"Of {', '.join(names)}.", **options
        )(function)
    return function


@click.command(short_help="Translate a layer's parameters between systems.")
@click.option(
    "--from",
    "system",
    type=click.Choice(list(VOCABULARIES)),
    help="Whose parameters these are.  [default: whose words they are]",
)
@click.option(
    "--size",
    type=click.IntRange(min=1),
    nargs=2,
    metavar="H W",
    help="Show the shape of each system's result for maps of this height and width.",
)
@_vocabulary_options
def convert(system: str | None, size: tuple[int, int] | None, **parameters: Any) -> None:
    """Translate a correlation layer's parameters into the words of every system.

    Prints for each a line of Python that has the values and the shape of the given layer, on torch
    tensors x1 and x2, or a few words on why it has none. What is divided and how displacements are
    laid out differs between systems; the lines make up for it.

    FlowNetC's layer, for instance: cupycorr convert --pad-size 20 --max-displacement 20 --stride2 2

    Exits with 2 if the parameters are not valid, or mean different things in different systems.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    try:
        name, setting = _recognise(given, [system] if system else list(VOCABULARIES))
        rows = [_row(one, setting, size) for one in VOCABULARIES]
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    order = VOCABULARIES[name].defaults
    words = ", ".join(
        f"{parameter}={given[parameter]!r}" for parameter in order if parameter in given
    )
    click.echo(f"{name}: {words}" if words else name)
    click.echo(f"{_describe(setting)}\n\n{IMPORTS}\n")
    _show(rows)


def _recognise(given: Mapping[str, Any], systems: list[str]) -> tuple[str, Setting]:
    """Return the system whose parameters these are, and what they mean.

    Raises
    ------
    TypeError, ValueError
        If no system has them, if they are not valid, or if they mean several things.
    """
    if not given and len(systems) > 1:
        raise ValueError("give a layer's parameters, or --from with a system that needs none")
    flags = " and ".join(map(flag, given))
    systems = [name for name in systems if given.keys() <= VOCABULARIES[name].defaults.keys()]
    if not systems:
        raise ValueError(f"no system has {flags} together; --help lists whose words they are")
    found: dict[str, Setting] = {}
    errors: list[TypeError | ValueError] = []
    missing = {name: _missing(name, given) for name in systems}
    for name in systems:
        if not missing[name]:
            try:
                found[name] = vocabularies.read(name, given)
            except (TypeError, ValueError) as error:
                errors.append(error)
    if not found and errors:
        raise errors[0]
    if not found:
        needs = "; ".join(f"{name} needs {' and '.join(lack)}" for name, lack in missing.items())
        raise ValueError(f"more must be given than {flags or 'nothing'}: {needs}")
    meanings = {
        replace(setting.layer, geometry=vocabularies.canonical(setting.layer.geometry))
        for setting in found.values()
    }
    if len(meanings) > 1:
        raise ValueError(
            f"by {flags} {' and '.join(found)} mean different things; say whose words they are "
            "with --from"
        )
    return next(iter(found.items()))


def _missing(system: str, given: Mapping[str, Any]) -> list[str]:
    defaults = VOCABULARIES[system].defaults
    return [flag(p) for p, default in defaults.items() if default is REQUIRED and p not in given]


def _row(system: str, setting: Setting, size: tuple[int, int] | None) -> Row:
    try:
        line = vocabularies.python(system, setting)
    except Inexpressible as error:
        return Row(system, f"cannot: it {error}", "", possible=False)
    if size is None:
        return Row(system, line, "", possible=True)
    _, *sizes = vocabularies.shape(system, setting, 1, *size)
    return Row(system, line, f"(N, {', '.join(map(str, sizes))})", possible=True)


def _describe(setting: Setting) -> str:
    what = "absolute differences" if setting.layer.l1 else "products"
    how = "mean" if setting.layer.normalize else "sum"
    return f"{setting.layer.geometry!r}, {how} of {what}"


def _show(rows: list[Row]) -> None:
    """Print a table on a terminal, elsewhere a line per system."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False, markup=False)
    shapes = any(row.shape for row in rows)
    if console.is_terminal:
        table = Table("system", "Python", *(["shape"] if shapes else []), padding=(0, 1))
        for row in rows:
            cells = [row.system, row.python, row.shape]
            style = None if row.possible else "dim"
            table.add_row(*cells[: len(table.columns)], style=style)
        console.print(table)
        return
    width = max(len(row.system) for row in rows)
    for row in rows:
        shape = f"  # {row.shape}" if row.shape else ""
        click.echo(f"{row.system:<{width}}  {row.python}{shape}")
