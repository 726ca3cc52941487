"""The flow-guided lookup in ``cupycorr bench``: what is timed, where it looks, and others' ways.

A lookup has more passes than a cost volume. What does not depend on the coordinates is prepared
once for all lookups of a pair of maps: here the levels, elsewhere a volume of all pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cupycorr import sampling, verify
from cupycorr import verify_lookup as checks
from cupycorr.layer import DTYPES
from cupycorr.lookup import Lookup

from ..match import search
from ..options import LookupProblem
from . import features, measure, peers

if TYPE_CHECKING:
    from torch import Tensor

Floats = measure.Array
REACH, WINDOW, STEREO_WINDOW = 64, 9, 7
"""Pixels, as ``cupycorr match`` searches by default."""
JITTER = 20
"""Positions by which neighbours of a rough flow look elsewhere."""


class Implementation(NamedTuple):
    """An implementation to be measured, on arrays of the library.

    prepare : (fmap1, fmap2, lookup) -> tuple of arrays
    look : (fmap1, prepared, coords, lookup) -> cost
    vjp : (grad_cost, fmap1, prepared, coords, lookup) -> gradients of fmap1 and of what is
        prepared; None for autograd's
    has_gradients : whether it has those of both maps
    """

    name: str
    library: str
    prepare: Callable[[Any, Any, Lookup], tuple[Any, ...]]
    look: Callable[[Any, tuple[Any, ...], Any, Lookup], Any]
    vjp: Callable[[Any, Any, tuple[Any, ...], Any, Lookup], Sequence[Any]] | None = None
    has_gradients: bool = True


def ours(engine: str) -> Implementation:
    """Return this package on NumPy or CuPy arrays, by its plain kernels, or on torch tensors."""
    plain = engine == "plain"
    cost = checks.plain_cost if plain else sampling.correlation_lookup
    grads = checks.plain_grads if plain else sampling.correlation_lookup_vjp

    def prepare(fmap1: Any, fmap2: Any, lookup: Lookup) -> tuple[Any, ...]:
        return sampling.pyramid(fmap2, lookup)

    def vjp(
        grad: Any, fmap1: Any, levels: tuple[Any, ...], coords: Any, lookup: Lookup
    ) -> Sequence[Any]:
        grad1, grad2, _ = grads(grad, fmap1, levels, coords, lookup)
        return grad1, *grad2

    library = "cupy" if plain else engine
    return Implementation(
        f"cupycorr {engine}", library, prepare, cost, None if engine == "torch" else vjp
    )


# Where a lookup looks.


def flow(problem: LookupProblem, kind: str) -> Floats:
    """Return the flow (1, 2, H, W), (dx, dy) in positions: waves, and for "rough" noise on them."""
    height, width = problem.shape[2:]
    y, x = np.indices((height, width)) / np.array([height, width]).reshape(2, 1, 1)
    waves = np.stack([np.sin(2 * np.pi * (x + y)), np.cos(2 * np.pi * (x - y))])
    field = min(height, width) / 8 * waves
    if kind == "rough":
        field += np.random.default_rng(3).uniform(-JITTER, JITTER, field.shape)
    return field[None]


def image_flow(
    problem: LookupProblem, images: tuple[features.Image, features.Image], downscale: int
) -> Floats:
    """Return the flow (1, 2, H, W) that ``cupycorr match`` finds, in positions of the maps.

    It is the mean over the pixels of a position; where nothing matches it is the median.
    """
    stereo = problem.lookup.in_rows
    steps = search.stereo_steps if stereo else search.flow_steps
    plan = steps(images[0].shape, REACH, STEREO_WINDOW if stereo else WINDOW)
    field = search.match(*images, plan)
    height, width = problem.shape[2:]
    blocks = field[::-1, : height * downscale, : width * downscale]
    blocks = blocks.reshape(2, height, downscale, width, downscale)
    known = ~np.isnan(blocks)
    count = known.sum((2, 4))
    mean = np.where(known, blocks, 0).sum((2, 4)) / np.maximum(1, count) / downscale
    for channel, seen in zip(mean, count > 0, strict=True):
        channel[~seen] = np.median(channel[seen]) if seen.any() else 0
    result: Floats = mean[None]
    return result


def coordinates(problem: LookupProblem, flow: Floats) -> Floats:
    """Return coords (N, 2, H, W) of a flow; for stereo every position stays in its row."""
    samples, _, height, width = problem.shape
    y, x = np.indices((height, width))
    coords = np.stack([x, y]) + flow
    if problem.lookup.in_rows:
        coords[:, 1] = y
    return np.repeat(coords, samples, 0)


# What is timed.


class _Arrays(NamedTuple):
    fmap1: Any
    fmap2: Any
    grad_cost: Any
    coords: Any


def jobs(
    implementations: list[Implementation],
    problem: LookupProblem,
    maps: tuple[Floats, Floats],
    coords: Floats,
    dtype: str,
    device: str = "cpu",
) -> list[measure.Job]:
    """Give implementations of a lookup their arrays, as `measure.jobs`.

    Parameters
    ----------
    coords : array (N, 2, H, W)
        Where they look when they are timed.
    """
    generator = np.random.default_rng(1)
    grad = generator.standard_normal(problem.cost_shape, np.float32)
    reference = cache(partial(_reference, problem, dtype))
    arrays = {
        library: _arrays((*maps, grad, coords), problem, library, dtype, device)
        for library in dict.fromkeys(one.library for one in implementations)
    }
    return [
        measure.Job(
            one.name,
            one.library,
            partial(_mistake, one, problem, dtype, reference, device),
            _steps(one, arrays[one.library], problem.lookup),
        )
        for one in implementations
    ]


def _arrays(
    values: tuple[Floats, ...], problem: LookupProblem, library: str, dtype: str, device: str
) -> _Arrays:
    *three, coords = values
    wide = "float64" if dtype == "float64" else "float32"
    maps = measure.library_maps(three, library, dtype, device, problem.channels_last)
    return _Arrays(*maps, measure.library_array(coords, library, wide, device))


def _steps(
    one: Implementation, arrays: _Arrays, lookup: Lookup
) -> dict[str, Callable[[dict[str, Any]], Any]]:
    fmap1, fmap2, grad, coords = arrays

    def prepare(done: dict[str, Any]) -> Any:
        return one.prepare(fmap1, fmap2, lookup)

    def forward(done: dict[str, Any]) -> Any:
        prepared = done["prepare"]
        if one.vjp is None:
            # Leaves: the graph of a lookup ends where that of its preparation does.
            prepared = done["leaves"] = tuple(p.detach().requires_grad_() for p in prepared)
        return one.look(fmap1, prepared, coords, lookup)

    def backward(done: dict[str, Any]) -> Any:
        if one.vjp is not None:
            return one.vjp(grad, fmap1, done["prepare"], coords, lookup)
        return _autograd(done["forward"], (fmap1, *done["leaves"]), grad)

    def prepare_backward(done: dict[str, Any]) -> Any:
        outputs = [p for p in done["prepare"] if p.grad_fn is not None]
        upstream = [g for p, g in zip(done["prepare"], done["backward"][1:], strict=True)
                    if p.grad_fn is not None]  # fmt: skip
        return _autograd(outputs, (fmap1, fmap2), upstream) if outputs else ()

    steps: dict[str, Callable[[dict[str, Any]], Any]] = {"prepare": prepare, "forward": forward}
    if not one.has_gradients:
        return steps
    steps["backward"] = backward
    return steps | ({"prepare backward": prepare_backward} if one.vjp is None else {})


def _autograd(outputs: Any, inputs: tuple[Any, ...], upstream: Any) -> tuple[Any, ...]:
    import torch

    return torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)


class _Reference(NamedTuple):
    """Values, and what this package's NumPy engine makes of them in float64."""

    values: tuple[Floats, ...]
    """Maps, upstream gradient and coordinates."""
    cost: tuple[Floats, Floats]
    """The cost, and the sums of its terms' absolute values; so are the others."""
    grads: tuple[tuple[Floats, Floats], ...]
    """Gradients of fmap1 and of the levels."""
    grad_fmap2: tuple[Floats, Floats]


