"""The correlation block of torchvision's RAFT, which is given to the network that uses it."""

from __future__ import annotations

import torch
from torch import Tensor

from cupycorr.compat.blocks import Block
from cupycorr.lookup import Lookup


class _Block(Block):
    holds_products = True


class CorrBlock(torch.nn.Module):
    """torchvision's block, without its volume of all pairs unless that is small.

    Parameters
    ----------
    num_levels : int, default 4
        Levels of the pyramid.
    radius : int, default 4
        Each level has ``(2 * radius + 1) ** 2`` displacements; `raft_small` has 3.

    Raises
    ------
    TypeError, ValueError
        As `Lookup`.

    Notes
    -----
    Definition and channels are those of `cupycorr.compat.raft.CorrBlock`.

    >>> net = torchvision.models.optical_flow.raft_large(corr_block=CorrBlock())
    """

    def __init__(self, *, num_levels: int = 4, radius: int = 4) -> None:
        super().__init__()
        self.num_levels, self.radius = num_levels, radius
        self.lookup = Lookup(radius, num_levels, order="xy")
        self.out_channels = num_levels * (2 * radius + 1) ** 2

    def build_pyramid(self, fmap1: Tensor, fmap2: Tensor) -> None:
        """Prepare a pair of maps (B, C, H, W).

        Raises
        ------
        TypeError, ValueError
            As `cupycorr.pyramid`.
        """
        self._block = _Block(fmap1, fmap2, self.lookup)

    def index_pyramid(self, centroids_coords: Tensor) -> Tensor:
        """Compute the costs around coordinates.

        Parameters
        ----------
        centroids_coords : Tensor (B, 2, H, W), floating
            x and y, in pixels of the second map.

        Returns
        -------
        Tensor (B, out_channels, H, W)
            Of the maps' dtype.

        Raises
        ------
        TypeError, ValueError
            As `cupycorr.correlation_lookup`.
        """
        return self._block(centroids_coords)
