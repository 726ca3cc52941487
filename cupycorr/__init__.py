"""The correlation layer (cost volume) of optical-flow and stereo networks.

`spatial_correlation_sample` and `correlation` take NumPy and CuPy arrays and torch tensors;
`SpatialCorrelationSampler` is the torch module. Importing cupycorr loads NumPy and nothing
heavier; CuPy and torch are imported when they are first needed. `compat` has other systems' layers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from cupycorr.api import correlation, correlation_vjp, spatial_correlation_sample
from cupycorr.geometry import Geometry

if TYPE_CHECKING:
    from cupycorr import compat
    from cupycorr.modules import SpatialCorrelationSampler

__version__ = "0.1.0"
__all__ = [
    "Geometry",
    "SpatialCorrelationSampler",
    "compat",
    "correlation",
    "correlation_vjp",
    "spatial_correlation_sample",
]


def __getattr__(name: str) -> Any:
    if name == "SpatialCorrelationSampler":
        from cupycorr.modules import SpatialCorrelationSampler

        return SpatialCorrelationSampler
    if name == "compat":
        return importlib.import_module("cupycorr.compat")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
