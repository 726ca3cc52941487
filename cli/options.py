"""The options that describe a problem: the shape of the maps and the geometry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import update_wrapper
from typing import Any, NamedTuple

import click
from click.core import ParameterSource

from cupycorr import Geometry
from cupycorr.geometry import IntOrPair
from cupycorr.layer import DTYPES as ALL
from cupycorr.layer import SIMILARITIES, Layer
from cupycorr.lookup import ORDERS, Lookup

# The spellings of spatial-correlation-sampler.
DTYPES = dict(zip(("half", "bfloat", "float", "double"), ALL, strict=True))
# The engines of each device; the first is the default, the others as each command says.
ENGINES = {"cpu": ("numpy", "torch"), "cuda": ("cupy", "plain", "torch")}

# Option names and their order are those of spatial-correlation-sampler's two programs; the second
# column is the name in `Geometry`, or None for a size of the maps.
SIZES = {
    "batch_size": (("-b", "--batch-size"), None, "Pairs of maps."),
    "kernel_size": (("-k", "--kernel-size"), "kernel_size", "Taps, per axis."),
    "patch": (("--patch", "--patch-size"), "patch_size", "Number of displacements."),
    "patch_dilation": (
        ("--patch_dilation", "--patch-dilation"),
        "dilation_patch",
        "Spacing of the displacements.",
    ),
    "channel": (("-c", "--channel"), None, "Channels of the maps."),
    "height": (("--height",), None, "Height of the maps."),
    "width": (("-w", "--width"), None, "Width of the maps."),
    "stride": (("-s", "--stride"), "stride", "Step between output positions."),
    "pad": (("-p", "--pad"), "padding", "Zeros around the maps; crops if negative."),
    "dilation": (("--dilation",), "dilation", "Spacing of the taps."),
    "first_displacement": (
        ("--first-displacement",),
        "first_displacement",
        "Smallest displacement; centres the patch if not given.",
    ),
}
GEOMETRY_FIELDS = {name: field for name, (_, field, _) in SIZES.items() if field is not None}
# Names in `Lookup`.
LOOKUP = {
    "radius": "The flow-guided lookup in place of the cost volume: displacements on either side.",
    "levels": "Levels of the lookup's pyramid.  [default: 1]",
    "pool": "Cells that are averaged to one of the next level.  [default: 2]",
    "order": "Which displacements of a lookup come first.  [default: yx]",
}
SIZE = "size"
"""Height and width together, as a sweep's parameter."""
Value = IntOrPair | str | None


class Problem(NamedTuple):
    """A problem: its name, the maps' shape (N, C, H, W), and the layer."""

    name: str
    shape: tuple[int, int, int, int]
    layer: Layer
    channels_last: bool = False
    """Whether the maps lie in memory as (N, H, W, C)."""
    swept: tuple[str, IntOrPair | str] | None = None
    """The parameter that a sweep varies, and its value here."""

    @property
    def cost_shape(self) -> tuple[int, ...]:
        """The shape of the cost volume."""
        return self.layer.geometry.cost_shape(self.shape)


class LookupProblem(NamedTuple):
    """A problem of the lookup: its name, the maps' shape (N, C, H, W), and what is looked up."""

    name: str
    shape: tuple[int, int, int, int]
    lookup: Lookup
    channels_last: bool = False
    """Whether the maps lie in memory as (N, H, W, C)."""
    swept: tuple[str, IntOrPair | str] | None = None
    """The parameter that a sweep varies, and its value here."""

    @property
    def cost_shape(self) -> tuple[int, ...]:
        """The shape of the costs."""
        return self.lookup.cost_shape(self.shape, (self.shape[0], 2, *self.shape[2:]))


def description(problem: Problem | LookupProblem) -> str:
    """Return what is computed in words of Python, and what is not as usual."""
    if isinstance(problem, LookupProblem):
        what, l1 = repr(problem.lookup), False
    else:
        what, l1 = repr(problem.layer.geometry), problem.layer.l1
    unusual = {"l1": l1, "channels last": problem.channels_last}
    return ", ".join([what, *(name for name in unusual if unusual[name])])


