"""Three checks of an engine: exact integers, the adjoint identity, and a bound on round-off.

The checks compare an engine with an oracle, by default this package's NumPy engine in float64.
They are used by the tests and by ``cupycorr gradcheck`` alike; no other tolerance exists.

Maps whose values are small integers have products and sums that floating-point numbers hold
exactly, in whatever order they are added: on them engines must agree to the bit, 16-bit results
after their one rounding. That finds every error of index, border or synchronisation. Round-off is
then checked on random maps against a bound that only correct accumulation can meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupycorr.api import correlate, differentiate
from cupycorr.geometry import Axis, Geometry
from cupycorr.layer import DTYPES, Layer

Array = npt.NDArray[np.float64]


class Engine(NamedTuple):
    """An implementation under test. It gets and returns float64 arrays, and computes in a dtype.

    cost : (fmap1, fmap2, layer, dtype name) -> cost
    grads : (grad_cost, fmap1, fmap2, layer, dtype name) -> (grad_fmap1, grad_fmap2)
    """

    name: str
    cost: Callable[[Array, Array, Layer, str], Array]
    grads: Callable[[Array, Array, Array, Layer, str], tuple[Array, Array]]


class Check(NamedTuple):
    """The outcome of one check; ``error`` says what was wrong, or is None."""

    name: str
    error: str | None


def numpy_engine() -> Engine:
    """Return this package's NumPy engine."""

    def cost(fmap1: Array, fmap2: Array, layer: Layer, dtype: str) -> Array:
        one, two = (to_dtype(a, dtype) for a in (fmap1, fmap2))
        return np.asarray(correlate(one, two, layer), np.float64)

    def grads(
        grad: Array, fmap1: Array, fmap2: Array, layer: Layer, dtype: str
    ) -> tuple[Array, Array]:
        upstream, one, two = (to_dtype(a, dtype) for a in (grad, fmap1, fmap2))
        grad1, grad2 = differentiate(upstream, one, two, layer)
        return np.asarray(grad1, np.float64), np.asarray(grad2, np.float64)

    return Engine("numpy", cost, grads)


def cupy_engine(*, plain: bool = False) -> Engine:
    """Return this package's CUDA engine, on the current device; needs CuPy.

    Parameters
    ----------
    plain : bool, default False
        Call the engine for its plain kernels only, past the public functions.
    """
    import cupy

    cost_of, grads_of = (plain_cost, plain_grads) if plain else (correlate, differentiate)

    def array(values: Array, dtype: str) -> Any:
        return cupy.asarray(to_dtype(values, dtype))

    def cost(fmap1: Array, fmap2: Array, layer: Layer, dtype: str) -> Array:
        one, two = (array(a, dtype) for a in (fmap1, fmap2))
        return from_cupy(cost_of(one, two, layer))

    def grads(
        grad: Array, fmap1: Array, fmap2: Array, layer: Layer, dtype: str
    ) -> tuple[Array, Array]:
        upstream, one, two = (array(a, dtype) for a in (grad, fmap1, fmap2))
        grad1, grad2 = grads_of(upstream, one, two, layer)
        return from_cupy(grad1), from_cupy(grad2)

    return Engine("cupy, plain kernels" if plain else "cupy", cost, grads)


def plain_cost(fmap1: Any, fmap2: Any, layer: Layer) -> Any:
    """Compute the cost volume of contiguous CuPy arrays by the plain kernels."""
    import cupy

    from cupycorr.cuda import engine

    cost = cupy.empty(layer.geometry.cost_shape(fmap1.shape), fmap1.dtype)
    arrays = {"fmap1": fmap1, "fmap2": fmap2, "cost": cost}
    engine.run("cost", arrays, layer.ascending, plain=True)
    return cost[layer.geometry.reversal]


def plain_grads(grad_cost: Any, fmap1: Any, fmap2: Any, layer: Layer) -> tuple[Any, Any]:
    """Compute the gradients for contiguous CuPy arrays by the plain kernels."""
    import cupy

    from cupycorr.cuda import engine

    grad1, grad2 = cupy.empty_like(fmap1), cupy.empty_like(fmap2)
    upstream = cupy.ascontiguousarray(grad_cost[layer.geometry.reversal])
    arrays = {"fmap1": fmap1, "fmap2": fmap2, "grad_cost": upstream}
    arrays |= {"grad_fmap1": grad1, "grad_fmap2": grad2}
    engine.run("grads", arrays, layer.ascending, plain=True)
    return grad1, grad2


