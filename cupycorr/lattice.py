"""The lattices on which products lie: which positions taps touch, and which positions meet.

A lattice is a row of equally spaced positions along one axis. It splits into phases, inside which
positions and displacements both advance by one, so that products lie on diagonals (`Band`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cupycorr.geometry import Axis, ceil_div, split_into_phases


class Band(NamedTuple):
    """The pairs of positions that meet along one axis: m and m + p + shift, at displacement p.

    Among all ``count1`` x ``count2`` pairs they form a band along the diagonal, ``count_patch``
    wide.
    """

    count1: int
    count2: int
    count_patch: int
    shift: int

    @property
    def pairs(self) -> int:
        """Number of (position, displacement) pairs whose second position exists."""
        virtual = range(self.shift, self.shift + self.count_patch)
        return sum(
            max(0, min(self.count1, self.count2 - offset) - max(0, -offset)) for offset in virtual
        )

    def mirrored(self) -> Band:
        """Exchange the two maps; displacement p becomes count_patch - 1 - p."""
        return Band(self.count2, self.count1, self.count_patch, 1 - self.count_patch - self.shift)


class Phase(NamedTuple):
    """One residue class of a lattice, inside which positions and displacements advance by one.

    Everything is clipped to the image.
    """

    image1: slice
    """Positions in the first map."""
    image2: slice
    """Positions in the second map."""
    patch: slice
    """Indices of the displacements."""
    lattice: slice
    """Lattice indices of the positions in the first map."""
    band: Band
    """The number of displacements and positions, and which pairs meet."""


class Lattice(NamedTuple):
    """Equally spaced positions that together hold some taps of every output position."""

    positions: range
    """The pixels, inside the image or not."""
    taps: tuple[slice, ...]
    """For each tap the lattice indices that it touches, one per output position."""
    phases: tuple[Phase, ...]
    """The phases of the lattice; those that meet nothing are left out."""

    @property
    def size(self) -> int:
        """Number of positions."""
        return len(self.positions)

    def inside(self, size: int, shift: int = 0) -> slice:
        """Return the indices of the positions that lie, moved by ``shift``, on ``size`` pixels."""
        first, step = self.positions.start + shift, self.positions.step
        low = min(self.size, max(0, ceil_div(-first, step)))
        return slice(low, max(low, min(self.size, ceil_div(size - first, step))))

    @property
    def untouched(self) -> list[int]:
        """Lattice indices that no tap touches."""
        untouched = np.ones(self.size, bool)
        for tap in self.taps:
            untouched[tap] = False
        found: list[int] = np.flatnonzero(untouched).tolist()
        return found


@lru_cache(maxsize=1024)
def lattices(axis: Axis, size: int, start: int, stop: int) -> tuple[Lattice, ...]:
    """Return the lattices that hold all taps of the output positions [start, stop).

    ``size`` is that of the image, in pixels. One lattice of step gcd(stride, dilation) holds every
    tap. Where most of its positions would belong to no tap, each tap has a lattice of its own.
    """
    outputs, origin = stop - start, start * axis.stride - axis.padding
    step = axis.lattice_step
    stride, dilation = axis.stride // step, axis.dilation // step
    if not axis.is_sparse(outputs):
        dense = axis.lattice_size(outputs)
        taps = tuple(_span(u * dilation, outputs, stride) for u in range(axis.kernel_size))
        positions = range(origin, origin + dense * step, step)
        return (Lattice(positions, taps, _phases(axis, size, origin, step, dense)),)
    whole = (_span(0, outputs, 1),)
    tap_origins = (origin + u * axis.dilation for u in range(axis.kernel_size))
    return tuple(
        Lattice(
            range(first, first + outputs * axis.stride, axis.stride),
            whole,
            _phases(axis, size, first, axis.stride, outputs),
        )
        for first in tap_origins
    )


def _phases(axis: Axis, size: int, origin: int, step: int, count: int) -> tuple[Phase, ...]:
    """Split the lattice origin + i·step, i < count, and the patch into phases.

    With L = lcm(step, dilation_patch), the positions of one phase lie L pixels apart, and so do
    its displacements.
    """
    lattice_phases, patch_phases = split_into_phases(step, axis.dilation_patch)
    period = step * lattice_phases
    phases = []
    for r in range(min(lattice_phases, count)):
        origin1 = origin + r * step
        low1 = max(0, ceil_div(-origin1, period))
        high1 = min(ceil_div(count - r, lattice_phases), ceil_div(size - origin1, period))
        for p0 in range(min(patch_phases, axis.patch_size)):
            patch_count = ceil_div(axis.patch_size - p0, patch_phases)
            origin2 = origin1 + axis.first_displacement + p0 * axis.dilation_patch
            low2 = max(low1, ceil_div(-origin2, period))
            high2 = min(high1 + patch_count - 1, ceil_div(size - origin2, period))
            # The displacements that lead from some position in the image to another.
            first = max(0, low2 - (high1 - 1))
            last = min(patch_count, high2 - low1)
            if high1 <= low1 or high2 <= low2 or last <= first:
                continue
            phases.append(
                Phase(
                    image1=_span(origin1 + low1 * period, high1 - low1, period),
                    image2=_span(origin2 + low2 * period, high2 - low2, period),
                    patch=_span(p0 + first * patch_phases, last - first, patch_phases),
                    lattice=_span(r + low1 * lattice_phases, high1 - low1, lattice_phases),
                    band=Band(high1 - low1, high2 - low2, last - first, low1 + first - low2),
                )
            )
    return tuple(phases)


def _span(start: int, count: int, step: int) -> slice:
    """Return the slice of ``count`` indices from ``start`` on."""
    return slice(start, start + (count - 1) * step + 1, step)
