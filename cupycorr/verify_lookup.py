"""Checks of a lookup engine: exact integers, the adjoint identity, and a bound on round-off.

They are the checks of `verify`, with coordinates that are eighths in the place of geometries: then
weights are multiples of powers of two, and small integers keep every sum exact, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupycorr import sampling
from cupycorr.lookup import Lookup, scale_of
from cupycorr.verify import (
    Array,
    Check,
    difference,
    excess,
    from_cupy,
    from_torch,
    round_to,
    to_dtype,
)

Levels = tuple[Array, ...]
SPECIAL = (np.nan, np.inf, -np.inf, 1e30, -1e30, 2.0**31, -(2.0**31))
NOWHERE = 1 << 20
"""Cells from which no patch reaches a map that is checked."""
ALL = (True, True, True)


class Operands(NamedTuple):
    """The arrays and the scale of `cupycorr.correlation_lookup`, the arrays in float64."""

    fmap1: Array
    fmap2: Array | Levels
    coords: Array
    scale: float | None = None
    index1: npt.NDArray[np.int64] | None = None
    index2: npt.NDArray[np.int64] | None = None


Grads = tuple[Array, Array | Levels, Array]


class Engine(NamedTuple):
    """An implementation under test. It gets and returns float64 arrays, and computes in a dtype.

    pyramid : (fmap2, lookup, dtype name) -> levels
    cost : (operands, lookup, dtype name) -> cost
    grads : (grad_cost, operands, lookup, dtype name) -> gradients by fmap1, fmap2 and coords, the
        second one a tuple if fmap2 is.
    """

    name: str
    pyramid: Callable[[Array, Lookup, str], Levels]
    cost: Callable[[Operands, Lookup, str], Array]
    grads: Callable[[Array, Operands, Lookup, str], Grads]


def numpy_engine() -> Engine:
    """Return this package's NumPy engine."""
    functions = sampling.pyramid, sampling.correlation_lookup, sampling.correlation_lookup_vjp
    return _array_engine("numpy", to_dtype, lambda array: np.asarray(array, np.float64), *functions)


def cupy_engine(*, plain: bool = False) -> Engine:
    """Return this package's CUDA engine, on the current device; needs CuPy.

    Parameters
    ----------
    plain : bool, default False
        Call the engine for its plain kernels only, past the public functions.
    """
    import cupy

    functions = (
        (plain_cost, plain_grads)
        if plain
        else (sampling.correlation_lookup, sampling.correlation_lookup_vjp)
    )

    def array(values: npt.NDArray[Any], dtype: str) -> Any:
        return cupy.asarray(to_dtype(values, dtype))

    name = "cupy, plain kernels" if plain else "cupy"
    return _array_engine(name, array, from_cupy, sampling.pyramid, *functions)


def plain_cost(
    fmap1: Any,
    fmap2: Any,
    coords: Any,
    lookup: Lookup,
    *,
    scale: float | None = None,
    index1: Any = None,
    index2: Any = None,
) -> Any:
    """Compute `cupycorr.correlation_lookup` of contiguous CuPy arrays by the plain kernels."""
    import cupy

    from cupycorr.cuda import lookup as cuda

    inputs = _inputs(fmap1, fmap2, coords, lookup, index1, index2)
    cost = cupy.empty(lookup.cost_shape(fmap1.shape, coords.shape), fmap1.dtype)
    cuda.run("cost", {**inputs, "cost": cost}, lookup, scale_of(scale, fmap1.shape[1]), plain=True)
    return cost


