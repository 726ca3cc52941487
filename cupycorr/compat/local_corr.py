"""The functions of RoMa's local correlation: its package ``local_corr``, and what calls that.

RoMa's file ``utils/local_correlation.py`` has `local_correlation`, and the package fused-local-corr
`local_corr`. Coordinates are normalised there: -1 and 1 are the borders of a map, half a pixel
beyond its first and last position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cupycorr.compat.blocks import coordinates
from cupycorr.lookup import Lookup
from cupycorr.sampling import correlation_lookup

__all__ = ["local_corr", "local_correlation"]


def local_corr(
    im_A: Tensor,
    im_B: Tensor,
    warp: Tensor,
    mode: str = "nearest",
    normalized_coords: bool = False,
) -> Tensor:
    """Compute the costs of given points of a map, any points for each position.

    Parameters
    ----------
    im_A : Tensor (B, P, C), float16|bfloat16|float32|float64
        Vectors of P positions.
    im_B : Tensor (B, H, W, C)
        The map that is looked up.
    warp : Tensor (B, P, K, 2)
        K points for each position: x and y, from 0 to W and to H, where a pixel's centre is at a
        half.
    mode : {"nearest", "bilinear"}, default "nearest"
        "nearest" takes the pixel that a point lies in.
    normalized_coords : bool, default False
        Whether points are from -1 to 1 instead.

    Returns
    -------
    Tensor (B, P, K)
        The sums of products, of the maps' dtype; 0 outside of im_B.

    Raises
    ------
    TypeError, ValueError
        As `cupycorr.correlation_lookup`; ValueError also for another mode.

    Notes
    -----
    Gradients are those of both maps and, for "bilinear", of warp; there im_A's alone. A lookup of
    no displacement and one level: for patches, `local_correlation` reads im_B less often.
    """
    if mode not in ("nearest", "bilinear"):
        raise ValueError(f"mode must be 'nearest' or 'bilinear', got {mode!r}")
    points = coordinates(warp, im_A).unbind(-1)
    if normalized_coords:
        size = im_B.shape[2:0:-1]
        points = tuple((p + 1) * length / 2 for p, length in zip(points, size, strict=True))
    coords = torch.stack([p.floor() if mode == "nearest" else p - 0.5 for p in points], 1)
    vectors = im_A.transpose(1, 2)[..., None].expand(-1, -1, -1, warp.shape[2])
    maps = im_B.permute(0, 3, 1, 2)
    with torch.autocast(im_A.device.type, enabled=False):
        cost: Tensor = correlation_lookup(vectors, maps, coords, Lookup(0), scale=1.0)
    return cost[:, 0, 0, 0]


def local_correlation(
    feature0: Tensor,
    feature1: Tensor,
    local_radius: int,
    warp: Tensor,
    *,
    use_custom_corr: bool = True,
    padding_mode: str = "zeros",
    sample_mode: str = "bilinear",
) -> Tensor:
    """Compute the costs of the pixels around given points of a map.

    Parameters
    ----------
    feature0, feature1 : Tensor (B, C, H, W), float16|bfloat16|float32|float64
        The feature maps, of equal sizes: else RoMa's displacements are no whole pixels.
    local_radius : int, pixels
        There are ``(2 * local_radius + 1) ** 2`` displacements.
    warp : Tensor (B, 2, H, W), floating
        Where each position is believed to lie in feature1: x and y, from -1 to 1.
    use_custom_corr : bool
        Makes no difference.
    padding_mode : str
        Must be "zeros".
    sample_mode : str
        Must be "bilinear".

    Returns
    -------
    Tensor (B, (2 * local_radius + 1) ** 2, H, W)
        Sums of products by sqrt(C), rows of displacements outermost. Of feature0's dtype.

    Raises
    ------
    TypeError, ValueError
        As `cupycorr.correlation_lookup`; ValueError also for unequal sizes and for other modes.

    Notes
    -----
    As in RoMa only feature0 has a gradient.
    Source: J. Edstedt et al., "RoMa: Robust Dense Feature Matching", CVPR 2024.
    """
    for name, value, only in (
        ("padding_mode", padding_mode, "zeros"),
        ("sample_mode", sample_mode, "bilinear"),
    ):
        if value != only:
            raise ValueError(f"{name} must be {only!r}, got {value!r}")
    if feature0.shape[2:] != feature1.shape[2:]:
        raise ValueError(
            "feature0 and feature1 must have equal sizes, got "
            f"{tuple(feature0.shape)} and {tuple(feature1.shape)}"
        )
    (height, width), points = feature1.shape[2:], coordinates(warp.detach(), feature0)
    x, y = ((points[:, n] + 1) * size / 2 - 0.5 for n, size in enumerate((width, height)))
    points, maps = torch.stack([x, y], 1), feature1.detach()
    with torch.autocast(feature0.device.type, enabled=False):
        cost: Tensor = correlation_lookup(feature0, maps, points, Lookup(local_radius))
    return cost.flatten(1, 3)
