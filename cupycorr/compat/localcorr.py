"""The two factories of the package localcorr.

There ``corr_mode`` chooses one of several kernels; here any of their names gives the same.
"""

from __future__ import annotations

from torch import Tensor

from cupycorr.compat.blocks import Block
from cupycorr.geometry import integer
from cupycorr.lookup import Lookup
from cupycorr.modules import SpatialCorrelationSampler

__all__ = ["get_localcorr_block", "get_localcorr_sampler"]

MODES = tuple(f"localcorr_{name}" for name in ("triton", "cuda", "onnx", "sycl", "auto"))


def get_localcorr_block(
    fmap1: Tensor,
    fmap2: Tensor,
    num_levels: int = 4,
    radius: int = 4,
    corr_mode: str = "localcorr_triton",
    xpu_backend: str = "sycl",
) -> Block:
    """Return a block that looks up the costs of a pair of maps.

    Parameters
    ----------
    fmap1, fmap2 : Tensor (B, C, H, W), float16|bfloat16|float32|float64
        The feature maps, of any strides.
    num_levels : int, default 4
        Levels of the pyramid.
    radius : int, default 4
        Each level has ``(2 * radius + 1) ** 2`` displacements, x first.
    corr_mode : str, default "localcorr_triton"
        Any of localcorr's modes, in any case.
    xpu_backend : str
        Makes no difference.

    Returns
    -------
    Block
        Called with coords (B, 2, H, W), it returns costs (B, num_levels * (2 * radius + 1) ** 2, H,
        W): sums of products by sqrt(C), of the maps' dtype.

    Raises
    ------
    TypeError, ValueError
        As `cupycorr.pyramid` and `Lookup`; ValueError also for another corr_mode.
    """
    _check(corr_mode)
    return Block(fmap1, fmap2, Lookup(radius, num_levels, order="xy"))


def get_localcorr_sampler(
    patch_size: int = 9,
    dilation_patch: int = 1,
    corr_mode: str = "localcorr_triton",
    xpu_backend: str = "sycl",
) -> SpatialCorrelationSampler:
    """Return a module that computes cost volumes.

    Parameters
    ----------
    patch_size : int, default 9
        Number of displacements, per axis; odd, as there an even one gives one more than it says.
    dilation_patch : int, pixels, default 1
        Spacing of the displacements.
    corr_mode, xpu_backend
        As `get_localcorr_block`.

    Returns
    -------
    SpatialCorrelationSampler
        Called with two maps (B, C, H, W), it returns (B, patch_size, patch_size, H, W).

    Raises
    ------
    TypeError, ValueError
        As `Geometry`; ValueError also for an even patch_size, and for another corr_mode.
    """
    _check(corr_mode)
    if integer("patch_size", patch_size, least=1) % 2 == 0:
        raise ValueError(f"patch_size must be odd, got {patch_size}")
    return SpatialCorrelationSampler(patch_size=patch_size, dilation_patch=dilation_patch)


def _check(corr_mode: str) -> None:
    if corr_mode.lower() not in MODES:
        raise ValueError(f"corr_mode must be one of {', '.join(MODES)}, got {corr_mode!r}")
