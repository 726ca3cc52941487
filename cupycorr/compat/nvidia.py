"""The correlation layer of NVIDIA's flownet2-pytorch, and of the many programs that copied it.

There a folder ``correlation_package`` holds a CUDA extension, ``correlation_cuda``, and its torch
module, ``correlation.Correlation``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from cupycorr.compat.channels import correlate_channels
from cupycorr.geometry import Geometry
from cupycorr.layer import Layer


class Correlation(torch.nn.Module):
    """FlowNet's correlation layer as flownet2-pytorch's module.

    Parameters
    ----------
    pad_size : int, pixels, default 0
        Zeros around both maps.
    kernel_size : int, default 0
        Taps per axis. The default is the original's; it is not valid.
    max_displacement : int, pixels, default 0
        Largest displacement; output positions keep this distance from the padded border.
    stride1, stride2 : int, pixels, default 1 and 2
        Step between output positions, and between displacements.
    corr_multiply : int, default 1
        Must be 1: the original has the argument, and computes products whatever it is.

    Raises
    ------
    TypeError, ValueError
        As `Geometry.from_flownet`; ValueError also for another corr_multiply.

    Notes
    -----
    With ``radius = max_displacement // stride2`` and zeros outside the maps::

        out[n, l, h, w] = sum over c, i, j of input1[n, c, y + i, x + j]
                                              * input2[n, c, y + i + dy, x + j + dx]
                          / (kernel_size ** 2 * C)
        y = h * stride1 + max_displacement - pad_size              (x likewise, with w)
        dy = (l // (2 * radius + 1) - radius) * stride2
        dx = (l % (2 * radius + 1) - radius) * stride2
        OH = ceil((H + 2 * pad_size - 2 * (max_displacement + (kernel_size - 1) // 2)) / stride1)

    Source: A. Dosovitskiy et al., "FlowNet", ICCV 2015, section 3, and its Caffe layer. For
    kernel_size 1, FlowNet's own, flownet2-pytorch computes the same. It centres more taps on y and
    x, and its padding leaves no room for them there.
    """

    def __init__(
        self,
        pad_size: int = 0,
        kernel_size: int = 0,
        max_displacement: int = 0,
        stride1: int = 1,
        stride2: int = 2,
        corr_multiply: int = 1,
    ) -> None:
        super().__init__()
        self.pad_size = pad_size
        self.kernel_size = kernel_size
        self.max_displacement = max_displacement
        self.stride1 = stride1
        self.stride2 = stride2
        self.corr_multiply = corr_multiply
        _geometry(*self._arguments())

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Compute the cost volume of two feature maps.

        Parameters
        ----------
        input1, input2 : Tensor (N, C, H, W), float16|bfloat16|float32|float64
            The feature maps, of any strides.

        Returns
        -------
        Tensor (N, (2 * radius + 1) ** 2, OH, OW)
            The mean of the products, rows of displacements outermost.

        Raises
        ------
        TypeError, ValueError
            As `cupycorr.correlation`.
        """
        return CorrelationFunction.apply(input1, input2, *self._arguments())

    def extra_repr(self) -> str:
        """Return the parameters, without corr_multiply."""
        return (
            f"pad_size={self.pad_size}, kernel_size={self.kernel_size}, "
            f"max_displacement={self.max_displacement}, stride1={self.stride1}, "
            f"stride2={self.stride2}"
        )

    def _arguments(self) -> tuple[int, int, int, int, int, int]:
        # Read at each call, as the original does, so that modules which it saved can be loaded.
        return (
            self.pad_size,
            self.kernel_size,
            self.max_displacement,
            self.stride1,
            self.stride2,
            self.corr_multiply,
        )


class CorrelationFunction:
    """The same as flownet2-pytorch's function, in its older and in its newer form.

    ``CorrelationFunction(pad_size, ...)(input1, input2)`` is how it was called before torch 1.0,
    ``CorrelationFunction.apply(input1, input2, pad_size, ...)`` since. Arguments are those of
    `Correlation`, but the defaults differ.
    """

    def __init__(
        self,
        pad_size: int = 3,
        kernel_size: int = 3,
        max_displacement: int = 20,
        stride1: int = 1,
        stride2: int = 2,
        corr_multiply: int = 1,
    ) -> None:
        self.geometry = _geometry(
            pad_size, kernel_size, max_displacement, stride1, stride2, corr_multiply
        )

    def __call__(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Compute the cost volume; see `Correlation.forward`."""
        # For an even kernel_size the formula of OH counts one position too many: one row and one
        # column of zeros make room for it.
        if self.geometry.kernel_size[0] % 2 == 0:
            input1, input2 = (pad(fmap, (0, 1, 0, 1)) for fmap in (input1, input2))
        volume: Tensor = correlate_channels(
            input1, input2, Layer(self.geometry, normalize=True), names=("input1", "input2")
        )
        return volume

    @staticmethod
    def apply(
        input1: Tensor,
        input2: Tensor,
        pad_size: int = 3,
        kernel_size: int = 3,
        max_displacement: int = 20,
        stride1: int = 1,
        stride2: int = 2,
        corr_multiply: int = 1,
    ) -> Tensor:
        """Compute the cost volume; see `Correlation.forward`."""
        return CorrelationFunction(
            pad_size, kernel_size, max_displacement, stride1, stride2, corr_multiply
        )(input1, input2)


def _geometry(
    pad_size: int,
    kernel_size: int,
    max_displacement: int,
    stride1: int,
    stride2: int,
    corr_multiply: int,
) -> Geometry:
    if corr_multiply != 1:
        raise ValueError(f"corr_multiply must be 1, got {corr_multiply!r}")
    return Geometry.from_flownet(pad_size, kernel_size, max_displacement, stride1, stride2)