def _reference(problem: LookupProblem, dtype: str) -> _Reference:
    """Return maps of -1, 0 and 1, looked up at odd sixteenths: those are integers on no level."""
    generator = np.random.default_rng(2)
    lookup, engine = problem.lookup, checks.numpy_engine()
    shapes = problem.shape, problem.shape, problem.cost_shape
    fmap1, fmap2, grad = (generator.integers(-1, 2, shape).astype(float) for shape in shapes)
    coords = coordinates(problem, np.rint(8 * flow(problem, "rough")) / 8 + 1 / 16)

    def results(one: Floats, two: Floats, upstream: Floats) -> list[Floats]:
        operands = checks.Operands(one, engine.pyramid(two, lookup, dtype), coords)
        grad1, grads2, _ = engine.grads(upstream, operands, lookup, "float64")
        whole = engine.grads(upstream, operands._replace(fmap2=two), lookup, "float64")[1]
        return [engine.cost(operands, lookup, "float64"), np.asarray(whole), grad1, *grads2]

    sizes = results(np.abs(fmap1), np.abs(fmap2), np.abs(grad))
    cost, whole, *grads = zip(results(fmap1, fmap2, grad), sizes, strict=True)
    return _Reference((fmap1, fmap2, grad, coords), cost, tuple(grads), whole)


