"""The correlation layer of mmcv.ops."""

from __future__ import annotations

import torch
from torch import Tensor

from cupycorr.api import correlate
from cupycorr.geometry import Geometry, IntOrPair
from cupycorr.layer import Layer


class Correlation(torch.nn.Module):
    """Cost volume of two feature maps, as mmcv's module.

    Parameters
    ----------
    kernel_size : int or (int, int), default 1
        Taps per axis.
    max_displacement : int, default 1
        Number of displacements to either side; the patch has ``2 * max_displacement + 1``.
    stride : int or (int, int), pixels, default 1
        Step between output positions.
    padding : int or (int, int), pixels, default 0
        Zeros around both maps.
    dilation : int or (int, int), pixels, default 1
        Spacing of the taps.
    dilation_patch : int or (int, int), pixels, default 1
        Spacing of the displacements.

    Raises
    ------
    TypeError, ValueError
        As `Geometry.from_mmcv`.

    Notes
    -----
    Definition: `Geometry`; the sums are not divided. mmcv's ``CorrelationFunction``, which its
    users do not call, has another default of padding, 1.
    """

    def __init__(
        self,
        kernel_size: IntOrPair = 1,
        max_displacement: int = 1,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        dilation_patch: IntOrPair = 1,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.max_displacement = max_displacement
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.dilation_patch = dilation_patch
        self._geometry()

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Compute the cost volume of two feature maps.

        Parameters
        ----------
        input1, input2 : Tensor (N, C, H, W), float16|bfloat16|float32|float64
            The feature maps, of any strides.

        Returns
        -------
        Tensor (N, 2 * max_displacement + 1, 2 * max_displacement + 1, OH, OW)
            As `cupycorr.spatial_correlation_sample`.

        Raises
        ------
        TypeError, ValueError
            As `cupycorr.correlation`.
        """
        cost: Tensor = correlate(
            input1, input2, Layer(self._geometry()), names=("input1", "input2")
        )
        return cost

    def extra_repr(self) -> str:
        """Return the parameters."""
        return (
            f"kernel_size={self.kernel_size}, max_displacement={self.max_displacement}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"dilation_patch={self.dilation_patch}"
        )

    def _geometry(self) -> Geometry:
        # Made at each call, so that modules which mmcv saved can be loaded.
        return Geometry.from_mmcv(
            self.kernel_size,
            self.max_displacement,
            self.stride,
            self.padding,
            self.dilation,
            self.dilation_patch,
        )
