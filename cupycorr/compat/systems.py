"""Every system's parameters, and the layer that they mean. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cupycorr.compat import flownet, taichi
from cupycorr.geometry import Axis, Geometry, IntOrPair, integer
from cupycorr.layer import Layer

REQUIRED = object()
"""Stands where a parameter has no default."""
SIMILARITIES = {"multiply": "product", "subtract": "l1", 0: "product", 1: "l1"}
"""The similarity for each correlation_type of Caffe, a name or the number of its enum."""


class System(NamedTuple):
    """How one system describes its layer."""

    defaults: Mapping[str, Any]
    """The default of each parameter; REQUIRED also where a system's own is of no use."""
    layer: Callable[..., Layer]
    """From all parameters; raises TypeError or ValueError."""
    call: str | None
    """The layer of `cupycorr.compat` on x1 and x2; {} is where the parameters go."""
    flat: bool = True
    """Whether displacements are one axis, (N, PH * PW, OH, OW), and not two."""


def mmcv_geometry(max_displacement: int, **others: IntOrPair) -> Geometry:
    """Translate mmcv's layer; see `Geometry.from_mmcv`."""
    radius = integer("max_displacement", max_displacement, least=0)
    return Geometry(patch_size=2 * radius + 1, **others)


def _cupycorr(similarity: str, normalize: bool, **parameters: Any) -> Layer:
    return Layer(Geometry(**parameters), similarity, normalize)


def _nvidia(kernel_size: int, **others: Any) -> Layer:
    geometry = flownet.geometry(kernel_size=kernel_size, **others)
    if kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size must be odd to be translated, got {kernel_size}: for an even one nvidia "
            "has an output position more than others"
        )
    return Layer(geometry, normalize=True)


def caffe(
    kernel_size: int,
    max_displacement: int,
    pad: int,
    stride_1: int,
    stride_2: int,
    correlation_type: str | int,
    single_direction: int | None = None,
) -> Layer:
    """Translate Caffe's layer for flow or, given a direction, for stereo."""
    words = pad, kernel_size, max_displacement, stride_1, stride_2
    geometry = (
        flownet.geometry(*words)
        if single_direction is None
        else flownet.stereo_geometry(*words, single_direction)
    )
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    kind = correlation_type.lower() if isinstance(correlation_type, str) else correlation_type
    if kind not in SIMILARITIES:
        raise ValueError(
            f"correlation_type must be 'multiply' or 'subtract', got {correlation_type!r}"
        )
    return Layer(geometry, SIMILARITIES[kind], normalize=True)


def pwc(intStride: int | None = None) -> Layer:
    """Translate S. Niklaus's layers: of pytorch-pwc or, given a stride, of pytorch-liteflownet."""
    if intStride is None:
        return Layer(Geometry(patch_size=9), normalize=True)
    geometry = Geometry(patch_size=7, stride=intStride, dilation_patch=intStride)
    return Layer(geometry, normalize=True)


_GEOMETRY: dict[str, Any] = dict.fromkeys(Axis._fields[:-1], 1) | {"padding": 0}
_MMCV = {name: default for name, default in _GEOMETRY.items() if name != "patch_size"}
_CAFFE = {
    "kernel_size": REQUIRED, "max_displacement": REQUIRED, "pad": 0, "stride_1": 1, "stride_2": 1,
    "correlation_type": "multiply",
}  # fmt: skip

SYSTEMS = {
    "cupycorr": System(
        _GEOMETRY | {"first_displacement": None, "similarity": "product", "normalize": False},
        _cupycorr, None, flat=False,
    ),
    "spatial-correlation-sampler": System(
        _GEOMETRY, lambda **parameters: Layer(Geometry(**parameters)),
        "spatial_correlation_sample(x1, x2, {})", flat=False,
    ),
    "nvidia": System(
        # kernel_size 0 and max_displacement 0 are the module's own.
        {"pad_size": 0, "kernel_size": 1, "max_displacement": REQUIRED, "stride1": 1, "stride2": 2},
        _nvidia, "nvidia.Correlation({})(x1, x2)",
    ),
    "caffe": System(_CAFFE, caffe, "caffe.Correlation({})(x1, x2)"),
    "caffe-1d": System(
        _CAFFE | {"single_direction": REQUIRED}, caffe, "caffe.Correlation1D({})(x1, x2)"
    ),
    "taichi": System(
        {"max_disp": REQUIRED, "dila_patch": 1},
        lambda **parameters: Layer(taichi.geometry(**parameters)), "taichi.CorrTaichi({})(x1, x2)",
    ),
    "mmcv": System(
        _MMCV | {"max_displacement": REQUIRED},
        lambda **parameters: Layer(mmcv_geometry(**parameters)),
        "mmcv.Correlation({})(x1, x2)", flat=False,
    ),
    "pytorch-pwc": System({}, pwc, "sniklaus.FunctionCorrelation(x1, x2)"),
    "pytorch-liteflownet": System(
        {"intStride": REQUIRED}, pwc, "sniklaus.FunctionCorrelation(x1, x2, {})"
    ),
}  # fmt: skip
