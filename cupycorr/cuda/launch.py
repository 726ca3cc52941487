"""The values that plans are made of: launches, workspaces, and how sizes and types are named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from cupycorr.cuda.cost import Constants
from cupycorr.geometry import Geometry
from cupycorr.layer import DTYPES

Shape = tuple[int, ...]
MAPS = frozenset({"fmap1", "fmap2", "tangent1", "tangent2"})
"""The arrays that have a map's shape (N, C, H, W) and are read."""


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


def volume_shape(geometry: Geometry, shape: Shape) -> Shape:
    """Return the shape of the products on the lattice: that of the cost if there is one tap."""
    samples, *patch, height, width = geometry.cost_shape(shape)
    return (samples, *patch, geometry.y.lattice_size(height), geometry.x.lattice_size(width))


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
