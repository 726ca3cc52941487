"""The two functions of RAFT's extension ``alt_cuda_corr``, for programs that call it.

RAFT's ``AlternateCorrBlock`` calls it, and so do the many networks that took that over; with this
it needs neither a compiler nor a GPU, and can be trained. In place of the block,
`cupycorr.compat.raft` computes all levels in one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cupycorr.compat.blocks import coordinates
from cupycorr.lookup import Lookup
from cupycorr.sampling import correlation_lookup

__all__ = ["backward", "forward"]


def forward(fmap1: Tensor, fmap2: Tensor, coords: Tensor, radius: int) -> list[Tensor]:
    """Compute the costs around coordinates, on one level.

    Parameters
    ----------
    fmap1 : Tensor (B, H1, W1, C), float16|bfloat16|float32|float64
        Vectors of the positions.
    fmap2 : Tensor (B, H2, W2, C)
        The map that is looked up.
    coords : Tensor (B, K, H1, W1, 2), floating
        K places for each position: x and y, in pixels of fmap2.
    radius : int
        There are ``(2 * radius + 1) ** 2`` displacements.

    Returns
    -------
    [Tensor (B, K, (2 * radius + 1) ** 2, H1, W1)]
        The sums of products, which callers divide by sqrt(C); x first. Of the maps' dtype.

    Raises
    ------
    TypeError, ValueError
        As `cupycorr.correlation_lookup`.
    """
    places = coordinates(coords, fmap1).permute(0, 4, 1, 2, 3)
    vectors = fmap1.permute(0, 3, 1, 2)[:, :, None].expand(-1, -1, coords.shape[1], -1, -1)
    lookup = Lookup(radius, order="xy")
    with torch.autocast(fmap1.device.type, enabled=False):
        cost = correlation_lookup(vectors, fmap2.permute(0, 3, 1, 2), places, lookup, scale=1.0)
    return [cost.flatten(1, 3).transpose(1, 2).contiguous()]


def backward(
    fmap1: Tensor, fmap2: Tensor, coords: Tensor, corr_grad: Tensor, radius: int
) -> list[Tensor]:
    """Compute the gradients with respect to fmap1, fmap2 and coords, which are zeros as there.

    Parameters are those of `forward`; corr_grad has the shape of its result.
    """
    one, two = (fmap.detach().requires_grad_() for fmap in (fmap1, fmap2))
    with torch.enable_grad():
        (cost,) = forward(one, two, coords.detach(), radius)
    return [*torch.autograd.grad(cost, (one, two), corr_grad), torch.zeros_like(coords)]
