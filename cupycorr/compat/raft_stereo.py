"""The correlation blocks of RAFT-Stereo, which compare positions of one row.

They have the names and arguments of RAFT-Stereo's ``core/corr.py`` and give its channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cupycorr.compat.blocks import Block, widened
from cupycorr.lookup import Lookup


class PytorchAlternateCorrBlock1D(Block):
    """RAFT-Stereo's block that is computed on demand (``corr_implementation="alt"``).

    Parameters
    ----------
    fmap1 : Tensor (B, C, H, W1), float16|bfloat16|float32|float64
        The feature map of the left image, of any strides.
    fmap2 : Tensor (B, C, H, W2)
        That of the right image.
    num_levels : int, default 4
        Levels, of which each halves the width of the one before.
    radius : int, default 4
        Each level has ``2 * radius + 1`` displacements, horizontal ones.

    Raises
    ------
    TypeError, ValueError
        As `cupycorr.pyramid` and `Lookup`.

    Notes
    -----
    Definition: `Lookup`, with the scale ``1 / sqrt(C)``.
    Source: L. Lipson, Z. Teed and J. Deng, "RAFT-Stereo", 3DV 2021, section 3.2.
    """

    def __init__(self, fmap1: Tensor, fmap2: Tensor, num_levels: int = 4, radius: int = 4) -> None:
        super().__init__(fmap1, fmap2, Lookup((0, radius), num_levels, pool=(1, 2)))
        self.num_levels, self.radius = num_levels, radius

    def __call__(self, coords: Tensor) -> Tensor:
        """Compute the costs around coordinates.

        Parameters
        ----------
        coords : Tensor (B, 2, H, W1), floating
            x and y, in pixels of fmap2; y too may lie between two rows.

        Returns
        -------
        Tensor (B, num_levels * (2 * radius + 1), H, W1)
            In float32; in float64 for maps in float64.

        Raises
        ------
        TypeError, ValueError
            As `cupycorr.correlation_lookup`.
        """
        return widened(super().__call__(coords))


class CorrBlock1D(PytorchAlternateCorrBlock1D):
    """RAFT-Stereo's block of all pairs in a row (``"reg"``), which makes only a small volume.

    The arguments are those of `PytorchAlternateCorrBlock1D`.
    """

    holds_products = True

    def __call__(self, coords: Tensor) -> Tensor:
        """Compute the costs around coordinates.

        Parameters
        ----------
        coords : Tensor (B, 1 or 2, H, W1), floating
            x, in pixels of fmap2. y is not used: a position looks into its own row.

        Returns
        -------
        Tensor (B, num_levels * (2 * radius + 1), H, W1)
            As `PytorchAlternateCorrBlock1D`.

        Raises
        ------
        TypeError, ValueError
            As `cupycorr.correlation_lookup`.
        """
        x = coords[:, :1]
        y = torch.arange(x.shape[2], dtype=x.dtype, device=x.device)[:, None].expand_as(x)
        return super().__call__(torch.cat([x, y], 1))


CorrBlockFast1D = CorrBlock1D
"""That of ``"reg_cuda"``."""
AlternateCorrBlock = PytorchAlternateCorrBlock1D
"""That of ``"alt_cuda"``, which RAFT-Stereo leaves unwritten."""
