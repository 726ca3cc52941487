"""The values that plans are made of: launches, workspaces, and how sizes and types are named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from cupycorr.cuda.cost import Constants
from cupycorr.geometry import Axis, Geometry
from cupycorr.layer import DTYPES

Shape = tuple[int, ...]
MAPS = frozenset({"fmap1", "fmap2", "tangent1", "tangent2"})
"""The arrays that have a map's shape (N, C, H, W) and are read."""
GRADIENTS = frozenset({"grad_fmap1", "grad_fmap2"})
"""The arrays that have a map's shape and are written."""


class Launch(NamedTuple):
    """One launch of a kernel."""

    source: str
    """The file in ``kernels/``."""
    kernel: str
    """The function in it."""
    constants: Constants
    """Types (given by name) and numbers that are compiled in."""
    blocks: int
    threads: int
    shared_bytes: int
    """Dynamic shared memory of a block."""
    arrays: tuple[str, ...]
    """The arrays that it is given, by name, the one that it writes last."""
    sizes: tuple[tuple[str, int], ...]
    """The fields of its ``Sizes`` in their order, 32-bit integers, by name."""
    scaled: bool = True
    """Whether it multiplies by the caller's scale, or by 1."""
    cycles: float | None = None
    """That the model of tiles gives it, if there is one."""


class Workspace(NamedTuple):
    """An array that launches hand to each other."""

    name: str
    shape: Shape
    dtype: str


class Plan(NamedTuple):
    """The launches that compute a result, in order."""

    launches: tuple[Launch, ...]
    workspaces: tuple[Workspace, ...]
    structs: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """The arguments that are structs of addresses, and the arrays they hold, by name."""


def volume_shape(geometry: Geometry, shape: Shape) -> Shape:
    """Return the shape of the products on the lattice: that of the cost if there is one tap."""
    samples, *patch, height, width = geometry.cost_shape(shape)
    return (samples, *patch, geometry.y.lattice_size(height), geometry.x.lattice_size(width))


class Targets(NamedTuple):
    """The positions along one axis of a map that a gradient is computed for."""

    step: int
    """Pixels between them."""
    target: int
    """Pixel of the first."""
    number: int
    phases: int
    advance: int
    first: int
    """Pixels from a target to its first source."""
    shift: int
    """Lattice index of the first target (map 1), or of its first source (map 2)."""


def targets(axis: Axis, size: int, which: int) -> Targets:
    """Return the targets that cover an axis of ``size`` pixels of map ``which``."""
    step, spacing = axis.lattice_step, axis.dilation_patch
    last = axis.first_displacement + (axis.patch_size - 1) * spacing
    origin, first = -axis.padding, axis.first_displacement
    phases, advance = axis.phases
    if which == 2:  # all positions that the patch reaches
        origin, first = origin + axis.first_displacement, -last
        step, advance = step // advance, 1
    target = origin % step
    number = max(1, -(-(size - target) // step))
    # Where sources of map 2 lie between lattice rows, the kernel looks each of them up.
    source = target if which == 1 else target + first
    shift = (source + axis.padding) // axis.lattice_step
    return Targets(step, target, number, phases, advance, first, shift)


def types(dtype: str, **more: str) -> Constants:
    """Return the kernels' names of types, those of maps and of sums first."""
    names = {"element": dtype, "accumulator": DTYPES[dtype].accumulator, **more}
    return tuple((name, DTYPES[kind].in_kernels) for name, kind in names.items())


def pairs(**pairs: tuple[int, int]) -> tuple[tuple[str, int], ...]:
    """Return two numbers for each pair (y, x), named after it and the axis."""
    return tuple(
        (f"{name}_{axis}", value)
        for name, pair in pairs.items()
        for axis, value in zip("yx", pair, strict=True)
    )


def pair(values: Iterable[int]) -> tuple[int, int]:
    """Return the two numbers of an iterable."""
    y, x = values
    return y, x
