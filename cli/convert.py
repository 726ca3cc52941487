"""``cupycorr convert``: another system's layer in cupycorr's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from cupycorr.compat.systems import REQUIRED, SYSTEMS
from cupycorr.layer import SIMILARITIES, Layer

from .options import IntOrPairType

CHOICES = {"similarity": SIMILARITIES, "correlation_type": ("multiply", "subtract")}


def flag(parameter: str) -> str:
    """Return a parameter's option."""
    words = {"intStride": "int-stride"}.get(parameter, parameter)
    return f"--{words.replace('_', '-')}"


def _parameter_options(function: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command with an option per parameter."""
    systems: dict[str, list[str]] = {}
    for name, system in SYSTEMS.items():
        for parameter in system.defaults:
            systems.setdefault(parameter, []).append(name)
    pairs = SYSTEMS["cupycorr"].defaults
    # Each decorator puts its option in front of those before it.
    for parameter, names in reversed(systems.items()):
        options: dict[str, Any] = {"type": IntOrPairType() if parameter in pairs else int}
        options["metavar"] = "INT|Y,X" if parameter in pairs else "INT"
        if parameter in CHOICES:
            options = {"type": click.Choice(CHOICES[parameter])}
        if parameter == "normalize":
            options = {"is_flag": True, "default": None}
        text = f"A parameter of {', '.join(names)}."
        function = click.option(flag(parameter), parameter, help=text, **options)(function)
    return function


@click.command(short_help="Translate another system's layer.")
@click.option(
    "--from",
    "system",
    type=click.Choice(list(SYSTEMS)),
    help="Whose parameters these are.  [default: whose words they are]",
)
@click.option(
    "--size",
    type=click.IntRange(min=1),
    nargs=2,
    metavar="H W",
    help="Show the shape of the result for maps of this height and width.",
)
@_parameter_options
def convert(system: str | None, size: tuple[int, int] | None, **parameters: Any) -> None:
    """Translate a correlation layer's parameters, in any system's words, into cupycorr's.

    Prints the geometry and what is summed, the call that computes the layer on torch tensors x1
    and x2, and the drop-in that keeps the system's own words. The guide to migrating has a table
    for the way back.

    FlowNetC's layer, for instance: cupycorr convert --pad-size 20 --max-displacement 20 --stride2 2

    Exits with 2 if the parameters are not valid, or mean different things in different systems.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    try:
        name, layer = _recognise(given, [system] if system else list(SYSTEMS))
        shape = None if size is None else layer.geometry.cost_shape((0, 0, *size))[1:]
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    words = {p: given[p] for p in SYSTEMS[name].defaults if p in given}
    click.echo(f"{name}: {_arguments(words)}" if words else name)
    what = "absolute differences" if layer.l1 else "products"
    how = "mean" if layer.normalize else "sum"
    click.echo(f"{layer.geometry!r}, {how} of {what}\n")
    click.echo(f"from cupycorr import Geometry, correlation\n{_call(name, layer)}")
    drop_in = SYSTEMS[name].call
    if drop_in is not None:
        module, dot, _ = drop_in.partition(".")
        source = "cupycorr.compat" if dot else "cupycorr"
        line = drop_in.format(_arguments(_values(name, given)))
        click.echo(f"\nfrom {source} import {module.partition('(')[0]}\n{line}")
    if shape is not None:
        sizes = (shape[0] * shape[1], *shape[2:]) if SYSTEMS[name].flat else shape
        click.echo(f"\nshape: (N, {', '.join(map(str, sizes))})")


def _recognise(given: Mapping[str, Any], names: list[str]) -> tuple[str, Layer]:
    """Return the system whose parameters these are, and what they mean.

    Raises
    ------
    TypeError, ValueError
        If no system has them, if they are not valid, or if they mean several things.
    """
    if not given and len(names) > 1:
        raise ValueError("give a layer's parameters, or --from with a system that needs none")
    flags = " and ".join(map(flag, given))
    names = [name for name in names if given.keys() <= SYSTEMS[name].defaults.keys()]
    if not names:
        raise ValueError(f"no system has {flags} together; --help lists whose words they are")
    found: dict[str, Layer] = {}
    errors: list[TypeError | ValueError] = []
    missing = {
        name: [flag(p) for p, value in _values(name, given).items() if value is REQUIRED]
        for name in names
    }
    for name in names:
        if not missing[name]:
            try:
                found[name] = SYSTEMS[name].layer(**_values(name, given))
            except (TypeError, ValueError) as error:
                errors.append(error)
    if not found and errors:
        raise errors[0]
    if not found:
        needs = "; ".join(f"{name} needs {' and '.join(lack)}" for name, lack in missing.items())
        raise ValueError(f"more must be given than {flags or 'nothing'}: {needs}")
    if len(set(found.values())) > 1:
        raise ValueError(
            f"by {flags} {' and '.join(found)} mean different things; say whose words they are "
            "with --from"
        )
    return next(iter(found.items()))


def _values(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    return {**SYSTEMS[name].defaults, **given}


def _call(name: str, layer: Layer) -> str:
    """Return Python for a layer: its values, laid out as the system does."""
    options: dict[str, Any] = {"normalize": True} if layer.normalize else {}
    if layer.l1:
        options["similarity"] = "l1"
    words = ", ".join(filter(None, ("x1", "x2", repr(layer.geometry), _arguments(options))))
    return f"correlation({words})" + (".flatten(1, 2)" if SYSTEMS[name].flat else "")


def _arguments(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in parameters.items())
