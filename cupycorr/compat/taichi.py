"""The Taichi correlation layer."""

from __future__ import annotations

from typing import Any

from cupycorr.compat.channels import correlate_channels
from cupycorr.geometry import Geometry, integer
from cupycorr.layer import Layer


def geometry(max_disp: int, dila_patch: int = 1) -> Geometry:
    """Translate the layer's parameters; see `Geometry.from_taichi`."""
    reach = integer("max_disp", max_disp, least=0)
    step = integer("dila_patch", dila_patch, least=1)
    patch = 2 * reach // step + 1
    return Geometry(patch_size=patch, dilation_patch=step, first_displacement=-reach)


class CorrTaichi:
    """The Taichi correlation layer; unlike there, the maps may also be NumPy or CuPy arrays.

    Parameters
    ----------
    max_disp : int, pixels
        The first displacement is ``-max_disp``, whether or not the patch is then centred.
    dila_patch : int, pixels, default 1
        Spacing of the displacements.

    Raises
    ------
    TypeError, ValueError
        As `Geometry.from_taichi`.

    Notes
    -----
    With zeros outside the maps, and ``patch_size = 2 * max_disp // dila_patch + 1``::

        out[n, l, y, x] = sum over c of fmap0[n, c, y, x] * fmap1[n, c, y + dy, x + dx]
        dy = -max_disp + l // patch_size * dila_patch
        dx = -max_disp + l % patch_size * dila_patch
    """

    def __init__(self, max_disp: int, dila_patch: int = 1) -> None:
        self.geometry = geometry(max_disp, dila_patch)

    @property
    def patch_size(self) -> int:
        """Number of displacements, per axis."""
        return self.geometry.patch_size[0]

    @property
    def out_channels(self) -> int:
        """Number of displacements, of both axes together."""
        return self.patch_size**2

    def __call__(self, fmap0: Any, fmap1: Any) -> Any:
        """Compute the cost volume of two feature maps.

        Parameters
        ----------
        fmap0, fmap1 : array (N, C, H, W), float16|bfloat16|float32|float64
            The feature maps: NumPy or CuPy arrays or torch tensors, of any strides.

        Returns
        -------
        array (N, patch_size ** 2, H, W)
            The sums of products, rows of displacements outermost.

        Raises
        ------
        TypeError, ValueError
            As `cupycorr.correlation`.
        """
        return correlate_channels(fmap0, fmap1, Layer(self.geometry), names=("fmap0", "fmap1"))
