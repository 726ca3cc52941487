"""Other systems' correlation layers, under their own names, with cupycorr's results.

`nvidia`, `caffe`, `taichi`, `mmcv`, `sniklaus` and `gwc` hold what the systems of these names
offer: the same classes and functions, with the same arguments, defaults, shapes and divisors.
So do `raft`, `alt_cuda_corr`, `torchvision`, `ptlflow`, `raft_stereo`, `corr_sampler`, `localcorr`,
`local_corr`, `altcorr` and `droid` for lookups.
`stand_in_for` lets the ``import`` statements of a program that cannot be edited find them.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cupycorr.compat.stand_in import StandIn, stand_in_for

if TYPE_CHECKING:
    from cupycorr.compat import (
        alt_cuda_corr,
        altcorr,
        caffe,
        corr_sampler,
        droid,
        gwc,
        local_corr,
        localcorr,
        mmcv,
        nvidia,
        ptlflow,
        raft,
        raft_stereo,
        sniklaus,
        taichi,
        torchvision,
    )

__all__ = ["StandIn", "stand_in_for", "taichi"]
if find_spec("torch") is not None:
    __all__ += ["alt_cuda_corr", "altcorr", "caffe", "corr_sampler", "droid", "gwc", "local_corr"]
    __all__ += [
        "localcorr",
        "mmcv",
        "nvidia",
        "ptlflow",
        "raft",
        "raft_stereo",
        "sniklaus",
        "torchvision",
    ]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    if find_spec("torch") is None and find_spec(f"{__name__}.{name}") is not None:
        raise AttributeError(f"{name} needs torch: pip install 'cupycorr[torch]'")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