def _mistake(
    one: Implementation,
    problem: LookupProblem,
    dtype: str,
    made: Callable[[], _Reference],
    device: str = "cpu",
) -> str | None:
    """Describe the first result beyond the bound of round-off, or return None."""
    lookup, reference = problem.lookup, made()
    fmap1, fmap2, grad, coords = _arrays(reference.values, problem, one.library, dtype, device)
    prepared = one.prepare(fmap1, fmap2, lookup)
    cost = one.look(fmap1, prepared, coords, lookup)
    # Coordinates of others are normalised to the map and back: an error of the map's size, on
    # weights of at least 1/16.
    other = 0 if one.name.startswith("cupycorr") else 64 * sum(problem.shape[2:])
    corners, positions = 4 * prod(lookup.patch_size) * lookup.levels, prod(problem.shape[2:])
    unit = DTYPES[dtype]
    stores = lookup.levels * int(unit.rounding / DTYPES[unit.accumulator].rounding)
    bounds = [("cost", cost, reference.cost, problem.shape[1] + 6)]
    if one.vjp is None and one.has_gradients:
        grad1, grad2 = _autograd(cost, (fmap1, fmap2), grad.to(cost.dtype))
        bounds += [("grad_fmap1", grad1, reference.grads[0], corners + 6),
                   ("grad_fmap2", grad2, reference.grad_fmap2, positions + stores)]  # fmt: skip
    elif one.vjp is not None:
        grads = one.vjp(grad, fmap1, prepared, coords, lookup)
        names = "grad_fmap1", *(f"gradient of level {level}" for level in range(lookup.levels))
        bounds += [
            (name, got, wanted, (positions if name.startswith("gradient") else corners) + 6)
            for name, got, wanted in zip(names, grads, reference.grads, strict=True)
        ]
    for name, got, (want, size), terms in bounds:
        values = measure.widened(got, np.dtype(np.float64))
        error = verify.excess(values, want, size, terms + other, dtype)
        if error is not None:
            return f"{name}: {error}"
    return None


# Other ways.


def volume(fmap1: Tensor, fmap2: Tensor, lookup: Lookup) -> tuple[Tensor, ...]:
    """Multiply all positions with all positions, of their row for stereo, and pool the products.

    In float32 at least, as RAFT does.
    """
    fmap1, fmap2 = _wide(fmap1, fmap2)
    samples, channels, height, width = fmap1.shape
    if lookup.in_rows:
        one, two = fmap1.permute(0, 2, 3, 1), fmap2.permute(0, 2, 1, 3)
    else:
        one, two = fmap1.flatten(2).transpose(1, 2), fmap2.flatten(2)
    products = one @ two / channels**0.5
    size = (1 if lookup.in_rows else height, width)
    return _pooled(products.reshape(samples * height * width, 1, *size), lookup)


