"""The correlation blocks of RAFT, and of the many networks that took them over.

They have the names and arguments of RAFT's ``core/corr.py`` and give its channels, so weights that
were trained with it fit. The volume of all pairs is made on the CPU alone, and only if it is small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cupycorr.compat.blocks import Block, widened
from cupycorr.lookup import Lookup


class CorrBlock(Block):
    """RAFT's block, without its volume of all pairs unless that is small.

    Parameters
    ----------
    fmap1, fmap2 : Tensor (B, C, H, W), float16|bfloat16|float32|float64
        The feature maps, of any strides; fmap2 may have another size.
    num_levels : int, default 4
        Levels of the pyramid.
    radius : int, default 4
        Each level has ``(2 * radius + 1) ** 2`` displacements.

    Raises
    ------
    TypeError, ValueError
        As `cupycorr.pyramid` and `Lookup`.

    Notes
    -----
    Definition: `Lookup`, with the scale ``1 / sqrt(C)``. Channel ``(l * n + i) * n + j``, where n
    is ``2 * radius + 1``, is the cost at level l of the displacement ``(i - radius, j - radius)``
    in x and y: RAFT has x first.
    Source: Z. Teed and J. Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow",
    ECCV 2020, section 3.2.

    >>> corr_fn = CorrBlock(fmap1, fmap2, radius=4)
    >>> corr = corr_fn(coords1)  # (B, 4 * 81, H, W), once per iteration
    """

    holds_products = True

    def __init__(self, fmap1: Tensor, fmap2: Tensor, num_levels: int = 4, radius: int = 4) -> None:
        super().__init__(fmap1, fmap2, Lookup(radius, num_levels, order="xy"))
        self.num_levels, self.radius = num_levels, radius

    def __call__(self, coords: Tensor) -> Tensor:
        """Compute the costs around coordinates.

        Parameters
        ----------
        coords : Tensor (B, 2, H, W), floating
            x and y, in pixels of fmap2.

        Returns
        -------
        Tensor (B, num_levels * (2 * radius + 1) ** 2, H, W)
            In float32; in float64 for maps in float64.

        Raises
        ------
        TypeError, ValueError
            As `cupycorr.correlation_lookup`.
        """
        return widened(super().__call__(coords))


class AlternateCorrBlock(CorrBlock):
    """RAFT's block on its extension ``alt_cuda_corr``, which stays in the maps' dtype.

    The arguments and results are those of `CorrBlock`. Under torch.autocast that block computes in
    the dtype of the region, as RAFT's matrix product does; this one computes in the maps' dtype. It
    never makes a volume.
    """

    holds_products = False

    def __init__(self, fmap1: Tensor, fmap2: Tensor, num_levels: int = 4, radius: int = 4) -> None:
        with torch.autocast(fmap1.device.type, enabled=False):
            super().__init__(fmap1, fmap2, num_levels, radius)

    def __call__(self, coords: Tensor) -> Tensor:
        """Compute the costs around coordinates; see `CorrBlock`."""
        with torch.autocast(coords.device.type, enabled=False):
            return super().__call__(coords)