def torch_engine(device: str = "cpu") -> Engine:
    """Return this package's torch operators, with autograd's gradients; needs torch.

    Parameters
    ----------
    device : str, default "cpu"
        Where the tensors lie.
    """
    import torch

    def tensor(array: Array, dtype: str, differentiable: bool = False) -> Any:
        copy = torch.from_numpy(np.array(array)).to(device, getattr(torch, dtype))
        return copy.requires_grad_(differentiable)

    def cost(fmap1: Array, fmap2: Array, layer: Layer, dtype: str) -> Array:
        one, two = (tensor(a, dtype) for a in (fmap1, fmap2))
        return from_torch(correlate(one, two, layer))

    def grads(
        grad: Array, fmap1: Array, fmap2: Array, layer: Layer, dtype: str
    ) -> tuple[Array, Array]:
        one, two = (tensor(a, dtype, differentiable=True) for a in (fmap1, fmap2))
        upstream = tensor(grad, dtype)
        grad1, grad2 = torch.autograd.grad(correlate(one, two, layer), (one, two), upstream)
        return from_torch(grad1), from_torch(grad2)

    return Engine("torch", cost, grads)


def definition() -> Engine:
    """Return the definition itself, one tap and one displacement at a time, in float64.

    It is as slow as it is plain, and shares no line with the engines: it reads the raw fields of
    a geometry and computes every index anew, so that an error in `Geometry` cannot hide in it.
    """

    def cost(fmap1: Array, fmap2: Array, layer: Layer, dtype: str) -> Array:
        geometry, divisor = layer.geometry, _divisor(fmap1, layer)
        if layer.similarity == "l1":
            (fmap1, fmap2), geometry, _ = _framed((fmap1, fmap2), geometry)
        result = np.zeros(geometry.cost_shape(fmap1.shape))
        for where, at1, at2 in _terms(fmap1.shape, geometry):
            one, two = fmap1[at1], fmap2[at2]
            result[where] += (np.abs(one - two) if layer.similarity == "l1" else one * two).sum(1)
        return result / divisor

    def grads(
        grad: Array, fmap1: Array, fmap2: Array, layer: Layer, dtype: str
    ) -> tuple[Array, Array]:
        geometry, divisor = layer.geometry, _divisor(fmap1, layer)
        inside: tuple[slice, ...] = ()
        if layer.similarity == "l1":
            (fmap1, fmap2), geometry, inside = _framed((fmap1, fmap2), geometry)
        grad_fmap1, grad_fmap2 = np.zeros(fmap1.shape), np.zeros(fmap2.shape)
        for where, at1, at2 in _terms(fmap1.shape, geometry):
            upstream, one, two = grad[where][:, None], fmap1[at1], fmap2[at2]
            if layer.similarity == "l1":
                sign = (one > two) * 1.0 - (one < two)
                one, two = -sign, sign
            grad_fmap1[at1] += upstream * two
            grad_fmap2[at2] += upstream * one
        return grad_fmap1[inside] / divisor, grad_fmap2[inside] / divisor

    return Engine("definition", cost, grads)