def sample(fmap1: Tensor, levels: tuple[Tensor, ...], coords: Tensor, lookup: Lookup) -> Tensor:
    """Sample the volume of each position at its patch, level by level."""
    import torch
    from torch.nn import functional

    samples, _, height, width = coords.shape
    dy, dx = (
        torch.tensor(list(steps), dtype=coords.dtype, device=coords.device)
        for steps in lookup.displacements
    )
    costs = []
    for number, level in enumerate(levels):
        rows, columns = level.shape[2:]
        x, y = (
            coords[:, channel].reshape(-1, 1, 1) / pool**number
            for channel, pool in enumerate(lookup.pool[::-1])
        )
        y = 0 * y if lookup.in_rows else y
        # Normalised coordinates: -1 and 1 are the first and the last cell.
        x, y = 2 * (x + dx) / (columns - 1) - 1, 2 * (y + dy[:, None]) / max(1, rows - 1) - 1
        at = torch.stack([x.expand(-1, *lookup.patch_size), y.expand(-1, *lookup.patch_size)], -1)
        patch = functional.grid_sample(level, at, align_corners=True)
        costs.append(patch.reshape(samples, height, width, *lookup.patch_size))
    cost = torch.stack(costs, 1).permute(0, 1, 4, 5, 2, 3)
    return (cost.transpose(2, 3) if lookup.x_first else cost).contiguous()


def torchvision_volume(fmap1: Tensor, fmap2: Tensor, lookup: Lookup) -> tuple[Tensor, ...]:
    """Prepare the volume of torchvision's RAFT."""
    block = _torchvision_block(lookup)
    block.build_pyramid(*_wide(fmap1, fmap2))
    return tuple(block.corr_pyramid)


def torchvision(fmap1: Tensor, levels: tuple[Tensor, ...], coords: Tensor, lookup: Lookup) -> Any:
    """Look up the volume of torchvision's RAFT."""
    block = _torchvision_block(lookup)
    block.corr_pyramid = list(levels)
    return _ordered(block.index_pyramid(coords), lookup)


def _torchvision_block(lookup: Lookup) -> Any:
    from torchvision.models.optical_flow.raft import CorrBlock

    return CorrBlock(num_levels=lookup.levels, radius=lookup.radius[0])


def raft_volume(fmap1: Tensor, fmap2: Tensor, lookup: Lookup) -> tuple[Tensor, ...]:
    """Prepare the volume of RAFT's own program, whose folder core must be on Python's path."""
    from corr import CorrBlock

    return tuple(CorrBlock(*_wide(fmap1, fmap2), lookup.levels, lookup.radius[0]).corr_pyramid)


def raft(fmap1: Tensor, levels: tuple[Tensor, ...], coords: Tensor, lookup: Lookup) -> Any:
    """Look up the volume of RAFT's own program."""
    from corr import CorrBlock

    block = CorrBlock.__new__(CorrBlock)  # without another volume
    block.num_levels, block.radius, block.corr_pyramid = lookup.levels, lookup.radius[0], levels
    return _ordered(block(coords), lookup)


def localcorr(fmap1: Tensor, maps: tuple[Tensor, ...], coords: Tensor, lookup: Lookup) -> Any:
    """Call localcorr: its kernels in Triton, or on the CPU its form in standard operations."""
    radius, levels = lookup.radius[0], lookup.levels
    if fmap1.is_cuda:
        from localcorr import get_localcorr_block

        cost = get_localcorr_block(fmap1, maps[0], levels, radius)(coords)
    else:
        from localcorr.onnx_generic import localcorr_pyramid_onnx_generic

        cost = localcorr_pyramid_onnx_generic(
            fmap1, maps[0], coords, num_levels=levels, radius=radius
        )
        cost = cost / fmap1.shape[1] ** 0.5
    return _ordered(cost, lookup)


def points(fmap1: Tensor, fmap2: Tensor, lookup: Lookup) -> tuple[Tensor, ...]:
    """Prepare pixels (N, H W, C) and levels (N, H, W, C) for fused-local-corr."""
    levels = _pooled(fmap2, lookup)
    pixels = fmap1.flatten(2).transpose(1, 2)
    return pixels.contiguous(), *(level.permute(0, 2, 3, 1).contiguous() for level in levels)


