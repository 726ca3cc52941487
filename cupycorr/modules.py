"""The cost volume and the lookup as torch modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import cupycorr.torch  # noqa: F401 - registers the operators, for programs that are loaded
from cupycorr.api import correlate
from cupycorr.geometry import Axis, Geometry, IntOrPair
from cupycorr.layer import Layer
from cupycorr.lookup import Lookup
from cupycorr.sampling import correlation_lookup, pyramid

PARAMETERS = Axis._fields[:-1]
"""The parameters of the module."""


def _parameter(name: str) -> Any:
    """Return a read-only attribute of a module: what its layer computes with."""

    def get(self: SpatialCorrelationSampler) -> IntOrPair:
        y, x = getattr(self.layer.geometry, name)
        return y if y == x else (y, x)

    def refuse(self: SpatialCorrelationSampler, value: object) -> None:
        raise AttributeError(f"{name} must not be changed, got {value!r}; make another module")

    return property(get, refuse, doc=f"{name}: int or (int, int), read-only.")


class SpatialCorrelationSampler(torch.nn.Module):
    """Cost volume of two feature maps as a module without parameters.

    Takes the arguments of spatial-correlation-sampler's module of the same name, in its order.

    Parameters
    ----------
    kernel_size : int or (int, int), default 1
        Taps that are compared, per axis.
    patch_size : int or (int, int), default 1
        Number of displacements tried, per axis.
    stride : int or (int, int), pixels, default 1
        Step between output positions.
    padding : int or (int, int), pixels, default 0
        Zeros around both maps; a negative padding crops.
    dilation : int or (int, int), pixels, default 1
        Spacing of the taps.
    dilation_patch : int or (int, int), pixels, default 1
        Spacing of the displacements.

    Raises
    ------
    TypeError, ValueError
        As `Geometry`.

    Notes
    -----
    The parameters are read-only attributes, as given: an int where both axes are equal. Under
    torch.autocast the maps are cast to the dtype of the region: 16 bits in, 16 bits out, with sums
    accumulated in float32 and rounded once.
    """

    def __init__(
        self,
        kernel_size: IntOrPair = 1,
        patch_size: IntOrPair = 1,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        dilation_patch: IntOrPair = 1,
    ) -> None:
        super().__init__()
        geometry = Geometry(kernel_size, patch_size, stride, padding, dilation, dilation_patch)
        self.layer = Layer(geometry)

    @property
    def geometry(self) -> Geometry:
        """The geometry, read-only."""
        return self.layer.geometry

    kernel_size, patch_size, stride, padding, dilation, dilation_patch = map(_parameter, PARAMETERS)

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Compute the cost volume of two feature maps.

        Parameters
        ----------
        input1, input2 : Tensor (N, C, H, W), float16|bfloat16|float32|float64
            The feature maps, of any strides.

        Returns
        -------
        Tensor (N, PH, PW, OH, OW)
            As `cupycorr.spatial_correlation_sample`.

        Raises
        ------
        TypeError, ValueError
            As `cupycorr.spatial_correlation_sample`.
        """
        cost: Tensor = correlate(input1, input2, self.layer, names=("input1", "input2"))
        return cost

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickled module, spatial-correlation-sampler's as well."""
        parameters = {name: state[name] for name in PARAMETERS if name in state}
        others = {name: value for name, value in state.items() if name not in parameters}
        super().__setstate__(others)  # type: ignore[no-untyped-call]
        if "layer" not in state:
            self.layer = Layer(Geometry(**parameters))

    def extra_repr(self) -> str:
        """Return the parameters that differ from their defaults."""
        return repr(self.geometry).removeprefix("Geometry(").removesuffix(")")


class CorrelationLookup(torch.nn.Module):
    """Flow-guided lookup as a module without parameters.

    Parameters
    ----------
    radius : int or (int, int)
        The patch has ``2 * radius + 1`` displacements, per axis.
    levels : int, default 1
        Levels of the pyramid.
    dilation_patch : int or (int, int), cells, default 1
        Spacing of the displacements, on every level.
    pool : int or (int, int), cells, default 2
        Cells of a level that are averaged to one of the next.
    order : {"yx", "xy"}, default "yx"
        Which displacements come first in the cost; RAFT has "xy".
    scale : float, optional
        What costs are multiplied by; by default 1 / sqrt(C).

    Raises
    ------
    TypeError, ValueError
        As `Lookup`.

    Notes
    -----
    Under torch.autocast the maps are cast to the dtype of the region, coordinates never.

    >>> look = CorrelationLookup(radius=4, levels=4)
    >>> levels = look.pyramid(fmap2)
    >>> cost = look(fmap1, levels, coords)  # (N, 4, 9, 9, H1, W1), once per iteration
    """

    def __init__(
        self,
        radius: IntOrPair,
        levels: int = 1,
        dilation_patch: IntOrPair = 1,
        pool: IntOrPair = 2,
        order: str = "yx",
        *,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.lookup = Lookup(radius, levels, dilation_patch, pool, order)
        self.scale = scale

    def pyramid(self, fmap2: Tensor) -> tuple[Tensor, ...]:
        """Pool a map (N, C, H, W) to its levels, as `cupycorr.pyramid`."""
        return pyramid(fmap2, self.lookup)

    def forward(self, fmap1: Tensor, fmap2: Tensor | Sequence[Tensor], coords: Tensor) -> Tensor:
        """Compute the costs around coordinates.

        Parameters
        ----------
        fmap1 : Tensor (N, C, *P), float16|bfloat16|float32|float64
            Vectors at any positions P.
        fmap2 : Tensor (N, C, H, W), or the sequence of its levels
            The map that is looked up, of the same dtype.
        coords : Tensor (N, 2, *P), float32, or float64 with float64 maps
            x and y, in pixels of level 0.

        Returns
        -------
        Tensor (N, levels, PH, PW, *P), (N, levels, PW, PH, *P) in the order "xy"
            As `cupycorr.correlation_lookup`.

        Raises
        ------
        TypeError, ValueError
            As `cupycorr.correlation_lookup`.
        """
        cost: Tensor = correlation_lookup(fmap1, fmap2, coords, self.lookup, scale=self.scale)
        return cost

    def extra_repr(self) -> str:
        """Return the parameters that differ from their defaults."""
        given = repr(self.lookup).removeprefix("Lookup(").removesuffix(")")
        return given if self.scale is None else f"{given}, scale={self.scale}"