def plain_grads(
    grad_cost: Any,
    fmap1: Any,
    fmap2: Any,
    coords: Any,
    lookup: Lookup,
    *,
    scale: float | None = None,
    index1: Any = None,
    index2: Any = None,
    needs: tuple[bool, bool, bool] = (True, True, False),
) -> tuple[Any, Any, Any]:
    """Compute `cupycorr.correlation_lookup_vjp` of contiguous CuPy arrays by the plain kernels."""
    import cupy

    from cupycorr.cuda import lookup as cuda

    inputs = _inputs(fmap1, fmap2, coords, lookup, index1, index2)
    results = {
        "grad_fmap1": cupy.empty_like(fmap1),
        # In memory (F, h, w, C), as the engine writes them.
        "grad_levels": [
            cupy.empty_like(cupy.moveaxis(level, 1, -1), order="C").transpose(0, 3, 1, 2)
            for level in inputs["levels"]
        ],
        "grad_coords": cupy.empty_like(coords),
    }
    wanted = {name: one for (name, one), need in zip(results.items(), needs, strict=True) if need}
    arrays = {**inputs, "grad_cost": grad_cost, **wanted}
    cuda.run("grads", arrays, lookup, scale_of(scale, fmap1.shape[1]), plain=True)
    grad2 = wanted.get("grad_levels")
    if grad2 is not None and not isinstance(fmap2, (tuple, list)):
        arrays = {"grad_levels": grad2, "grad_fmap2": cupy.empty_like(fmap2)}
        cuda.run("pyramid_grads", arrays, lookup, 1.0)
        grad2 = arrays["grad_fmap2"]
    return wanted.get("grad_fmap1"), grad2, wanted.get("grad_coords")


def torch_engine(device: str = "cpu") -> Engine:
    """Return this package's torch operators, with autograd's gradients; needs torch.

    Parameters
    ----------
    device : str, default "cpu"
        Where the tensors lie.
    """
    import torch

    def tensor(array: npt.NDArray[Any], dtype: str) -> Any:
        return torch.from_numpy(np.array(array)).to(device, getattr(torch, dtype))

    def pyramid(fmap2: Array, lookup: Lookup, dtype: str) -> Levels:
        return tuple(from_torch(one) for one in sampling.pyramid(tensor(fmap2, dtype), lookup))

    def cost(operands: Operands, lookup: Lookup, dtype: str) -> Array:
        arrays, keywords = _converted(operands, tensor, dtype)
        return from_torch(sampling.correlation_lookup(*arrays, lookup, **keywords))

    def grads(grad: Array, operands: Operands, lookup: Lookup, dtype: str) -> Grads:
        (fmap1, fmap2, coords), keywords = _converted(operands, tensor, dtype)
        maps = fmap2 if isinstance(fmap2, tuple) else (fmap2,)
        leaves = [leaf.requires_grad_() for leaf in (fmap1, *maps, coords)]
        result = sampling.correlation_lookup(fmap1, fmap2, coords, lookup, **keywords)
        grad1, *grads2, grad3 = map(
            from_torch, torch.autograd.grad(result, leaves, tensor(grad, dtype))
        )
        return grad1, tuple(grads2) if isinstance(fmap2, tuple) else grads2[0], grad3

    return Engine("torch", pyramid, cost, grads)


def definition() -> Engine:
    """Return the definition itself, one corner of one displacement at a time, in float64.

    It is as slow as it is plain, and shares no line with the engines. Levels, and the gradients of
    those of a map, are rounded to the dtype, and coordinates are divided and floored in theirs.
    """
    return Engine("definition", _levels, _cost, _grads)


def check(
    engine: Engine,
    shape: tuple[int, int, int, int],
    lookup: Lookup,
    dtype: str,
    *,
    seed: int = 0,
    oracle: Engine | None = None,
) -> Iterator[Check]:
    """Check a lookup engine on maps of one shape and dtype.

    Parameters
    ----------
    engine : Engine
        What is checked.
    shape : (N, C, H, W)
        Shape of both maps.
    lookup : Lookup
        What is sampled. Only where pools are powers of two can results be exact.
    dtype : {"float16", "bfloat16", "float32", "float64"}
        What the engine computes in; "bfloat16" needs ml_dtypes with the NumPy engine.
    seed : int, default 0
        Seed of the random maps and coordinates.
    oracle : Engine, optional
        The engine to compare with; by default the definition.
    """
    oracle = definition() if oracle is None else oracle
    rng = np.random.default_rng(seed)
    chance = _chance(shape, lookup, dtype)
    if chance > 0:
        fmap2 = _sparse(rng, shape, chance)
        both = (one.pyramid(fmap2, lookup, dtype) for one in (engine, oracle))
        for level, pair in enumerate(zip(*both, strict=True)):
            yield Check(f"level {level} exact on integers", difference(*pair))
    for where in ("", ", edges", ", coordinates beyond all maps") if chance > 0 else ():
        operands = _exact_operands(where, shape, lookup, chance, rng)
        cost_shape = lookup.cost_shape(operands.fmap1.shape, operands.coords.shape)
        grad = _sparse(rng, cost_shape, chance)
        for one in _check_exactly(engine, oracle, grad, operands, lookup, dtype):
            yield one._replace(name=one.name + where)
    yield from _check_round_off(engine, oracle, shape, lookup, dtype, rng)


