"""The module ``correlation`` of S. Niklaus's pytorch-pwc and pytorch-liteflownet.

His pytorch-unflow has another layer by the same names: `cupycorr.compat.nvidia.Correlation` with
``pad_size=20, kernel_size=1, max_displacement=20, stride1=1, stride2=2``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cupycorr.compat.channels import correlate_channels
from cupycorr.compat.systems import pwc

# Older names of the two maps.
_SPELLINGS = {
    "tenFirst": "tenOne",
    "tenSecond": "tenTwo",
    "tensorFirst": "tenOne",
    "tensorSecond": "tenTwo",
}


def FunctionCorrelation(*arguments: Any, **named: Any) -> Any:
    """Compute the cost volume of pytorch-pwc or, given a stride, of pytorch-liteflownet.

    The signature is ``(tenOne, tenTwo)`` or ``(tenOne, tenTwo, intStride)``; the older names
    tenFirst, tenSecond and tensorFirst, tensorSecond are understood too.

    Parameters
    ----------
    tenOne, tenTwo : array (N, C, H, W), float16|bfloat16|float32|float64
        The feature maps: NumPy or CuPy arrays or torch tensors, of any strides.
    intStride : int, pixels, optional
        Step between output positions, and between displacements.

    Returns
    -------
    array (N, 81, H, W), or (N, 49, ceil(H / intStride), ceil(W / intStride)) given a stride
        The mean over the channels of products, rows of displacements outermost.

    Raises
    ------
    TypeError, ValueError
        As `cupycorr.correlation`; TypeError also for other names of arguments, ValueError for a
        stride below 1.

    Notes
    -----
    With zeros outside the maps, and P = 9, s = 1 or P = 7, s = intStride::

        out[n, l, y, x] = sum over c of tenOne[n, c, y * s, x * s]
                                        * tenTwo[n, c, y * s + dy, x * s + dx] / C
        dy = (l // P - P // 2) * s
        dx = (l % P - P // 2) * s
    """
    return _correlation(
        *arguments, **{_SPELLINGS.get(name, name): value for name, value in named.items()}
    )


class ModuleCorrelation(torch.nn.Module):
    """`FunctionCorrelation` as a module without parameters."""

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """Compute the cost volume; see `FunctionCorrelation`."""
        volume: Tensor = FunctionCorrelation(*arguments, **named)
        return volume


def _correlation(tenOne: Any, tenTwo: Any, intStride: int | None = None) -> Any:
    return correlate_channels(tenOne, tenTwo, pwc(intStride), names=("tenOne", "tenTwo"))
