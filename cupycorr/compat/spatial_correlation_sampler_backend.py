"""The two functions of spatial-correlation-sampler's extension, for a copy of its Python file.

They know nothing of autograd, and the gradients compute the cost volume once more: where the file
can be replaced as well, `cupycorr.compat.spatial_correlation_sampler` is better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cupycorr.api import correlation
from cupycorr.geometry import Geometry

__all__ = ["backward", "forward"]


def forward(input1: Tensor, input2: Tensor, *sizes: int) -> Tensor:
    """Compute the cost volume (N, PH, PW, OH, OW) of two feature maps (N, C, H, W).

    Parameters
    ----------
    input1, input2 : Tensor
    *sizes : int
        kH, kW, patchH, patchW, padH, padW, dilationH, dilationW, dilation_patchH, dilation_patchW,
        dH and dW, in this order. Older copies of the file know no dilation, and leave it out.
    """
    with torch.autocast(input1.device.type, enabled=False):
        cost: Tensor = correlation(input1.detach(), input2.detach(), _geometry(*sizes))
    return cost


def backward(input1: Tensor, input2: Tensor, grad_output: Tensor, *sizes: int) -> list[Tensor]:
    """Compute the gradients with respect to both maps; ``sizes`` are those of `forward`."""
    one, two = (fmap.detach().requires_grad_() for fmap in (input1, input2))
    with torch.enable_grad(), torch.autocast(input1.device.type, enabled=False):
        cost = correlation(one, two, _geometry(*sizes))
    return list(torch.autograd.grad(cost, (one, two), grad_output))


def _geometry(*sizes: int) -> Geometry:
    if len(sizes) == 10:
        sizes = (*sizes[:6], 1, 1, *sizes[6:])
    kernel, patch, padding, dilation, dilation_patch, stride = zip(
        sizes[::2], sizes[1::2], strict=True
    )
    return Geometry(kernel, patch, stride, padding, dilation, dilation_patch)