def described(problem: Problem | LookupProblem, *others: Problem | LookupProblem) -> str:
    """Return the name and the sizes, for a message about what is measured together."""
    what = "costs" if isinstance(problem, LookupProblem) else "a cost volume"
    more = f", and {len(others)} more," if others else ""
    return f"{problem.name}: maps {problem.shape} with {what} of {problem.cost_shape}{more}"


class Sizes(NamedTuple):
    """The values of the options, and which of them the user gave."""

    values: dict[str, Value]
    given: frozenset[str]
    similarity: str = "product"

    def problem(
        self, name: str, preset: Mapping[str, IntOrPair | str] | None = None
    ) -> Problem | LookupProblem:
        """Build the problem of the options, or of a preset with what the user gave on top.

        Raises
        ------
        click.UsageError
            If the geometry or the lookup is not valid, the taps do not fit, a level has no cell,
            or an option is of the other kind.
        """
        values: dict[str, Any] = dict(self.values)
        if preset is not None:
            neutral = {"pad": 0, "first_displacement": None}
            values = {option: neutral.get(option, 1) for option in SIZES} | dict(preset)
            values |= {option: self.values[option] for option in self.given}
        shape = (values["batch_size"], values["channel"], values["height"], values["width"])
        is_lookup = values.get("radius") is not None
        self._refuse(name, is_lookup)
        try:
            if is_lookup:
                fields = {option: values.get(option) for option in LOOKUP}
                if "patch_dilation" in self.given:
                    fields["dilation_patch"] = values["patch_dilation"]
                lookup = Lookup(**{f: value for f, value in fields.items() if value is not None})
                lookup.level_sizes(*shape[2:])
                return LookupProblem(name, shape, lookup)
            geometry = Geometry(**{f: values[option] for option, f in GEOMETRY_FIELDS.items()})
            geometry.cost_shape(shape)
        except (TypeError, ValueError) as error:
            raise click.UsageError(f"{name}: {error}") from None
        return Problem(name, shape, Layer(geometry, self.similarity))

    def _refuse(self, name: str, is_lookup: bool) -> None:
        """Refuse options that say nothing about a problem of this kind."""
        shared = {"patch_dilation"}
        wrong = [
            option
            for option in self.given
            if option in (GEOMETRY_FIELDS.keys() - shared if is_lookup else LOOKUP)
        ]
        if is_lookup and self.similarity != "product":
            wrong.append("similarity")
        for option in sorted(wrong):
            flag = SIZES[option][0][-1] if option in SIZES else f"--{option}"
            kind = "the cost volume, not for the lookup" if is_lookup else "the lookup: --radius"
            raise click.UsageError(f"{name}: {flag} is for {kind}")


