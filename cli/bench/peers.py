"""Other ways to compute a cost volume on torch tensors, to measure this package against.

The three written here are what people use in plain torch: slices of a padded map, one product per
displacement; ``unfold``, all displacements copied side by side; and the products of all pairs of
positions, of which the wanted ones are gathered. Each covers every geometry, and sums the taps
after the channels as this package does. Three more are used if Python finds them: a compiled
extension, a layer in Taichi, and kernels in Triton that run on a GPU only.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from functools import cache
from math import gcd, prod
from typing import TYPE_CHECKING, Any, NamedTuple

from cupycorr import Geometry
from cupycorr.geometry import Pair
from cupycorr.layer import DTYPES, Layer

from ..environment import available_memory, has, torch_finds_cuda

if TYPE_CHECKING:
    from torch import Tensor

ITEMSIZE = {name: dtype.itemsize for name, dtype in DTYPES.items()}


class Peer(NamedTuple):
    """Another implementation.

    correlate : (fmap1, fmap2, layer) -> cost, on torch tensors; of lookups `lookups` has more
    obstacle : (shape, geometry or lookup, dtype name, device) -> why it cannot do this, or None
    l1 : whether it sums absolute differences as well
    cpu : whether it computes on the CPU as well
    dtypes : those that it computes in
    """

    name: str
    module: str
    correlate: Callable[..., Any]
    obstacle: Callable[[tuple[int, int, int, int], Any, str, str], str | None]
    l1: bool = False
    cpu: bool = True
    dtypes: tuple[str, ...] = tuple(DTYPES)

    def unable(
        self, shape: tuple[int, int, int, int], what: Any, dtype: str, device: str
    ) -> str | None:
        """Say why it cannot do this, or return None."""
        if dtype not in self.dtypes:
            return f"does not compute in {dtype}"
        return self.obstacle(shape, what, dtype, device)


class _Lattice(NamedTuple):
    """One axis: lattice positions in the first map and, per displacement, in the second."""

    step: int
    span: int
    start: int
    shift: int
    displacements: int
    spacing: int
    taps: tuple[slice, ...]

    @property
    def size(self) -> int:
        return (self.span - 1) // self.step + 1

    def padding1(self, pixels: int) -> Pair:
        return max(0, -self.start), max(0, self.start + self.span - pixels)

    def padding2(self, pixels: int) -> Pair:
        start = self.start + self.shift
        stop = start + self.span + (self.displacements - 1) * self.spacing
        return max(0, -start), max(0, stop - pixels)

    def slice1(self) -> slice:
        first = max(0, self.start)
        return slice(first, first + self.span, self.step)

    def slice2(self, displacement: int) -> slice:
        first = max(0, self.start + self.shift) + displacement * self.spacing
        return slice(first, first + self.span, self.step)

    def all2(self) -> slice:
        first = max(0, self.start + self.shift)
        return slice(first, first + self.span + (self.displacements - 1) * self.spacing)


def _combine(one: Tensor, two: Tensor, layer: Layer) -> Tensor:
    return (one - two).abs() if layer.l1 else one * two


def slices(fmap1: Tensor, fmap2: Tensor, layer: Layer) -> Tensor:
    """Combine and sum over the channels once per displacement."""
    import torch

    y, x = _lattices(fmap1.shape, layer.geometry)
    base, padded = _padded(fmap1, fmap2, y, x)
    sums = [
        _combine(base, padded[:, :, y.slice2(p), x.slice2(q)], layer).sum(1)
        for p in range(y.displacements)
        for q in range(x.displacements)
    ]
    return _sum_taps(torch.stack(sums, 1), y, x)


def unfold(fmap1: Tensor, fmap2: Tensor, layer: Layer) -> Tensor:
    """Lay out all displacements of the second map, then combine and sum over the channels."""
    from torch.nn import functional

    y, x = _lattices(fmap1.shape, layer.geometry)
    base, padded = _padded(fmap1, fmap2, y, x)
    columns = functional.unfold(
        padded[:, :, y.all2(), x.all2()],
        kernel_size=layer.geometry.patch_size,
        dilation=layer.geometry.dilation_patch,
        stride=(y.step, x.step),
    )
    displaced = columns.view(*base.shape[:2], -1, y.size * x.size)
    return _sum_taps(_combine(base.flatten(2).unsqueeze(2), displaced, layer).sum(1), y, x)


def all_pairs(fmap1: Tensor, fmap2: Tensor, layer: Layer) -> Tensor:
    """Multiply all positions with all positions, and gather the displacements."""
    import torch

    y, x = _lattices(fmap1.shape, layer.geometry)
    base, _ = _padded(fmap1, fmap2, y, x)
    height, width = fmap2.shape[2:]
    pairs = base.flatten(2).transpose(1, 2) @ fmap2.flatten(2)
    targets, inside = [], []
    for axis, size in ((y, height), (x, width)):
        steps = torch.arange(max(axis.size, axis.displacements), device=fmap1.device)
        positions = axis.start + axis.shift + axis.step * steps[: axis.size, None]
        positions = positions + axis.spacing * steps[: axis.displacements]
        inside.append((positions >= 0) & (positions < size))
        targets.append(positions.clamp(0, size - 1))
    # Axes: lattice y, lattice x, displacement y, displacement x.
    index = targets[0][:, None, :, None] * width + targets[1][None, :, None, :]
    within = inside[0][:, None, :, None] & inside[1][None, :, None, :]
    count = y.size * x.size
    index, within = index.reshape(1, count, -1), within.reshape(1, count, -1)
    products = pairs.gather(2, index.expand(len(base), -1, -1)) * within
    return _sum_taps(products.transpose(1, 2), y, x)


def sampler(fmap1: Tensor, fmap2: Tensor, layer: Layer) -> Tensor:
    """Call spatial-correlation-sampler."""
    from spatial_correlation_sampler import spatial_correlation_sample

    geometry = layer.geometry
    cost: Tensor = spatial_correlation_sample(
        fmap1,
        fmap2,
        kernel_size=geometry.kernel_size,
        patch_size=geometry.patch_size,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        dilation_patch=geometry.dilation_patch,
    )
    return cost


def triton(fmap1: Tensor, fmap2: Tensor, layer: Layer) -> Tensor:
    """Call localcorr's kernels in Triton."""
    from localcorr import get_localcorr_sampler

    geometry = layer.geometry
    sampler = get_localcorr_sampler(geometry.patch_size[0], geometry.dilation_patch[0])
    cost: Tensor = sampler(fmap1, fmap2)
    return cost