def _check_exactly(
    engine: Engine, oracle: Engine, grad: Array, operands: Operands, lookup: Lookup, dtype: str
) -> Iterator[Check]:
    fmap1, fmap2, wide = operands.fmap1, np.asarray(operands.fmap2), _wide(dtype)
    cost, want = (one.cost(operands, lookup, dtype) for one in (engine, oracle))
    yield Check("cost exact on integers", difference(cost, round_to(want, dtype)))
    grads, wants = (one.grads(grad, operands, lookup, dtype) for one in (engine, oracle))
    for name, got, wanted, kind in zip(
        ("fmap1", "fmap2", "coords"), grads, wants, (dtype, dtype, wide), strict=True
    ):
        error = difference(np.asarray(got), round_to(np.asarray(wanted), kind))
        yield Check(f"grad_{name} exact on integers", error)
    if dtype == wide and np.isfinite(operands.coords).all():
        pairs = (cost, grad), (fmap1, grads[0]), (fmap2, np.asarray(grads[1]))
        sums = [float((one * other).sum()) for one, other in pairs]
        equal = sums[0] == sums[1] == sums[2]
        yield Check("adjoint identity", None if equal else f"inner products are {sums}")


def _check_round_off(
    engine: Engine,
    oracle: Engine,
    shape: tuple[int, int, int, int],
    lookup: Lookup,
    dtype: str,
    rng: np.random.Generator,
) -> Iterator[Check]:
    """Check random values against the bounds of `verify.excess`; levels are taken as they are."""
    fmap1, fmap2 = (round_to(rng.standard_normal(shape), dtype) for _ in range(2))
    levels = engine.pyramid(fmap2, lookup, dtype)
    for level, (finer, coarser) in enumerate(pairwise(levels), 1):
        want, size = (_pooled(one, lookup) for one in (finer, np.abs(finer)))
        error = excess(coarser, want, size, prod(lookup.pool), dtype)
        yield Check(f"level {level} round-off", error)
    coords = round_to(_spread_coords(shape, lookup, rng, steps=None), _wide(dtype))
    grad = round_to(rng.standard_normal(lookup.cost_shape(shape, coords.shape)), dtype)
    operands = Operands(fmap1, oracle.pyramid(fmap2, lookup, dtype), coords)
    sizes = Operands(np.abs(fmap1), tuple(np.abs(level) for level in operands.fmap2), coords)
    cost, want = (one.cost(operands, lookup, dtype) for one in (engine, oracle))
    size = _cost(sizes, lookup, dtype)
    yield Check("cost round-off", excess(cost, want, size, shape[1] + 6, dtype))
    got, wants = (one.grads(grad, operands, lookup, dtype) for one in (engine, oracle))
    most = _grads(np.abs(grad), sizes, lookup, dtype, signs=(1.0, 1.0))
    # The terms: corners of a position, positions that may read a cell, and both of a corner.
    corners, positions = 4 * prod(lookup.patch_size) * lookup.levels, shape[0] * prod(shape[2:])
    for name, *arrays, terms, kind in (
        ("grad_fmap1", got[0], wants[0], most[0], corners, dtype),
        *(
            (f"grad_fmap2, level {level},", *three, positions, dtype)
            for level, three in enumerate(zip(got[1], wants[1], most[1], strict=True))
        ),
        ("grad_coords", got[2], wants[2], most[2], shape[1] + corners, _wide(dtype)),
    ):
        one, other, size = (np.asarray(array) for array in arrays)
        yield Check(f"{name} round-off", excess(one, other, size, terms + 6, kind))


