"""The geometry of a cost volume: every size, origin, displacement and range, in one value object.

Positions and displacements are in pixels of the feature maps. All arithmetic is per axis
(``Axis``); a ``Geometry`` is a pair of axes, (y, x) in that order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd
from operator import index
from typing import NamedTuple, SupportsIndex, TypeGuard

import numpy as np

Pair = tuple[int, int]
IntOrPair = int | Pair


LARGEST, FARTHEST = (1 << 31) - 1, 1 << 61
"""The largest parameter, and first displacement: sums and products of them fit into 64 bits."""


class Axis(NamedTuple):
    """One axis of a geometry; the fields are those of `Geometry`, as plain integers."""

    kernel_size: int
    patch_size: int
    stride: int
    padding: int
    dilation: int
    dilation_patch: int
    first_displacement: int

    @property
    def taps_extent(self) -> int:
        """Pixels from the first to the last tap, both included."""
        return self.dilation * (self.kernel_size - 1) + 1

    def output_size(self, size: int) -> int:
        """Return the number of output positions on ``size`` pixels; below 1 where none fits."""
        extent = self.dilation * (self.kernel_size - 1) + 1
        return (size + 2 * self.padding - extent) // self.stride + 1

    def patch_part(self, part: slice) -> Axis:
        """Return the axis with only the displacements numbered ``part`` (step 1)."""
        first = self.first_displacement + part.start * self.dilation_patch
        return self._replace(patch_size=part.stop - part.start, first_displacement=first)

    @lru_cache(maxsize=1024)  # noqa: B019 - an axis is a small immutable value
    def pairs(self, size: int) -> int:
        """Return how many different pairs of positions are compared on ``size`` pixels."""
        outputs = self.output_size(size)
        is_touched = np.zeros(size, bool)
        for tap in range(self.kernel_size):
            first = tap * self.dilation - self.padding
            low = max(0, ceil_div(-first, self.stride))
            count = min(outputs, ceil_div(size - first, self.stride)) - low
            if count > 0:
                is_touched[first + low * self.stride :: self.stride][:count] = True
        displacements = (
            self.first_displacement + p * self.dilation_patch for p in range(self.patch_size)
        )
        # From a position low <= position < high a displacement leads into the image.
        bounds = [(max(0, -d), min(size, size - d)) for d in displacements if abs(d) < size]
        low_and_high = np.searchsorted(np.flatnonzero(is_touched), bounds or [(0, 0)])
        return int(np.diff(low_and_high).sum())

    @property
    def lattice_step(self) -> int:
        """Pixels between the positions of the coarsest lattice that holds every tap."""
        return gcd(self.stride, self.dilation) if self.kernel_size > 1 else self.stride

    @property
    def phases(self) -> tuple[int, int]:
        """Number of phases of that lattice's positions, and of the displacements."""
        return split_into_phases(self.lattice_step, self.dilation_patch)

    def lattice_size(self, outputs: int) -> int:
        """Return how many positions of that lattice ``outputs`` output positions span."""
        span = (outputs - 1) * self.stride + (self.kernel_size - 1) * self.dilation
        return span // self.lattice_step + 1

    def is_sparse(self, outputs: int) -> bool:
        """Tell whether most positions of that lattice belong to no tap."""
        return self.lattice_size(outputs) > outputs * self.kernel_size


