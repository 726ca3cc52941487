"""The functions of DPVO's package ``altcorr``: costs of the edges of a graph of patches.

DROID-SLAM's blocks are in `droid`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cupycorr.compat.blocks import edge_costs
from cupycorr.lookup import Lookup

__all__ = ["corr", "patchify"]


def corr(
    fmap1: Tensor,
    fmap2: Tensor,
    coords: Tensor,
    ii: Tensor,
    jj: Tensor,
    radius: int = 1,
    dropout: float = 1,
) -> Tensor:
    """Compute the costs of each edge, around coordinates in its second map.

    Parameters
    ----------
    fmap1 : Tensor (B, N1, C, *P), float16|bfloat16|float32|float64
        The patches, (3, 3) in DPVO, or maps.
    fmap2 : Tensor (B, N2, C, H, W)
        The maps that are looked up.
    coords : Tensor (B, E, 2, *P), floating
        Where each position of an edge is believed to lie: x and y, in pixels of fmap2.
    ii, jj : Tensor (E,), int32|int64
        Each edge's patch and map.
    radius : int, default 1
        There are ``2 * radius + 1`` displacements, per axis.
    dropout : float, default 1
        The share of edges that gradients are computed from, chosen by chance.

    Returns
    -------
    Tensor (B, E, 2 * radius + 1, 2 * radius + 1, *P)
        The sums of products; horizontal displacements come first. Of the maps' dtype.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cupycorr.correlation_lookup`.

    Notes
    -----
    DPVO looks its second level up at ``coords / 4``. coords have a gradient too; there they have
    none.
    Source: Z. Teed, L. Lipson and J. Deng, "Deep Patch Visual Odometry", NeurIPS 2023, section 3.
    """
    lookup = Lookup(radius, order="xy")
    cost = edge_costs(fmap1, [fmap2], coords, ii, jj, lookup, 1.0)[:, :, 0]
    if dropout < 1 and cost.requires_grad:
        kept = torch.rand(len(ii), device=cost.device) < dropout
        cost = torch.where(kept.view(-1, *(1,) * (cost.ndim - 2)), cost, cost.detach())
    return cost


def patchify(net: Tensor, coords: Tensor, radius: int, mode: str = "bilinear") -> Tensor:
    """Cut patches out of maps, around coordinates.

    Parameters
    ----------
    net : Tensor (B, C, H, W)
        The maps.
    coords : Tensor (B, M, 2), floating
        Where the patches of a map are: x and y, in pixels.
    radius : int, pixels
        Half of a patch, without its centre.
    mode : str, default "bilinear"
        "bilinear" interpolates; any other mode cuts, with one row and one column more.

    Returns
    -------
    Tensor (B, M, C, D, D)
        Zeros outside of the maps; D is ``2 * radius + 1``, without interpolation
        ``2 * radius + 2``.

    Notes
    -----
    Computed by torch's own functions; coords have no gradient.
    """
    height, width = net.shape[2:]
    floor = coords.detach().floor()
    reach = torch.arange(-radius, radius + 2, device=net.device)
    x, y = (floor[..., axis, None].long() + reach for axis in (0, 1))
    inside_x, inside_y = (x >= 0) & (x < width), (y >= 0) & (y < height)
    batch = torch.arange(len(net), device=net.device)[:, None, None, None]
    rows, columns = y.clamp(0, height - 1)[..., None], x.clamp(0, width - 1)[..., None, :]
    found = net.permute(0, 2, 3, 1)[batch, rows, columns].movedim(-1, 2)
    inside = inside_y[..., None] & inside_x[..., None, :]
    patches = torch.where(inside[:, :, None], found, found.new_zeros(()))
    if mode != "bilinear":
        return patches
    a, b = (coords.detach() - floor).to(net.dtype)[:, :, None, None, None].unbind(-1)
    patches = (1 - b) * patches[..., :-1, :] + b * patches[..., 1:, :]
    return (1 - a) * patches[..., :-1] + a * patches[..., 1:]
