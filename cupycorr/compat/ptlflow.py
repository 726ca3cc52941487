"""The factory of correlation blocks that ptlflow's RAFT-like networks have in their ``corr.py``."""

from __future__ import annotations

from torch import Tensor

from cupycorr.compat.blocks import Block
from cupycorr.lookup import Lookup

__all__ = ["AlternateCorrBlock", "CorrBlock", "get_corr_block"]


class CorrBlock(Block):
    """The block of `cupycorr.compat.raft`, which here stays in the maps' dtype.

    Parameters
    ----------
    fmap1, fmap2, num_levels, radius
        As there.
    """

    def __init__(self, fmap1: Tensor, fmap2: Tensor, num_levels: int = 4, radius: int = 4) -> None:
        super().__init__(fmap1, fmap2, Lookup(radius, num_levels, order="xy"))
        self.num_levels, self.radius = num_levels, radius


AlternateCorrBlock = CorrBlock


def get_corr_block(
    fmap1: Tensor,
    fmap2: Tensor,
    num_levels: int = 4,
    radius: int = 4,
    alternate_corr: bool = False,
) -> CorrBlock:
    """Return the block of a pair of maps; alternate_corr makes no difference."""
    return CorrBlock(fmap1, fmap2, num_levels, radius)
