"""A pair of maps whose costs a network looks up in each iteration, as channels of a feature map.

Blocks of RAFT-like networks are made once for a pair of maps and called with coordinates. Others
hold the products of all pairs of positions; this one holds the maps, and computes what is asked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cupycorr.lookup import Lookup
from cupycorr.sampling import correlation_lookup, pyramid


class Block:
    """The costs of a pair of maps, computed on demand.

    Parameters
    ----------
    fmap1 : Tensor (N, C, H1, W1), float16|bfloat16|float32|float64
        Vectors of the positions.
    fmap2 : Tensor (N, C, H, W)
        The map that is looked up; its levels are pooled here, once.
    lookup : Lookup
        Which displacements are compared.

    Raises
    ------
    TypeError, ValueError
        As `cupycorr.pyramid`.
    """

    def __init__(self, fmap1: Tensor, fmap2: Tensor, lookup: Lookup) -> None:
        self.fmap1, self.lookup = fmap1, lookup
        self.levels: tuple[Tensor, ...] = pyramid(fmap2, lookup)

    def __call__(self, coords: Tensor) -> Tensor:
        """Compute the costs around coordinates.

        Parameters
        ----------
        coords : Tensor (N, 2, H1, W1), floating
            x and y, in pixels of fmap2.

        Returns
        -------
        Tensor (N, levels * taps, H1, W1)
            Sums of products by sqrt(C), of the maps' dtype.

        Raises
        ------
        TypeError, ValueError
            As `cupycorr.correlation_lookup`.
        """
        coords = coordinates(coords, self.fmap1)
        cost: Tensor = correlation_lookup(self.fmap1, self.levels, coords, self.lookup)
        return cost.flatten(1, 3)


def coordinates(coords: Tensor, fmap: Tensor) -> Tensor:
    """Return coordinates in the dtype in which a map is looked up."""
    return coords.to(torch.float64 if fmap.dtype is torch.float64 else torch.float32)


def widened(cost: Tensor) -> Tensor:
    """Return costs of 16 bits in float32, as RAFT's blocks do, and others as they are."""
    return cost.float() if cost.dtype in (torch.float16, torch.bfloat16) else cost
