"""The correlation layer (cost volume) of optical-flow and stereo networks.

`spatial_correlation_sample` and `correlation` take NumPy and CuPy arrays and torch tensors;
`SpatialCorrelationSampler` is the torch module. Importing cupycorr loads NumPy and nothing
heavier; CuPy and torch are imported when they are first needed. `compat` has other systems' layers.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cupycorr.api import correlation, correlation_vjp, spatial_correlation_sample
from cupycorr.geometry import Geometry
from cupycorr.lookup import Lookup
from cupycorr.sampling import correlation_lookup, correlation_lookup_vjp, pyramid
from cupycorr.volumes import volume_lookup, volume_lookup_vjp, volume_pyramid

if TYPE_CHECKING:
    from cupycorr import compat
    from cupycorr.modules import CorrelationLookup, SpatialCorrelationSampler

__version__ = "0.2.0"
if not Path(__file__).with_name("cli").is_dir():
    # In a clone, the packages cli and kernels lie beside this one.
    __path__.append(str(Path(__file__).parents[1]))
__all__ = [
    "Geometry",
    "Lookup",
    "compat",
    "correlation",
    "correlation_lookup",
    "correlation_lookup_vjp",
    "correlation_vjp",
    "pyramid",
    "spatial_correlation_sample",
    "volume_lookup",
    "volume_lookup_vjp",
    "volume_pyramid",
]
if importlib.util.find_spec("torch") is not None:
    __all__ += ["CorrelationLookup", "SpatialCorrelationSampler"]


def __getattr__(name: str) -> Any:
    if name in ("CorrelationLookup", "SpatialCorrelationSampler"):
        try:
            from cupycorr import modules
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            # An AttributeError, as for any name that is not there: hasattr and help expect it.
            raise AttributeError(f"{name} needs torch: pip install 'cupycorr[torch]'") from error
        return getattr(modules, name)
    if name == "compat":
        return importlib.import_module("cupycorr.compat")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