def check(
    engine: Engine,
    shape: tuple[int, int, int, int],
    layer: Layer,
    dtype: str,
    *,
    seed: int = 0,
    oracle: Engine | None = None,
) -> Iterator[Check]:
    """Check an engine on one shape, layer and dtype, with sums and with means.

    Parameters
    ----------
    engine : Engine
        What is checked.
    shape : (N, C, H, W)
        Shape of the maps.
    layer : Layer
        What is computed; both values of ``normalize`` are tried.
    dtype : {"float16", "bfloat16", "float32", "float64"}
        What the engine computes in; "bfloat16" needs ml_dtypes with the NumPy engine.
    seed : int, default 0
        Seed of the random maps.
    oracle : Engine, optional
        The engine to compare with, in float64; by default the NumPy engine.
    """
    oracle = numpy_engine() if oracle is None else oracle
    geometry = layer.geometry
    rng = np.random.default_rng(seed)
    cost_shape = geometry.cost_shape(shape)
    names = "cost", "grad_fmap1", "grad_fmap2"

    # Exact integers, and on the same results the adjoint identity of products
    # <cost, grad_cost> = <fmap1, grad_fmap1> = <fmap2, grad_fmap2>. For l1 the last two add up to
    # the first, by Euler's theorem on homogeneous functions.
    fmap1, fmap2, grad = (
        rng.integers(-2, 3, s).astype(np.float64) for s in (shape, shape, cost_shape)
    )
    sums_layer = replace(layer, normalize=False)
    got = _run(engine, grad, fmap1, fmap2, sums_layer, dtype)
    want = _run(oracle, grad, fmap1, fmap2, sums_layer, "float64")
    for name, one, other in zip(names, got, want, strict=True):
        yield Check(f"{name} exact on integers", difference(one, round_to(other, dtype)))
    if dtype in ("float32", "float64"):
        sums = [float((a * b).sum()) for a, b in zip(got, (grad, fmap1, fmap2), strict=True)]
        equal = sums[0] == sums[1] == sums[2]
        if layer.l1:
            equal = sums[0] == sums[1] + sums[2]
        yield Check("adjoint identity", None if equal else f"inner products are {sums}")

    fmap1, fmap2, grad = (
        round_to(rng.standard_normal(s), dtype) for s in (shape, shape, cost_shape)
    )
    for normalize in (False, True):
        tried = replace(layer, normalize=normalize)
        got = _run(engine, grad, fmap1, fmap2, tried, dtype)
        want = _run(oracle, grad, fmap1, fmap2, tried, "float64")
        size = _sizes(oracle, grad, fmap1, fmap2, tried)
        taps = geometry.taps
        patch = geometry.patch_size[0] * geometry.patch_size[1]
        terms = (shape[1] * taps, patch * taps, patch * taps)
        what = "normalized " if normalize else ""
        for name, one, other, most, count in zip(names, got, want, size, terms, strict=True):
            yield Check(f"{what}{name} round-off", excess(one, other, most, count, dtype))


def difference(got: Array, want: Array) -> str | None:
    """Compare two arrays exactly (NaN equals NaN); describe the first difference, or None."""
    if got.shape != want.shape:
        return f"shape {got.shape} instead of {want.shape}"
    wrong = ~((got == want) | (np.isnan(got) & np.isnan(want)))
    return _describe(wrong, got, want)


def excess(got: Array, want: Array, size: Array, terms: int, dtype: str) -> str | None:
    """Compare within the round-off of ``terms`` additions; describe the first excess, or None.

    The bound is ``store * |want| + (terms + 2) * accumulate * size + terms * tiny``, where size
    is the sum of the terms' absolute values: N. Higham, "Accuracy and Stability of Numerical
    Algorithms", section 3.1, plus one rounding at the store. It holds for any order of summation.
    """
    if got.shape != want.shape:
        return f"shape {got.shape} instead of {want.shape}"
    unit = DTYPES[dtype]
    accumulate = DTYPES[unit.accumulator].rounding
    bound = unit.rounding * np.abs(want) + (terms + 2) * accumulate * size + terms * unit.tiny
    return _describe(~(np.abs(got - want) <= bound), got, want)


def round_to(values: Array, dtype: str) -> Array:
    """Round float64 values once to a dtype's precision, to nearest even; values stay float64."""
    if dtype == "bfloat16":
        mantissa, exponent = np.frexp(values)
        rounded: Array = np.ldexp(np.rint(mantissa * 256) / 256, exponent)
        return rounded
    return values.astype(dtype).astype(np.float64)


def _run(
    engine: Engine, grad: Array, fmap1: Array, fmap2: Array, layer: Layer, dtype: str
) -> tuple[Array, Array, Array]:
    cost = engine.cost(fmap1, fmap2, layer, dtype)
    return (cost, *engine.grads(grad, fmap1, fmap2, layer, dtype))