def fused_local_corr(
    fmap1: Tensor, maps: tuple[Tensor, ...], coords: Tensor, lookup: Lookup
) -> Any:
    """Call fused-local-corr at each point of the patches; it has no gradient of the second map."""
    import torch
    from local_corr import local_corr

    samples, _, height, width = coords.shape
    steps = torch.cartesian_prod(*(
        torch.tensor(list(axis), dtype=coords.dtype, device=coords.device)
        for axis in lookup.displacements
    )).flip(1)  # fmt: skip
    costs = []
    for number, level in enumerate(maps[1:]):
        pools = coords.new_tensor([pool**number for pool in lookup.pool[::-1]])
        centres = coords.flatten(2).transpose(1, 2) / pools
        # Its pixels reach from 0 to 1, and it reads strides of points as if they had none.
        at = (centres.unsqueeze(2) + steps + 0.5).contiguous()
        costs.append(local_corr(maps[0], level, at, mode="bilinear"))
    cost = torch.stack(costs, 1).transpose(2, 3) / fmap1.shape[1] ** 0.5
    cost = cost.reshape(samples, lookup.levels, *lookup.patch_size, height, width)
    return cost.transpose(2, 3) if lookup.x_first else cost


def _ordered(cost: Any, lookup: Lookup) -> Any:
    """Give the channels of RAFT's blocks, x first, the axes of a cost."""
    height, width = lookup.patch_size
    result = cost.reshape(len(cost), lookup.levels, width, height, *cost.shape[-2:])
    return result if lookup.x_first else result.transpose(2, 3)


def _pooled(finest: Tensor, lookup: Lookup) -> tuple[Tensor, ...]:
    """Return all levels of maps (N, C, H, W), or of volumes."""
    from torch.nn import functional

    levels = [finest]
    for _ in range(1, lookup.levels):
        levels.append(functional.avg_pool2d(levels[-1], lookup.pool))
    return tuple(levels)


def _wide(*fmaps: Tensor) -> tuple[Tensor, ...]:
    """Return maps in float32 at least, as RAFT gives them to its volume."""
    return tuple(fmap.float() if fmap.element_size() < 4 else fmap for fmap in fmaps)


def _volume_obstacle(
    shape: tuple[int, int, int, int], lookup: Lookup, dtype: str, device: str
) -> str | None:
    sizes = lookup.level_sizes(*shape[2:])
    if sizes[-1][1] == 1 or (sizes[-1][0] == 1 and not lookup.in_rows):
        return "divides by 0 on a level of one row or column"
    cells = sum(w if lookup.in_rows else h * w for h, w in sizes)
    # The products, their gradient, and once more what either of them is computed from.
    needed = 3 * shape[0] * prod(shape[2:]) * cells * max(4, peers.ITEMSIZE[dtype])
    return peers.too_large(needed, device)


def _square_obstacle(
    shape: tuple[int, int, int, int], lookup: Lookup, dtype: str, device: str
) -> str | None:
    if Lookup(lookup.radius[0], lookup.levels, order=lookup.order) != lookup:
        return "has only square patches without dilation, and levels of half the size"
    return None


def _block_obstacle(
    shape: tuple[int, int, int, int], lookup: Lookup, dtype: str, device: str
) -> str | None:
    square = _square_obstacle(shape, lookup, dtype, device)
    return square or _volume_obstacle(shape, lookup, dtype, device)


IMPLEMENTATIONS = {
    one.name: one
    for one in (
        Implementation("torch-volume", "torch", volume, sample),
        Implementation("torchvision", "torch", torchvision_volume, torchvision),
        Implementation("raft", "torch", raft_volume, raft),
        Implementation("localcorr", "torch", lambda fmap1, fmap2, _: (fmap2,), localcorr),
        Implementation(
            "fused-local-corr", "torch", points, fused_local_corr, has_gradients=False
        ),
    )
}  # fmt: skip
PEERS = {
    name: peers.Peer(name, module, IMPLEMENTATIONS[name].look, obstacle, dtypes=dtypes)
    for name, module, obstacle, dtypes in (
        ("torch-volume", "torch", _volume_obstacle, tuple(DTYPES)),
        ("torchvision", "torchvision", _block_obstacle, tuple(DTYPES)),
        ("raft", "corr", _block_obstacle, ("float16", "bfloat16", "float32")),
        ("localcorr", "localcorr", _square_obstacle, ("float32",)),
        ("fused-local-corr", "local_corr", _square_obstacle, ("float32",)),
    )
}
