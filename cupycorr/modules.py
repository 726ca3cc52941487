"""The cost volume as a torch module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import cupycorr.torch  # noqa: F401 - registers the operators, for programs that are loaded
from cupycorr.api import correlate
from cupycorr.geometry import Axis, Geometry, IntOrPair
from cupycorr.layer import Layer

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