# Inputs.


def _exact_operands(
    where: str,
    shape: tuple[int, int, int, int],
    lookup: Lookup,
    chance: float,
    rng: np.random.Generator,
) -> Operands:
    """Return operands whose results are exact; ``where`` says what is unusual about them."""
    fmap1, fmap2 = _sparse(rng, shape, chance), _sparse(rng, shape, chance)
    if "edges" in where and shape[0] > 0:
        coords = _spread_coords((shape[0] + 2, *shape[1:]), lookup, rng, steps=8)
        index1, index2 = rng.integers(0, shape[0], (2, shape[0] + 2))
        return Operands(fmap1, fmap2, coords, 0.5, index1, index2)
    coords = _spread_coords(shape, lookup, rng, steps=8)
    if "beyond" in where and coords.size:
        places = rng.choice(coords.size, min(coords.size, 2 * len(SPECIAL)), replace=False)
        coords.flat[places] = (SPECIAL * 2)[: len(places)]
    return Operands(fmap1, fmap2, coords, 0.5)


def _chance(shape: tuple[int, int, int, int], lookup: Lookup, dtype: str) -> float:
    """Return how many of the exact maps' values may be other than 0, such that sums stay exact.

    Weights are multiples of 1/64 and of a pool's area per level, and so are the levels' cells, of
    which so many add up to what the accumulator holds. 0 if no sum is exact.
    """
    area = prod(lookup.pool)
    if area & (area - 1):
        return 0.0
    digits = 53 if dtype == "float64" else 24
    budget = 2.0**digits / (4 * 64 * area ** (2 * (lookup.levels - 1)))
    channels, taps = max(1, shape[1]), prod(lookup.patch_size) * lookup.levels
    if budget < 1:
        return 0.0
    pairs, triples = budget / max(channels, taps), 4 * budget / (channels * taps)
    return float(min(2 / 3, pairs ** (1 / 2), triples ** (1 / 3)))


def _sparse(rng: np.random.Generator, shape: tuple[int, ...], chance: float) -> Array:
    """Return values -1, 0 and 1; ``chance`` of them are not 0."""
    return rng.choice([-1.0, 0.0, 1.0], shape, p=[chance / 2, 1 - chance, chance / 2])


def _spread_coords(
    shape: tuple[int, ...], lookup: Lookup, rng: np.random.Generator, *, steps: int | None
) -> Array:
    """Return coordinates (N, 2, H, W) in the map and around it: of 1/steps, or of any value."""
    samples, _, height, width = shape
    coords = np.empty((samples, 2, height, width))
    for channel, (size, reach) in enumerate(zip((width, height), lookup.reach[::-1], strict=True)):
        low, high = -reach - 2, size + reach + 2
        coords[:, channel] = (
            rng.uniform(low, high, coords[:, channel].shape)
            if steps is None
            else rng.integers(steps * low, steps * high, coords[:, channel].shape) / steps
        )
    return coords


def _wide(dtype: str) -> str:
    """Return the dtype of coords beside maps of a dtype."""
    return "float64" if dtype == "float64" else "float32"


# Engines of arrays.


def _array_engine(
    name: str,
    array: Callable[[npt.NDArray[Any], str], Any],
    host: Callable[[Any], Array],
    pyramid_of: Callable[..., Any],
    cost_of: Callable[..., Any],
    grads_of: Callable[..., Any],
) -> Engine:
    """Return the engine of a library's arrays, made by ``array`` and read by ``host``."""

    def pyramid(fmap2: Array, lookup: Lookup, dtype: str) -> Levels:
        return tuple(host(level) for level in pyramid_of(array(fmap2, dtype), lookup))

    def cost(operands: Operands, lookup: Lookup, dtype: str) -> Array:
        arrays, keywords = _converted(operands, array, dtype)
        return host(cost_of(*arrays, lookup, **keywords))

    def grads(grad: Array, operands: Operands, lookup: Lookup, dtype: str) -> Grads:
        arrays, keywords = _converted(operands, array, dtype)
        grad1, grad2, grad3 = grads_of(array(grad, dtype), *arrays, lookup, **keywords, needs=ALL)
        is_levels = isinstance(grad2, (tuple, list))
        return host(grad1), tuple(map(host, grad2)) if is_levels else host(grad2), host(grad3)

    return Engine(name, pyramid, cost, grads)


