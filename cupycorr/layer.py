"""The value that every engine takes: the layer, and the formats of its numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from cupycorr.geometry import Geometry

SIMILARITIES = ("product", "l1")


@dataclass(frozen=True)
class Layer:
    """A correlation layer: everything that a cost volume depends on except the maps.

    Parameters
    ----------
    geometry : Geometry
        Which positions and displacements are compared.
    similarity : {"product", "l1"}, default "product"
        What is summed: products, or absolute differences of maps that are 0 outside.
    normalize : bool, default False
        Whether sums are divided by the number of terms of all taps, C * KH * KW.

    Raises
    ------
    TypeError
        If geometry is no Geometry.
    ValueError
        If there is no such similarity.
    """

    geometry: Geometry
    similarity: str = "product"
    normalize: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.geometry, Geometry):
            kind = type(self.geometry).__name__
            raise TypeError(f"geometry must be a Geometry, got {kind}")
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"similarity must be 'product' or 'l1', got {self.similarity!r}")
        if isinstance(self.normalize, str):
            raise ValueError(f"normalize must be a bool or 'cosine', got {self.normalize!r}")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Of numbers alone: a pickle may be loaded by a process that hashes texts otherwise.
        return hash((self.geometry, self.l1, bool(self.normalize)))

    @property
    def l1(self) -> bool:
        """Whether absolute differences are summed."""
        return self.similarity == "l1"

    @cached_property
    def ascending(self) -> Layer:
        """The layer with `Geometry.ascending`."""
        return replace(self, geometry=self.geometry.ascending)

    def divisor(self, channels: int) -> int:
        """Return what sums over so many channels are divided by."""
        return max(1, channels) * self.geometry.taps if self.normalize else 1


class Dtype(NamedTuple):
    """A floating-point format: how numbers are stored, and in which format they are summed."""

    itemsize: int
    accumulator: str
    """Name of the dtype that sums are kept in."""
    in_kernels: str
    """Name of the type in CUDA C."""
    rounding: float
    """Largest relative error of one rounding."""
    tiny: float
    """Largest error of a rounding near 0, or the smallest normal number where that is flushed."""


DTYPES = {
    "float16": Dtype(2, "float32", "Half", 2.0**-11, 2.0**-24),
    "bfloat16": Dtype(2, "float32", "Bfloat16", 2.0**-8, 2.0**-126),
    "float32": Dtype(4, "float32", "float", 2.0**-24, 2.0**-126),
    "float64": Dtype(8, "float64", "double", 2.0**-53, 2.0**-1022),
}
"""Every format that maps may have."""
