"""The factory of correlation blocks that ptlflow's RAFT-like networks have in their ``corr.py``."""

from __future__ import annotations

from torch import Tensor

from cupycorr.compat.blocks import Block
from cupycorr.lookup import Lookup

__all__ = ["AlternateCorrBlock", "CorrBlock", "get_corr_block"]


class CorrBlock(Block):
    """The `CorrBlock` of `cupycorr.compat.raft`, which here stays in the maps' dtype.

    Parameters
    ----------
    fmap1, fmap2, num_levels, radius
        As there.
    corr_levels, corr_radius : int, optional
        The names that num_levels and radius have in some networks, which came after SEA-RAFT.
    """

    holds_products = True

    def __init__(
        self,
        fmap1: Tensor,
        fmap2: Tensor,
        num_levels: int = 4,
        radius: int = 4,
        *,
        corr_levels: int | None = None,
        corr_radius: int | None = None,
    ) -> None:
        self.num_levels = num_levels if corr_levels is None else corr_levels
        self.radius = radius if corr_radius is None else corr_radius
        super().__init__(fmap1, fmap2, Lookup(self.radius, self.num_levels, order="xy"))
        self._ones: Tensor | None = None

    def __call__(self, coords: Tensor, dilation: Tensor | None = None) -> Tensor:
        """Compute the costs around coordinates.

        Parameters
        ----------
        coords : Tensor (N, 2, H1, W1), floating
            x and y, in pixels of fmap2.
        dilation : Tensor (N, 1, H1, W1), optional
            The spacing of the displacements, in cells. Those networks pass ones, and all else is
            refused; a tensor that is passed again is looked at once.

        Returns
        -------
        Tensor (N, num_levels * (2 * radius + 1) ** 2, H1, W1)
            Sums of products by sqrt(C), of the maps' dtype.

        Raises
        ------
        TypeError, ValueError
            As `cupycorr.correlation_lookup`; ValueError also for another dilation than 1.
        """
        if dilation is not None and dilation is not self._ones:
            if not bool((dilation == 1).all()):  # synchronises
                raise ValueError("dilation must be 1 everywhere")
            self._ones = dilation
        return super().__call__(coords)


class AlternateCorrBlock(CorrBlock):
    """The same, which never makes a volume of all pairs."""

    holds_products = False


def get_corr_block(
    fmap1: Tensor,
    fmap2: Tensor,
    num_levels: int = 4,
    radius: int = 4,
    alternate_corr: bool = False,
) -> CorrBlock:
    """Return the block of a pair of maps."""
    block = AlternateCorrBlock if alternate_corr else CorrBlock
    return block(fmap1, fmap2, num_levels, radius)