def _converted(
    operands: Operands, convert: Callable[[npt.NDArray[Any], str], Any], dtype: str
) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
    """Return the maps and coords as a library's arrays, and the arguments that have names."""
    fmap1, fmap2, coords, scale, *indices = operands
    maps = (
        tuple(convert(level, dtype) for level in fmap2)
        if isinstance(fmap2, tuple)
        else convert(fmap2, dtype)
    )
    keywords = {
        name: None if index is None else convert(index, "int64")
        for name, index in zip(("index1", "index2"), indices, strict=True)
    }
    return (convert(fmap1, dtype), maps, convert(coords, _wide(dtype))), {
        **keywords,
        "scale": scale,
    }


def _inputs(
    fmap1: Any, fmap2: Any, coords: Any, lookup: Lookup, index1: Any, index2: Any
) -> dict[str, Any]:
    levels = fmap2 if isinstance(fmap2, (tuple, list)) else sampling.pyramid(fmap2, lookup)
    arrays = {"fmap1": fmap1, "levels": levels, "coords": coords}
    return arrays | {"index1": index1, "index2": index2}


def _scale(scale: float | None, fmap1: Any) -> float:
    return max(1, fmap1.shape[1]) ** -0.5 if scale is None else scale


# The definition.


def _pooled(fmap: Array, lookup: Lookup) -> Array:
    """Return the next level of a map (F, C, H, W), not rounded."""
    (py, px), (height, width) = lookup.pool, fmap.shape[2:]
    rows, columns = height // py, width // px
    cells = fmap[:, :, : rows * py, : columns * px]
    mean: Array = cells.reshape(*fmap.shape[:2], rows, py, columns, px).sum((3, 5)) / (py * px)
    return mean


def _levels(fmap2: Array, lookup: Lookup, dtype: str) -> Levels:
    levels = [fmap2]
    for _ in range(1, lookup.levels):
        levels.append(round_to(_pooled(levels[-1], lookup), dtype))
    return tuple(levels)


class _Corner(NamedTuple):
    """One corner of one displacement of one entry of coords, on one level."""

    where: tuple[int, int, int, int]
    """Entry, level and the displacement's axes in the cost."""
    maps: tuple[int, int]
    """The numbers of the maps of fmap1 and fmap2."""
    positions: npt.NDArray[np.intp]
    """Those whose corner lies in the level, of all in a row; the rest is for these."""
    cells: tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]
    """Rows and columns."""
    weights: Array
    slopes: tuple[Array, Array]
    """The derivatives of the weights by x and y, in cells of the level."""


def _corners(
    operands: Operands, levels: Levels, lookup: Lookup, dtype: str, signs: tuple[float, float]
) -> Iterator[_Corner]:
    """Yield every corner; ``signs`` are the derivatives of the weights 1 - a and a."""
    wide = np.dtype(_wide(dtype)).type
    for entry, coords in enumerate(operands.coords):
        known = ~np.isnan(coords).any(0).ravel()
        maps = tuple(entry if i is None else int(i[entry]) for i in operands[4:])
        for number, level in enumerate(levels):
            floors, fractions = [], []
            for channel, pool in ((1, lookup.pool[0]), (0, lookup.pool[1])):
                scaled = coords[channel].ravel().astype(wide) / wide(pool**number)
                scaled = np.where(known & (np.abs(scaled) < NOWHERE), scaled, wide(-NOWHERE))
                floors.append(np.floor(scaled).astype(np.intp))
                fractions.append((scaled - np.floor(scaled)).astype(np.float64))
            (floor_y, floor_x), (b, a) = floors, fractions
            for j, i, d, k in np.ndindex(*lookup.patch_size, 2, 2):
                v = floor_y + (j - lookup.radius[0]) * lookup.dilation_patch[0] + d
                u = floor_x + (i - lookup.radius[1]) * lookup.dilation_patch[1] + k
                at = np.flatnonzero(
                    (v >= 0) & (v < level.shape[2]) & (u >= 0) & (u < level.shape[3])
                )
                weight_y, weight_x = (
                    (one if upper else 1 - one)[at] for one, upper in ((b, d), (a, k))
                )
                yield _Corner(
                    (entry, number, *((i, j) if lookup.order == "xy" else (j, i))),
                    (maps[0], maps[1]),
                    at,
                    (v[at], u[at]),
                    weight_y * weight_x,
                    (weight_y * signs[k], weight_x * signs[d]),
                )