@dataclass(frozen=True, init=False, repr=False)
class Geometry:
    """Which positions and displacements a cost volume compares, independent of any image.

    Parameters
    ----------
    kernel_size : int or (int, int), default 1
        Taps: positions around a position that are compared with it, per axis; even numbers too.
    patch_size : int or (int, int), default 1
        Number of displacements tried, per axis (the whole patch, not its radius); even sizes too.
    stride : int or (int, int), pixels, default 1
        Step between output positions.
    padding : int or (int, int), pixels, default 0
        Zeros around both maps; a negative padding crops.
    dilation : int or (int, int), pixels, default 1
        Spacing of the taps.
    dilation_patch : int or (int, int), pixels, default 1
        Spacing of the displacements; below 0 they run downwards.
    first_displacement : int or (int, int), pixels, optional
        The first displacement; by default ``-((patch_size - 1) // 2) * dilation_patch``.

    Raises
    ------
    TypeError
        If a parameter is not an int or a pair of ints.
    ValueError
        If a parameter is above 2**31 - 1, dilation_patch is 0, or one other than dilation_patch,
        padding and first_displacement is below 1.

    Notes
    -----
    With zeros outside the maps, and a term omitted where either position lies outside::

        cost[n, p, q, y, x] = sum over c, i, j of fmap1[n, c, Y, X] * fmap2[n, c, Y + dy, X + dx]
        Y = y * stride - padding + i * dilation
        dy = first_displacement + p * dilation_patch          (X and dx likewise)

    A geometry is immutable and hashable; pairs are always (y, x).
    """

    kernel_size: Pair
    patch_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    dilation_patch: Pair
    first_displacement: Pair
    y: Axis = field(init=False, compare=False)
    """The vertical axis."""
    x: Axis = field(init=False, compare=False)
    """The horizontal axis."""

    def __init__(
        self,
        kernel_size: IntOrPair = 1,
        patch_size: IntOrPair = 1,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        dilation_patch: IntOrPair = 1,
        first_displacement: IntOrPair | None = None,
    ) -> None:
        patch = pair("patch_size", patch_size, least=1)
        spacing = pair("dilation_patch", dilation_patch)
        if 0 in spacing:
            raise ValueError(
                f"dilation_patch must be at least 1 or at most -1, got {dilation_patch!r}"
            )
        pairs = (
            pair("kernel_size", kernel_size, least=1),
            patch,
            pair("stride", stride, least=1),
            pair("padding", padding),
            pair("dilation", dilation, least=1),
            spacing,
            _centred(patch, spacing)
            if first_displacement is None
            else pair("first_displacement", first_displacement, -FARTHEST, FARTHEST),
        )
        y, x = [Axis(*sizes) for sizes in zip(*pairs, strict=True)]
        # The class is frozen: attributes can only be set past its own __setattr__.
        for name, value in zip((*Axis._fields, "y", "x"), (*pairs, y, x), strict=True):
            object.__setattr__(self, name, value)

    @staticmethod
    def from_flownet(
        pad_size: int = 0,
        kernel_size: int = 1,
        max_displacement: int = 0,
        stride1: int = 1,
        stride2: int = 1,
    ) -> Geometry:
        """Translate the parameters of FlowNet's correlation layer.

        Parameters
        ----------
        pad_size : int, pixels
            Zeros around both maps.
        kernel_size : int
            Taps, per axis.
        max_displacement : int, pixels
            Largest displacement; output positions keep this distance from the padded border.
        stride1, stride2 : int, pixels
            Step between output positions, and between displacements.

        Raises
        ------
        TypeError, ValueError
            As `Geometry`, naming the parameter of this vocabulary.

        Notes
        -----
        The first tap of output (y, x) is at ``y * stride1 + max_displacement - pad_size``.
        FlowNet's output size is
        ``ceil((H + 2 * pad_size - 2 * (max_displacement + (kernel_size - 1) // 2)) / stride1)``;
        for an even kernel_size that is one position more than fits, and it is left out here.
        Source: A. Dosovitskiy et al., "FlowNet", ICCV 2015, section 3, and its Caffe layer.
        """
        from cupycorr.compat import flownet

        return flownet.geometry(pad_size, kernel_size, max_displacement, stride1, stride2)

    @staticmethod
    def from_correlation1d(
        pad: int = 0,
        kernel_size: int = 1,
        max_displacement: int = 0,
        stride1: int = 1,
        stride2: int = 1,
        single_direction: int = 0,
    ) -> Geometry:
        """Translate the parameters of FlowNet2's one-dimensional (stereo) correlation layer.

        Parameters
        ----------
        pad, kernel_size, max_displacement, stride1, stride2 : int
            As `from_flownet`, but padding and displacements are horizontal only.
        single_direction : {-1, 0, 1}
            Only displacements <= 0, all of them, or only those >= 0.

        Raises
        ------
        TypeError, ValueError
            As `from_flownet`; ValueError also for another single_direction.
        """
        from cupycorr.compat import flownet

        return flownet.stereo_geometry(
            pad, kernel_size, max_displacement, stride1, stride2, single_direction
        )

    @staticmethod
    def from_taichi(max_disp: int, dila_patch: int = 1) -> Geometry:
        """Translate the parameters of the Taichi correlation layer.

        Parameters
        ----------
        max_disp : int, pixels
            The first displacement is ``-max_disp``, whether or not the patch is then centred.
        dila_patch : int, pixels, default 1
            Spacing of the ``2 * max_disp // dila_patch + 1`` displacements.

        Raises
        ------
        TypeError, ValueError
            As `Geometry`, naming the parameter of this vocabulary.
        """
        from cupycorr.compat import taichi

        return taichi.geometry(max_disp, dila_patch)

    @staticmethod
    def from_mmcv(
        kernel_size: IntOrPair = 1,
        max_displacement: int = 1,
        stride: IntOrPair = 1,
        padding: IntOrPair = 0,
        dilation: IntOrPair = 1,
        dilation_patch: IntOrPair = 1,
    ) -> Geometry:
        """Translate the parameters of mmcv's correlation layer.

        Parameters
        ----------
        max_displacement : int
            Displacements to either side; `patch_size` is ``2 * max_displacement + 1``.
        kernel_size, stride, padding, dilation, dilation_patch : int or (int, int)
            As `Geometry`.

        Raises
        ------
        TypeError, ValueError
            As `Geometry`, naming the parameter of this vocabulary.
        """
        from cupycorr.compat import systems

        return systems.mmcv_geometry(
            max_displacement,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            dilation_patch=dilation_patch,
        )

    @property
    def displacements(self) -> tuple[range, range]:
        """The vertical and the horizontal displacements, in pixels."""
        return tuple(  # type: ignore[return-value]
            range(first, first + count * step, step)
            for first, count, step in zip(
                self.first_displacement, self.patch_size, self.dilation_patch, strict=True
            )
        )

    @property
    def descends(self) -> bool:
        """Whether the displacements of some axis run downwards."""
        y, x = self.dilation_patch
        return y < 0 or x < 0

    @property
    def reversal(self) -> tuple[slice, ...]:
        """The index that brings a cost volume from `ascending`'s order to this one, and back."""
        y, x = (slice(None, None, -1 if step < 0 else None) for step in self.dilation_patch)
        return slice(None), y, x

    @property
    def ascending(self) -> Geometry:
        """The geometry with the same displacements in ascending order; engines take no other."""
        fields = {name: getattr(self, name) for name in Axis._fields}
        runs = [sorted((run[0], run[-1])) for run in self.displacements]
        fields["first_displacement"] = tuple(run[0] for run in runs)
        fields["dilation_patch"] = tuple(map(abs, self.dilation_patch))
        return Geometry(**fields)

    @property
    def taps_extent(self) -> Pair:
        """Pixels that the taps span, (y, x)."""
        return self.y.taps_extent, self.x.taps_extent

    @property
    def taps(self) -> int:
        """Number of taps."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def is_centred(self) -> bool:
        """Whether the first displacement is that of a centred patch, the default."""
        return self.first_displacement == _centred(self.patch_size, self.dilation_patch)

    def output_size(self, height: int, width: int) -> Pair:
        """Return the number of output positions on an image, (OH, OW).

        Raises
        ------
        ValueError
            If the taps do not fit into the padded image.
        """
        size = self.y.output_size(height), self.x.output_size(width)
        # Not their minimum: torch.compile would compile again for maps that are higher than wide.
        if size[0] < 1 or size[1] < 1:
            padded = tuple(n + 2 * p for n, p in zip((height, width), self.padding, strict=True))
            raise ValueError(
                f"the taps must fit into the padded image, got taps that span {self.taps_extent} "
                f"pixels (kernel_size {self.kernel_size}, dilation {self.dilation}) and a padded "
                f"image of {padded} (image {(height, width)}, padding {self.padding})"
            )
        return size

    def cost_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int, int, int]:
        """Return the cost volume's shape (N, PH, PW, OH, OW) for maps of shape (N, C, H, W)."""
        batch, _, height, width = shape
        return (batch, *self.patch_size, *self.output_size(height, width))

    def multiply_adds(self, shape: tuple[int, ...]) -> int:
        """Return how many multiply-adds the products of maps of shape (N, C, H, W) need at least.

        Each pair of positions in the image that some tap of some output compares counts C times,
        however many outputs share it.
        """
        batch, channels, height, width = shape
        return batch * channels * self.y.pairs(height) * self.x.pairs(width)

    def __repr__(self) -> str:
        given = self.parameters()
        return f"Geometry({', '.join(f'{name}={value}' for name, value in given.items())})"

    def parameters(self) -> dict[str, IntOrPair]:
        """Return the parameters that differ from their defaults, equal pairs as one number."""
        centred = _centred(self.patch_size, self.dilation_patch)
        defaults = dict.fromkeys(Axis._fields, (1, 1))
        defaults |= {"padding": (0, 0), "first_displacement": centred}
        pairs = {name: getattr(self, name) for name in Axis._fields}
        return {
            name: both[0] if both[0] == both[1] else both
            for name, both in pairs.items()
            if both != defaults[name]
        }


