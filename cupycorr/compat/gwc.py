"""The group-wise volumes of GwcNet, and of the stereo networks that took them over.

The functions have the names and arguments of GwcNet's and IGEV-Stereo's; those of FoundationStereo
are `build_gwc_volume` with ``normalize="cosine"``. Volumes of disparities run from 0 to the left:
index d compares a position x of the first map with x - d of the second.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cupycorr.api import correlation
from cupycorr.geometry import Geometry, integer

EPSILON = 1e-5
"""Is added to lengths by IGEV-Stereo."""


def groupwise_correlation(fea1: Tensor, fea2: Tensor, num_groups: int) -> Tensor:
    """Compute the mean product of every group's channels, without displacement.

    Parameters
    ----------
    fea1, fea2 : Tensor (B, C, H, W), float16|bfloat16|float32|float64
        The feature maps, of any strides.
    num_groups : int
        Groups that share the channels evenly.

    Returns
    -------
    Tensor (B, num_groups, H, W)

    Raises
    ------
    TypeError, ValueError
        As `cupycorr.correlation`.
    """
    return _volume(fea1, fea2, 1, num_groups, True)[:, :, 0]


def groupwise_correlation_norm(fea1: Tensor, fea2: Tensor, num_groups: int) -> Tensor:
    """Compute `groupwise_correlation` of groups that are divided by their length + 1e-5."""
    return groupwise_correlation(_divided(fea1, num_groups), _divided(fea2, num_groups), num_groups)


def build_gwc_volume(
    refimg_fea: Tensor,
    targetimg_fea: Tensor,
    maxdisp: int,
    num_groups: int,
    *,
    normalize: str | bool = True,
) -> Tensor:
    """Compute a group-wise volume of disparities.

    Parameters
    ----------
    refimg_fea, targetimg_fea : Tensor (B, C, H, W), float16|bfloat16|float32|float64
        The feature maps of the left and of the right image, of any strides.
    maxdisp : int, pixels
        Number of disparities.
    num_groups : int
        Groups that share the channels evenly.
    normalize : bool or "cosine", default True
        True takes the mean of a group's products, as GwcNet and IGEV-Stereo do; "cosine" divides
        each group by its length in float32 first and takes the sum, as FoundationStereo does;
        False takes the sum.

    Returns
    -------
    Tensor (B, num_groups, maxdisp, H, W)
        Of the maps' dtype.

    Raises
    ------
    TypeError, ValueError
        As `cupycorr.correlation`; ValueError also for a maxdisp below 1.

    Notes
    -----
    With G groups of K = C / G channels and zeros where x < d::

        out[b, g, d, y, x] = sum over k < K of refimg_fea[b, g * K + k, y, x]
                                               * targetimg_fea[b, g * K + k, y, x - d] / K

    Source: X. Guo et al., "Group-wise Correlation Stereo Network", CVPR 2019; for "cosine" B. Wen
    et al., "FoundationStereo", CVPR 2025.
    """
    if normalize != "cosine" or refimg_fea.dtype not in (torch.float16, torch.bfloat16):
        return _volume(refimg_fea, targetimg_fea, maxdisp, num_groups, normalize)
    with torch.autocast(refimg_fea.device.type, enabled=False):
        one, two = refimg_fea.float(), targetimg_fea.float()
        return _volume(one, two, maxdisp, num_groups, normalize).to(refimg_fea.dtype)


def build_gwc_volume_norm(
    refimg_fea: Tensor, targetimg_fea: Tensor, maxdisp: int, num_groups: int
) -> Tensor:
    """Compute `build_gwc_volume` of groups that are divided by their length + 1e-5."""
    one, two = _divided(refimg_fea, num_groups), _divided(targetimg_fea, num_groups)
    return _volume(one, two, maxdisp, num_groups, True)


def _divided(fmap: Tensor, groups: int) -> Tensor:
    samples, channels, *size = fmap.shape
    apart = fmap.reshape(samples, groups, channels // groups, *size)
    length = torch.linalg.vector_norm(apart, dim=2, keepdim=True)
    divided: Tensor = apart / (length + EPSILON)
    return divided.reshape(fmap.shape)


def _volume(one: Tensor, two: Tensor, maxdisp: int, groups: int, normalize: str | bool) -> Tensor:
    count = integer("maxdisp", maxdisp, least=1)
    geometry = Geometry(patch_size=(1, count), dilation_patch=(1, -1), first_displacement=0)
    volume: Tensor = correlation(one, two, geometry, normalize=normalize, groups=groups)
    return volume[:, :, 0]
