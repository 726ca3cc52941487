"""The two functions of RAFT-Stereo's extension ``corr_sampler``, which samples a volume of rows.

RAFT-Stereo's ``CorrBlockFast1D`` calls it, with ``corr_implementation="reg_cuda"``; with this it
needs neither a compiler nor a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cupycorr.compat.blocks import coordinates
from cupycorr.lookup import Lookup
from cupycorr.volumes import volume_lookup

__all__ = ["backward", "forward"]


def forward(volume: Tensor, coords: Tensor, radius: int) -> list[Tensor]:
    """Sample a volume around coordinates.

    Parameters
    ----------
    volume : Tensor (B, H, W1, W2), float16|bfloat16|float32|float64
        The costs of each position with all those of its row.
    coords : Tensor (B, 1 or 2, H, W1), floating
        x, from 0 to W2 - 1. A second channel is not used.
    radius : int
        There are ``2 * radius + 1`` displacements.

    Returns
    -------
    [Tensor (B, 2 * radius + 1, H, W1)]
        Of the volume's dtype.

    Raises
    ------
    TypeError, ValueError
        As `cupycorr.volume_lookup`.
    """
    x = coordinates(coords[:, :1], volume)
    places = torch.cat([x, torch.zeros_like(x)], 1)
    cost: Tensor = volume_lookup(volume[..., None, :], places, Lookup((0, radius)))
    return [cost[:, 0, 0]]


def backward(volume: Tensor, coords: Tensor, corr_grad: Tensor, radius: int) -> list[Tensor]:
    """Compute the gradient with respect to the volume; corr_grad is of `forward`'s result."""
    given = volume.detach().requires_grad_()
    with torch.enable_grad():
        (cost,) = forward(given, coords.detach(), radius)
    return list(torch.autograd.grad(cost, given, corr_grad))
