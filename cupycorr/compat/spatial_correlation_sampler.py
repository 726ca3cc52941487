"""The names of spatial-correlation-sampler's package, for programs that import it by its name."""

from cupycorr.api import spatial_correlation_sample
from cupycorr.modules import SpatialCorrelationSampler

__all__ = [
    "SpatialCorrelationSampler",
    "SpatialCorrelationSamplerFunction",
    "spatial_correlation_sample",
]


class SpatialCorrelationSamplerFunction:
    """The function behind both, which there is an autograd function."""

    apply = staticmethod(spatial_correlation_sample)
