"""The names of spatial-correlation-sampler's package, for programs that import it by its name.

They compute as `cupycorr`'s own, but under torch.autocast they stay in the maps' dtype, as there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cupycorr import api, modules

__all__ = [
    "SpatialCorrelationSampler",
    "SpatialCorrelationSamplerFunction",
    "spatial_correlation_sample",
]


def spatial_correlation_sample(input1: Tensor, input2: Tensor, *sizes: Any, **named: Any) -> Tensor:
    """Compute the cost volume; the arguments are those of `cupycorr.spatial_correlation_sample`."""
    with torch.autocast(input1.device.type, enabled=False):
        cost: Tensor = api.spatial_correlation_sample(input1, input2, *sizes, **named)
    return cost


class SpatialCorrelationSampler(modules.SpatialCorrelationSampler):
    """The module; the arguments are those of `cupycorr.SpatialCorrelationSampler`."""

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """Compute the cost volume (N, PH, PW, OH, OW) of two feature maps (N, C, H, W)."""
        with torch.autocast(input1.device.type, enabled=False):
            return super().forward(input1, input2)


class SpatialCorrelationSamplerFunction:
    """The function behind both, which there is an autograd function."""

    apply = staticmethod(spatial_correlation_sample)