def shown(value: IntOrPair | str) -> str:
    """Return a value as ``--sweep`` takes it."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


class Sweep(NamedTuple):
    """An option of `SIZES` or `LOOKUP`, or `SIZE`, and the values that it takes in turn."""

    name: str
    values: tuple[IntOrPair | str, ...]

    def applied(self, sizes: Sizes, value: IntOrPair | str) -> Sizes:
        """Return sizes as if the user had given this value."""
        names = ("height", "width") if self.name == SIZE else (self.name,)
        parts = value if self.name == SIZE and isinstance(value, tuple) else (value,) * 2
        given: dict[str, Value] = dict(zip(names, parts, strict=False))
        return sizes._replace(values=sizes.values | given, given=sizes.given | given.keys())


class IntOrPairType(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """An int, or two ints for the vertical and the horizontal axis: ``Y,X``."""

    name = "int or y,x"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> IntOrPair:
        """Convert text; numbers pass."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        try:
            numbers = [int(part) for part in value.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2):
            self.fail(f"{value!r} is neither an int nor two ints as in 3,5.", param, ctx)
        return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def problem_options(
    defaults: Mapping[str, IntOrPair | str], flags: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command with the options of `SIZES` and `LOOKUP`; it gets them as ``sizes``.

    Parameters
    ----------
    defaults : mapping
        Default per option of `SIZES`.
    flags : mapping, optional
        A further flag for some options.
    """
    flags = {} if flags is None else flags

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def collect(*args: Any, **kwargs: Any) -> None:
            context = click.get_current_context()
            values = {name: kwargs.pop(name) for name in (*SIZES, *LOOKUP)}
            given = frozenset(
                name
                for name in values
                if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
            )
            sizes = Sizes(values, given, kwargs.pop("similarity"))
            function(*args, sizes=sizes, **kwargs)

        wrapped: Callable[..., None] = update_wrapper(collect, function)
        wrapped = click.option(
            "--similarity",
            type=click.Choice(SIMILARITIES),
            default="product",
            show_default=True,
            help="What is summed: products, or absolute differences.",
        )(wrapped)
        # Each decorator puts its option in front of those before it.
        kinds: dict[str, Any] = {
            "levels": click.IntRange(min=1),
            "order": click.Choice(ORDERS),
        }
        for name, text in reversed(LOOKUP.items()):
            kind = kinds.get(name, IntOrPairType())
            metavar = {"levels": "INT", "order": None}.get(name, "INT|Y,X")
            wrapped = click.option(f"--{name}", type=kind, metavar=metavar, help=text)(wrapped)
        for name, (names, field, text) in reversed(SIZES.items()):
            more = (flags[name],) if name in flags else ()
            wrapped = click.option(
                *more,
                *names,
                name,
                type=click.IntRange(min=0) if field is None else IntOrPairType(),
                default=defaults.get(name),
                show_default=name in defaults,
                metavar="INT" if field is None else "INT|Y,X",
                help=text,
            )(wrapped)
        return wrapped

    return decorate


def sweep_option(function: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command of `problem_options` with ``--sweep``; it gets a `Sweep` or None."""
    return click.option(
        "--sweep",
        callback=_sweep,
        metavar="NAME=V1,V2,...",
        help="Measure the problem with each value of an option above (patch, stride, radius, ...) "
        "or of size (height x width), all in turns; pairs are written as 1x9.",
    )(function)


def _sweep(ctx: click.Context, param: click.Parameter, text: str | None) -> Sweep | None:
    if text is None:
        return None
    flag, _, values = text.lstrip("-").partition("=")
    options = {
        flag.lstrip("-"): option
        for option in ctx.command.params
        if option.name in (*SIZES, *LOOKUP)
        for flag in option.opts
    }
    if flag != SIZE and flag not in options:
        raise click.BadParameter(
            f"{flag!r} is not one of {', '.join((*options, SIZE))}", ctx, param
        )
    option = options.get(flag, param)
    kind = option.type if flag in options else IntOrPairType()
    parts = [part.replace("x", ",") if isinstance(kind, IntOrPairType) else part
             for part in values.split(",")]  # fmt: skip
    converted = tuple(dict.fromkeys(kind.convert(part, param, ctx) for part in parts))
    name = SIZE if flag == SIZE else str(option.name)
    return Sweep(name, converted)


def layout_option(function: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command with ``--channels-last``."""
    return click.option(
        "--channels-last", is_flag=True, help="Maps lie in memory as (N, H, W, C)."
    )(function)


def device_argument(function: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command with the argument ``{cpu,cuda}``."""
    return click.argument("device", type=click.Choice(list(ENGINES)))(function)


def engine_option(text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command with ``--engine``; it gets the names as ``engines``."""
    names = list(dict.fromkeys(name for engines in ENGINES.values() for name in engines))
    return click.option(
        "--engine", "engines", multiple=True, type=click.Choice(names), help=text
    )  # fmt: skip


def refuse_engines(device: str, engines: tuple[str, ...]) -> None:
    """Refuse engines that do not compute on a device.

    Raises
    ------
    click.UsageError
        If there is one.
    """
    for name in engines:
        if name not in ENGINES[device]:
            allowed = " or ".join(ENGINES[device])
            raise click.UsageError(f"--engine on {device} must be {allowed}, got {name}")