def _sizes(
    oracle: Engine, grad: Array, fmap1: Array, fmap2: Array, layer: Layer
) -> tuple[Array, Array, Array]:
    """Return the sums of the absolute values of terms, of cost and gradients."""
    if not layer.l1:
        grad, fmap1, fmap2 = (np.abs(array) for array in (grad, fmap1, fmap2))
        return _run(oracle, grad, fmap1, fmap2, layer, "float64")
    # The cost's terms are absolute values already; those of the gradients are upstream values with
    # a sign. Where all of one map is above all of the other, that sign is +1.
    one, zero = np.ones(fmap1.shape), np.zeros(fmap1.shape)
    cost = oracle.cost(fmap1, fmap2, layer, "float64")
    sizes1 = oracle.grads(np.abs(grad), one, zero, layer, "float64")
    sizes2 = oracle.grads(np.abs(grad), zero, one, layer, "float64")
    return cost, sizes1[0], sizes2[1]


def _terms(shape: tuple[int, ...], geometry: Geometry) -> Iterator[tuple[Any, Any, Any]]:
    """Yield where in (cost, fmap1, fmap2) the terms of each tap and displacement lie."""
    outputs = geometry.cost_shape(shape)[3:]
    for tap in np.ndindex(geometry.kernel_size):
        for displacement in np.ndindex(geometry.patch_size):
            axes = []
            for a in (0, 1):
                start = tap[a] * geometry.dilation[a] - geometry.padding[a]
                shift = geometry.first_displacement[a]
                shift += displacement[a] * geometry.dilation_patch[a]
                output = np.arange(outputs[a])
                one = output * geometry.stride[a] + start
                two = one + shift
                inside = (one >= 0) & (one < shape[2 + a]) & (two >= 0) & (two < shape[2 + a])
                axes.append((output[inside], one[inside], two[inside]))
            cost, one, two = (np.ix_(*rows_columns) for rows_columns in zip(*axes, strict=True))
            every = slice(None)
            yield (every, *displacement, *cost), (every, every, *one), (every, every, *two)


def _framed(
    maps: tuple[Array, Array], geometry: Geometry
) -> tuple[list[Array], Geometry, tuple[slice, ...]]:
    """Frame maps with zeros, so wide that every position exists; also tell where the maps lie."""
    shape = maps[0].shape
    outputs = geometry.cost_shape(shape)[3:]
    margins = []
    for a in (0, 1):
        first = -geometry.padding[a]
        last = first + (outputs[a] - 1) * geometry.stride[a]
        last += (geometry.kernel_size[a] - 1) * geometry.dilation[a]
        run = (
            geometry.first_displacement[a],
            (geometry.patch_size[a] - 1) * geometry.dilation_patch[a],
        )
        least, most = sorted((run[0], sum(run)))
        margins.append(max(0, -first - min(0, least), last + max(0, most) - shape[2 + a] + 1))
    y, x = margins
    framed = [np.pad(array, ((0, 0), (0, 0), (y, y), (x, x))) for array in maps]
    padding = geometry.padding[0] - y, geometry.padding[1] - x
    fields = {name: getattr(geometry, name) for name in Axis._fields}
    every = slice(None)
    inside = every, every, slice(y, y + shape[2]), slice(x, x + shape[3])
    return framed, Geometry(**fields | {"padding": padding}), inside


def _divisor(fmap: Array, layer: Layer) -> int:
    """Return what a sum is divided by: 1, or the terms of all taps where they lie in both maps."""
    channels: int = fmap.shape[1]
    kernel_y, kernel_x = layer.geometry.kernel_size
    return max(1, channels) * kernel_y * kernel_x if layer.normalize else 1


def _describe(wrong: npt.NDArray[np.bool_], got: Array, want: Array) -> str | None:
    if not wrong.any():
        return None
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    return (
        f"{wrong.sum()} of {wrong.size} values differ, first at {first}: "
        f"{got[first]} instead of {want[first]}"
    )


def from_cupy(array: Any) -> Array:
    """Copy a CuPy array to float64 values."""
    return np.asarray(array.get().astype(np.float64))


def from_torch(tensor: Any) -> Array:
    """Copy a tensor to float64 values."""
    return np.asarray(tensor.detach().cpu().double().numpy())


def to_dtype(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Convert values to a dtype by its name, also to "bfloat16", which needs ml_dtypes."""
    if dtype == "bfloat16":
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16)
    return array.astype(dtype)