def taichi(fmap1: Tensor, fmap2: Tensor, layer: Layer) -> Tensor:
    """Call CorrTaichi, of a module corr_taichi that belongs to no package."""
    _start_taichi(fmap1.device.type)
    from corr_taichi import CorrTaichi

    (patch, _), (spacing, _) = layer.geometry.patch_size, layer.geometry.dilation_patch
    cost: Tensor = CorrTaichi(patch // 2 * spacing, spacing)(fmap1, fmap2)
    return cost.reshape(layer.geometry.cost_shape(fmap1.shape))


@cache
def _start_taichi(device: str) -> None:
    """Start Taichi, silently, on as many threads as torch has."""
    os.environ.setdefault("ENABLE_TAICHI_HEADER_PRINT", "0")
    import taichi
    import torch

    arch = taichi.cuda if device == "cuda" else taichi.cpu
    count = torch.get_num_threads()
    with contextlib.redirect_stdout(io.StringIO()):
        taichi.init(arch=arch, cpu_max_num_threads=count, log_level=taichi.ERROR)


def _lattices(shape: tuple[int, ...], geometry: Geometry) -> tuple[_Lattice, _Lattice]:
    """Lay out both axes: positions gcd(stride, dilation) apart hold all taps."""
    lattices = []
    for axis, size in ((geometry.y, shape[2]), (geometry.x, shape[3])):
        step = gcd(axis.stride, axis.dilation) if axis.kernel_size > 1 else axis.stride
        reach = (axis.output_size(size) - 1) * axis.stride
        taps = tuple(
            slice(tap * axis.dilation // step, (tap * axis.dilation + reach) // step + 1,
                  axis.stride // step)
            for tap in range(axis.kernel_size)
        )  # fmt: skip
        lattices.append(
            _Lattice(
                step=step,
                span=reach + axis.taps_extent,
                start=-axis.padding,
                shift=axis.first_displacement,
                displacements=axis.patch_size,
                spacing=axis.dilation_patch,
                taps=taps,
            )
        )
    return lattices[0], lattices[1]


def _padded(fmap1: Tensor, fmap2: Tensor, y: _Lattice, x: _Lattice) -> tuple[Tensor, Tensor]:
    """Return the first map's lattice positions, and the second map with room to be displaced."""
    from torch.nn import functional

    height, width = fmap1.shape[2:]
    one = functional.pad(fmap1, (*x.padding1(width), *y.padding1(height)))
    two = functional.pad(fmap2, (*x.padding2(width), *y.padding2(height)))
    return one[:, :, y.slice1(), x.slice1()], two


def _sum_taps(products: Tensor, y: _Lattice, x: _Lattice) -> Tensor:
    """Sum the taps, rows then columns, of (N, displacements, positions on the lattice)."""
    patch = (y.displacements, x.displacements)
    volume = products.reshape(products.shape[0], *patch, y.size, x.size)
    rows = sum(volume[..., tap, :] for tap in y.taps[1:]) + volume[..., y.taps[0], :]
    cost: Tensor = sum(rows[..., tap] for tap in x.taps[1:]) + rows[..., x.taps[0]]
    return cost.contiguous()


def _never(
    shape: tuple[int, int, int, int], geometry: Geometry, dtype: str, device: str
) -> str | None:
    if 0 in shape[:2]:
        return "covers no empty batch and no empty channels"
    return None


def _unfold_obstacle(
    shape: tuple[int, int, int, int], geometry: Geometry, dtype: str, device: str
) -> str | None:
    y, x = _lattices(shape, geometry)
    entries = prod(shape[:2]) * prod(geometry.patch_size) * y.size * x.size
    # The copies, their products, and the gradients of both.
    needed = 4 * entries * ITEMSIZE[dtype]
    return _never(shape, geometry, dtype, device) or too_large(needed, device)


def _all_pairs_obstacle(
    shape: tuple[int, int, int, int], geometry: Geometry, dtype: str, device: str
) -> str | None:
    y, x = _lattices(shape, geometry)
    entries = shape[0] * y.size * x.size * shape[2] * shape[3]
    # The products and their gradient, once more as a copy.
    needed = 3 * entries * ITEMSIZE[dtype]
    return _never(shape, geometry, dtype, device) or too_large(needed, device)


def _sampler_obstacle(
    shape: tuple[int, int, int, int], geometry: Geometry, dtype: str, device: str
) -> str | None:
    if device == "cpu" and dtype in ("float16", "bfloat16"):
        # Version 0.5 throws inside a parallel region there, which ends the process.
        return f"does not compute in {dtype} on the CPU"
    if not geometry.is_centred:
        return "has only centred patches"
    return None


def _plain_obstacle(
    shape: tuple[int, int, int, int], geometry: Geometry, dtype: str, device: str
) -> str | None:
    patch, spacing = geometry.patch_size[0], geometry.dilation_patch[0]
    if patch % 2 == 0 or geometry != Geometry(patch_size=patch, dilation_patch=spacing):
        return "has only square centred patches of odd size, without taps, stride and padding"
    return _never(shape, geometry, dtype, device)


def too_large(needed: int, device: str) -> str | None:
    """Say so if bytes are more than half of the memory that is free, or return None."""
    if device == "cuda":
        import torch

        available = torch.cuda.mem_get_info()[0]
    else:
        available = available_memory()
    if needed <= available // 2:
        return None
    return f"needs {needed / 1e9:.1f} GB, more than half of the {available / 1e9:.1f} GB free"


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "spatial-correlation-sampler", "spatial_correlation_sampler", sampler,
            _sampler_obstacle,
        ),
        Peer("torch-slices", "torch", slices, _never, l1=True),
        Peer("torch-unfold", "torch", unfold, _unfold_obstacle, l1=True),
        Peer("torch-all-pairs", "torch", all_pairs, _all_pairs_obstacle),
        Peer("taichi", "corr_taichi", taichi, _plain_obstacle,
             dtypes=("float16", "float32", "float64")),
        Peer("localcorr", "localcorr", triton, _plain_obstacle, cpu=False,
             dtypes=("float16", "float32")),
    )
}  # fmt: skip


def missing(peer: Peer, similarity: str, device: str = "cpu") -> str | None:
    """Return what a peer lacks: what must be installed, the similarity or the device; or None."""
    if similarity == "l1" and not peer.l1:
        return "has products only"
    if device == "cpu" and not peer.cpu:
        return "computes on a GPU only"
    absent = [name for name in dict.fromkeys(("torch", peer.module)) if not has(name)]
    if absent:
        return f"needs {' and '.join(absent)}, not installed"
    if device == "cuda" and not torch_finds_cuda():
        return "needs a torch that finds the GPU"
    return None
