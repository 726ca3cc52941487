"""The words of FlowNet's correlation layer, which `nvidia` and `caffe` share.

A. Dosovitskiy et al., "FlowNet", ICCV 2015, section 3, and its Caffe layer.
"""

from __future__ import annotations

from cupycorr.geometry import Geometry, integer


def geometry(
    pad_size: int, kernel_size: int, max_displacement: int, stride1: int, stride2: int
) -> Geometry:
    """Translate the layer for flow; see `Geometry.from_flownet`.

    The first tap of output (y, x) is at ``y * stride1 + max_displacement - pad_size``: padding is
    ``pad_size - max_displacement``.
    """
    pad = integer("pad_size", pad_size)
    reach = integer("max_displacement", max_displacement, least=0)
    step = integer("stride2", stride2, least=1)
    return Geometry(
        kernel_size=integer("kernel_size", kernel_size, least=1),
        patch_size=2 * (reach // step) + 1,
        stride=integer("stride1", stride1, least=1),
        padding=pad - reach,
        dilation_patch=step,
    )


def stereo_geometry(
    pad: int,
    kernel_size: int,
    max_displacement: int,
    stride1: int,
    stride2: int,
    single_direction: int,
) -> Geometry:
    """Translate the layer for stereo; see `Geometry.from_correlation1d`."""
    single_direction = integer("single_direction", single_direction)
    if single_direction not in (-1, 0, 1):
        raise ValueError(f"single_direction must be -1, 0 or 1, got {single_direction}")
    pad = integer("pad", pad)
    flow = geometry(pad, kernel_size, max_displacement, stride1, stride2)
    radius, step = flow.patch_size[1] // 2, flow.dilation_patch[1]
    return Geometry(
        kernel_size=flow.kernel_size,
        patch_size=(1, radius + 1 if single_direction else 2 * radius + 1),
        stride=flow.stride,
        padding=(0, flow.padding[1]),
        dilation_patch=(1, step),
        first_displacement=(0, 0 if single_direction == 1 else -radius * step),
    )