def pair(name: str, value: object, least: int = -LARGEST, most: int = LARGEST) -> Pair:
    """Widen an int to a pair and check it."""
    if type(value) is int and least <= value <= most:
        return value, value
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(numbers) != 2 or not all(_is_integer(number) for number in numbers):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    y, x = map(index, numbers)
    if min(y, x) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    if max(y, x) > most:
        raise ValueError(f"{name} must be at most {most}, got {value!r}")
    return y, x


def integer(name: str, value: object, least: int | None = None) -> int:
    """Check one integer; ``name`` is what the error calls it."""
    if not _is_integer(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    number = index(value)
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return number


def _is_integer(value: object) -> TypeGuard[SupportsIndex]:
    """Tell integers of any library from everything else; a bool of any library is not one."""
    if type(value).__name__ in ("bool", "bool_"):
        return False
    try:
        index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def _centred(patch_size: Pair, dilation_patch: Pair) -> Pair:
    """Return the first displacement of a centred patch; the radius is (P - 1) // 2 steps."""
    y, x = (-((p - 1) // 2) * d for p, d in zip(patch_size, dilation_patch, strict=True))
    return y, x


def split_into_phases(step: int, spacing: int) -> tuple[int, int]:
    """Return the number of phases of positions ``step`` apart, and of displacements."""
    common = gcd(step, spacing)
    return spacing // common, step // common


def ceil_div(a: int, b: int) -> int:
    """Divide, rounding up."""
    return -(-a // b)
