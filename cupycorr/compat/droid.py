"""The correlation blocks of DROID-SLAM, which compare the edges of a graph of frames.

They have the names and arguments of DROID-SLAM's ``modules/corr.py`` and give its channels. No edge
has a volume: memory grows with the maps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cupycorr.compat.blocks import Block, edge_costs, widened
from cupycorr.lookup import Lookup
from cupycorr.sampling import pyramid

SCALE = 1 / 16
"""DROID-SLAM divides both maps by 4."""


class CorrBlock(Block):
    """DROID-SLAM's block, without its volumes of all pairs.

    Parameters
    ----------
    fmap1, fmap2 : Tensor (B, E, C, H, W), float16|bfloat16|float32|float64
        The two maps of each edge.
    num_levels : int, default 4
        Levels of the pyramid.
    radius : int, default 3
        Each level has ``(2 * radius + 1) ** 2`` displacements.

    Raises
    ------
    TypeError, ValueError
        As `cupycorr.pyramid` and `Lookup`.

    Notes
    -----
    Definition: `Lookup`, with the scale 1 / 16 whatever C is; horizontal displacements come first.
    Source: Z. Teed and J. Deng, "DROID-SLAM", NeurIPS 2021, section 3.1.

    >>> corr = CorrBlock(fmap1, fmap2).cat(CorrBlock(fmap3, fmap4))
    >>> corr(coords)  # (B, E, 4 * 49, H, W)
    """

    def __init__(self, fmap1: Tensor, fmap2: Tensor, num_levels: int = 4, radius: int = 3) -> None:
        lookup = Lookup(radius, num_levels, order="xy")
        super().__init__(fmap1.flatten(0, 1), fmap2.flatten(0, 1), lookup, SCALE)
        self.num_levels, self.radius = num_levels, radius

    def __call__(self, coords: Tensor) -> Tensor:
        """Compute the costs around coordinates.

        Parameters
        ----------
        coords : Tensor (B, E, H, W, 2), floating
            x and y, in pixels of the second maps.

        Returns
        -------
        Tensor (B, E, num_levels * (2 * radius + 1) ** 2, H, W)
            In the maps' dtype.

        Raises
        ------
        TypeError, ValueError
            As `cupycorr.correlation_lookup`.
        """
        cost = super().__call__(coords.flatten(0, 1).movedim(-1, 1))
        return cost.reshape(*coords.shape[:2], *cost.shape[1:])

    def cat(self, other: CorrBlock) -> CorrBlock:
        """Append the edges of another block; return this one."""
        self.fmap1 = torch.cat([self.fmap1, other.fmap1])
        self.levels = tuple(map(torch.cat, zip(self.levels, other.levels, strict=True)))
        return self

    def __getitem__(self, index: Tensor | slice) -> CorrBlock:
        """Keep the edges that an index or a mask (B * E,) selects; return this block."""
        self.fmap1 = self.fmap1[index]
        self.levels = tuple(level[index] for level in self.levels)
        return self


class AltCorrBlock:
    """DROID-SLAM's block of less memory, which is told the edges with the coordinates.

    Parameters
    ----------
    fmaps : Tensor (B, N, C, H, W), float16|bfloat16|float32|float64
        The maps of all frames.
    num_levels, radius
        As `CorrBlock`.

    Raises
    ------
    TypeError, ValueError
        As `cupycorr.pyramid` and `Lookup`.
    """

    def __init__(self, fmaps: Tensor, num_levels: int = 4, radius: int = 3) -> None:
        self.num_levels, self.radius = num_levels, radius
        self.lookup = Lookup(radius, num_levels, order="xy")
        with torch.autocast(fmaps.device.type, enabled=False):
            levels = pyramid(fmaps.flatten(0, 1), self.lookup)
        frames = fmaps.shape[:2]
        self.levels = [level.view(*frames, *level.shape[1:]) for level in levels]

    def __call__(self, coords: Tensor, ii: Tensor, jj: Tensor) -> Tensor:
        """Compute the costs of each edge, around coordinates in its second map.

        Parameters
        ----------
        coords : Tensor (B, E, H, W, 2), floating
            x and y, in pixels of the second maps.
        ii, jj : Tensor (E,), int32|int64
            Each edge's first and second map.

        Returns
        -------
        Tensor (B, E, num_levels * (2 * radius + 1) ** 2, H, W)
            In float32, whatever the dtype of the region; in float64 for maps in float64.

        Raises
        ------
        TypeError, ValueError, IndexError
            As `cupycorr.correlation_lookup`.
        """
        places = coords.movedim(-1, 2)
        cost = edge_costs(self.levels[0], self.levels, places, ii, jj, self.lookup, SCALE)
        return widened(cost.flatten(2, 4))