def _cost(operands: Operands, lookup: Lookup, dtype: str) -> Array:
    fmap1, fmap2, coords, scale, *_ = operands
    levels = fmap2 if isinstance(fmap2, tuple) else _levels(fmap2, lookup, dtype)
    flat, factor = fmap1.reshape(*fmap1.shape[:2], -1), _scale(scale, fmap1)
    result = np.zeros((*lookup.cost_shape(fmap1.shape, coords.shape)[:4], flat.shape[2]))
    for one in _corners(operands, levels, lookup, dtype, (-1.0, 1.0)):
        products = flat[one.maps[0]][:, one.positions]
        products = products * levels[one.where[1]][one.maps[1]][:, one.cells[0], one.cells[1]]
        result[one.where][one.positions] += factor * one.weights * products.sum(0)
    lost = np.isnan(coords).any(1).reshape(len(coords), 1, 1, 1, -1)
    result = np.where(lost, np.nan, result)
    return result.reshape(lookup.cost_shape(fmap1.shape, coords.shape))


def _grads(
    grad: Array,
    operands: Operands,
    lookup: Lookup,
    dtype: str,
    signs: tuple[float, float] = (-1.0, 1.0),
) -> Grads:
    fmap1, fmap2, coords, scale, *_ = operands
    levels = fmap2 if isinstance(fmap2, tuple) else _levels(fmap2, lookup, dtype)
    flat, factor = fmap1.reshape(*fmap1.shape[:2], -1), _scale(scale, fmap1)
    grad = grad.reshape(*grad.shape[:4], -1)
    grad1, grad3 = np.zeros(flat.shape), np.zeros((*coords.shape[:2], flat.shape[2]))
    grads2 = [np.zeros(level.shape) for level in levels]
    for one in _corners(operands, levels, lookup, dtype, signs):
        entry, level = one.where[:2]
        vectors = flat[one.maps[0]][:, one.positions]
        cells = levels[level][one.maps[1]][:, one.cells[0], one.cells[1]]
        upstream = factor * grad[one.where][one.positions]
        grad1[one.maps[0]][:, one.positions] += upstream * one.weights * cells
        total = np.moveaxis(grads2[level][one.maps[1]], 0, -1)
        np.add.at(total, one.cells, (upstream * one.weights * vectors).T)
        for channel, (slope, pool) in enumerate(zip(one.slopes, lookup.pool[::-1], strict=True)):
            change = upstream * slope * (vectors * cells).sum(0) / pool**level
            grad3[entry, channel][one.positions] += change
    lost = np.isnan(coords).any(1, keepdims=True)
    grad3 = np.where(lost, np.nan, grad3.reshape(coords.shape))
    if isinstance(fmap2, tuple):
        return grad1.reshape(fmap1.shape), tuple(grads2), grad3
    grad2 = round_to(grads2[-1], dtype)
    for finer in grads2[-2::-1]:
        share = np.repeat(np.repeat(grad2, lookup.pool[0], 2), lookup.pool[1], 3)
        grad2 = round_to(finer, dtype)
        grad2[:, :, : share.shape[2], : share.shape[3]] += share / prod(lookup.pool)
    return grad1.reshape(fmap1.shape), grad2, grad3
