"""A pair of maps whose costs a network looks up in each iteration, as channels of a feature map.

Blocks of RAFT-like networks are made once for a pair of maps and called with coordinates. Others
hold the products of all pairs of positions; this one holds the maps, and computes what is asked. On
the CPU samples of products take less time: there those who expect them get them, if they are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from cupycorr.lookup import Lookup
from cupycorr.sampling import correlation_lookup, pyramid
from cupycorr.volumes import volume_lookup, volume_pyramid

SMALL = 1 << 26
"""Bytes of the products of all pairs that a block holds at most."""


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
    scale : float, optional
        What sums of products are multiplied by; ``1 / sqrt(C)`` by default.

    Raises
    ------
    TypeError, ValueError
        As `cupycorr.pyramid`.
    """

    holds_products = False
    """Whether products of all pairs may be made once and sampled, on the CPU, where they are few:
    those of a row, if the lookup stays in it. y of the coordinates must then be that row's."""

    def __init__(
        self, fmap1: Tensor, fmap2: Tensor, lookup: Lookup, scale: float | None = None
    ) -> None:
        self.fmap1, self.lookup, self.scale = fmap1, lookup, scale
        volume = _products(fmap1, fmap2, lookup.in_rows) if self.holds_products else None
        self.products: tuple[Tensor, ...] = ()
        self.levels: tuple[Tensor, ...] = ()
        if volume is None:
            self.levels = pyramid(fmap2, lookup)
        else:
            scale = fmap1.shape[1] ** -0.5 if scale is None else scale
            self.products = volume_pyramid(volume * scale, lookup)

    def __call__(self, coords: Tensor) -> Tensor:
        """Compute the costs around coordinates.

        Parameters
        ----------
        coords : Tensor (N, 2, H1, W1), floating
            x and y, in pixels of fmap2.

        Returns
        -------
        Tensor (N, levels * taps, H1, W1)
            Sums of products, scaled, of the maps' dtype.

        Raises
        ------
        TypeError, ValueError
            As `cupycorr.correlation_lookup`.
        """
        coords = coordinates(coords, self.fmap1)
        cost: Tensor
        if self.products:
            if self.lookup.in_rows:  # each position has a map of one row
                coords = torch.cat([coords[:, :1], torch.zeros_like(coords[:, :1])], 1)
            cost = volume_lookup(self.products, coords, self.lookup)
        else:
            cost = correlation_lookup(
                self.fmap1, self.levels, coords, self.lookup, scale=self.scale
            )
        return cost.flatten(1, 3)


def _products(fmap1: Tensor, fmap2: Tensor, in_rows: bool) -> Tensor | None:
    """Return products of all pairs (N, H1, W1, H, W), or of a row, if they are few; else None."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return None
    axes = 3 if in_rows else 2
    if not (
        type(fmap1) is type(fmap2) is Tensor  # traced and distributed ones have types of their own
        and fmap1.dim() == fmap2.dim() == 4
        and fmap1.shape[:axes] == fmap2.shape[:axes]
        and fmap1.dtype == fmap2.dtype
        and fmap1.dtype in (torch.float32, torch.float64)
        and fmap1.device == fmap2.device == torch.device("cpu")
    ):
        return None
    count = len(fmap1) * prod((*fmap1.shape[2:], *fmap2.shape[axes:]))
    if not 0 < count * fmap1.element_size() <= SMALL:
        return None
    if in_rows:
        return (fmap1.permute(0, 2, 3, 1) @ fmap2.permute(0, 2, 1, 3)).unsqueeze(3)
    products = fmap1.flatten(2).transpose(1, 2) @ fmap2.flatten(2)
    return products.view(len(fmap1), *fmap1.shape[2:], *fmap2.shape[2:])


def edge_costs(
    fmap1: Tensor,
    levels: Sequence[Tensor],
    coords: Tensor,
    ii: Tensor,
    jj: Tensor,
    lookup: Lookup,
    scale: float,
) -> Tensor:
    """Compute the costs of edges between numbered maps; under autocast too, in the maps' dtype.

    Parameters
    ----------
    fmap1 : Tensor (B, N1, C, *P)
        The patches, or maps, that edges begin at.
    levels : sequence of Tensor (B, N2, C, h, w)
        The maps that are looked up.
    coords : Tensor (B, E, 2, *P), floating
        x and y of each position of an edge, in pixels of level 0.
    ii, jj : Tensor (E,), int32|int64
        Each edge's entry of fmap1 and of the levels.
    lookup : Lookup
        Which displacements are compared.
    scale : float
        What sums of products are multiplied by.

    Returns
    -------
    Tensor (B, E, levels, PH, PW, *P)
        In the order of the lookup.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cupycorr.correlation_lookup`.
    """
    first, second = (
        (index + torch.arange(len(maps), device=index.device)[:, None] * maps.shape[1]).flatten()
        for index, maps in ((ii, fmap1), (jj, levels[0]))
    )
    with torch.autocast(fmap1.device.type, enabled=False):
        cost: Tensor = correlation_lookup(
            fmap1.flatten(0, 1),
            [level.flatten(0, 1) for level in levels],
            coordinates(coords, fmap1).flatten(0, 1),
            lookup,
            scale=scale,
            index1=first,
            index2=second,
        )
    return cost.view(*coords.shape[:2], *cost.shape[1:])


def coordinates(coords: Tensor, fmap: Tensor) -> Tensor:
    """Return coordinates in the dtype in which a map is looked up."""
    return coords.to(torch.float64 if fmap.dtype is torch.float64 else torch.float32)


def widened(cost: Tensor) -> Tensor:
    """Return costs of 16 bits in float32, as RAFT's blocks do, and others as they are."""
    return cost.float() if cost.dtype in (torch.float16, torch.bfloat16) else cost
