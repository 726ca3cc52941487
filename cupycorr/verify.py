"""What "correct" means: exact integers, the adjoint identity, and a bound on round-off.

The checks compare an engine with an oracle, by default this package's NumPy engine in float64.
They are used by the tests and by ``cupycorr gradcheck`` alike; no other tolerance exists.

Maps whose values are small integers have products and sums that floating-point numbers hold
exactly, in whatever order they are added: on them engines must agree to the bit, 16-bit results
after their one rounding. That finds every error of index, border or synchronisation. Round-off is
then checked on random maps against a bound that only correct accumulation can meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cupycorr.api import correlation, correlation_vjp
from cupycorr.geometry import Axis, Geometry
from cupycorr.layer import DTYPES, Layer

Array = npt.NDArray[np.float64]


class Engine(NamedTuple):
    """An implementation under test. It gets and returns float64 arrays, and computes in a dtype.

    forward : (fmap1, fmap2, geometry, dtype name, normalize) -> cost
    vjp : (grad_cost, fmap1, fmap2, geometry, dtype name, normalize) -> (grad_fmap1, grad_fmap2)
    similarity : what it computes, "product" or "l1"
    """

    name: str
    forward: Callable[[Array, Array, Geometry, str, bool], Array]
    vjp: Callable[[Array, Array, Array, Geometry, str, bool], tuple[Array, Array]]
    similarity: str = "product"


class Check(NamedTuple):
    """The outcome of one check; ``error`` says what was wrong, or is None."""

    name: str
    error: str | None


def numpy_engine(similarity: str = "product") -> Engine:
    """Return this package's NumPy engine."""
    options: dict[str, Any] = {"similarity": similarity}

    def forward(
        fmap1: Array, fmap2: Array, geometry: Geometry, dtype: str, normalize: bool
    ) -> Array:
        one, two = (_to_dtype(a, dtype) for a in (fmap1, fmap2))
        return np.asarray(
            correlation(one, two, geometry, normalize=normalize, **options), np.float64
        )

    def vjp(
        grad: Array, fmap1: Array, fmap2: Array, geometry: Geometry, dtype: str, normalize: bool
    ) -> tuple[Array, Array]:
        upstream, one, two = (_to_dtype(a, dtype) for a in (grad, fmap1, fmap2))
        grads = correlation_vjp(upstream, one, two, geometry, normalize=normalize, **options)
        return np.asarray(grads[0], np.float64), np.asarray(grads[1], np.float64)

    return Engine("numpy", forward, vjp, similarity)


def cupy_engine(similarity: str = "product", *, plain: bool = False) -> Engine:
    """Return this package's CUDA engine, on the current device; needs CuPy.

    Parameters
    ----------
    plain : bool, default False
        Call the engine for its plain kernels only, past the public functions.
    """
    import cupy

    from cupycorr.cuda import engine

    options: dict[str, Any] = {"similarity": similarity}

    def array(values: Array, dtype: str) -> Any:
        return cupy.asarray(_to_dtype(values, dtype))

    def forward(
        fmap1: Array, fmap2: Array, geometry: Geometry, dtype: str, normalize: bool
    ) -> Array:
        one, two = (array(a, dtype) for a in (fmap1, fmap2))
        if not plain:
            return _from_cupy(correlation(one, two, geometry, normalize=normalize, **options))
        cost = cupy.empty(geometry.cost_shape(one.shape), one.dtype)
        arrays = {"fmap1": one, "fmap2": two, "cost": cost}
        engine.run("cost", arrays, Layer(geometry, similarity, normalize), plain=True)
        return _from_cupy(cost)

    def vjp(
        grad: Array, fmap1: Array, fmap2: Array, geometry: Geometry, dtype: str, normalize: bool
    ) -> tuple[Array, Array]:
        upstream, one, two = (array(a, dtype) for a in (grad, fmap1, fmap2))
        if not plain:
            grads = correlation_vjp(upstream, one, two, geometry, normalize=normalize, **options)
            return _from_cupy(grads[0]), _from_cupy(grads[1])
        arrays = {"fmap1": one, "fmap2": two, "grad_cost": upstream}
        arrays |= {"grad_fmap1": cupy.empty_like(one), "grad_fmap2": cupy.empty_like(two)}
        engine.run("grads", arrays, Layer(geometry, similarity, normalize), plain=True)
        return _from_cupy(arrays["grad_fmap1"]), _from_cupy(arrays["grad_fmap2"])

    return Engine("cupy, plain kernels" if plain else "cupy", forward, vjp, similarity)


def torch_engine(device: str = "cpu", similarity: str = "product") -> Engine:
    """Return this package's torch operators, with autograd's gradients; needs torch.

    Parameters
    ----------
    device : str, default "cpu"
        Where the tensors lie.
    """
    import torch

    options: dict[str, Any] = {"similarity": similarity}

    def tensor(array: Array, dtype: str, differentiable: bool = False) -> Any:
        copy = torch.from_numpy(np.array(array)).to(device, getattr(torch, dtype))
        return copy.requires_grad_(differentiable)

    def forward(
        fmap1: Array, fmap2: Array, geometry: Geometry, dtype: str, normalize: bool
    ) -> Array:
        one, two = (tensor(a, dtype) for a in (fmap1, fmap2))
        return _from_torch(correlation(one, two, geometry, normalize=normalize, **options))

    def vjp(
        grad: Array, fmap1: Array, fmap2: Array, geometry: Geometry, dtype: str, normalize: bool
    ) -> tuple[Array, Array]:
        one, two = (tensor(a, dtype, differentiable=True) for a in (fmap1, fmap2))
        cost = correlation(one, two, geometry, normalize=normalize, **options)
        grad1, grad2 = torch.autograd.grad(cost, (one, two), tensor(grad, dtype))
        return _from_torch(grad1), _from_torch(grad2)

    return Engine("torch", forward, vjp, similarity)


def definition(similarity: str = "product") -> Engine:
    """Return the definition itself, one tap and one displacement at a time, in float64.

    It is as slow as it is plain, and shares no line with the engines: it reads the raw fields of
    a geometry and computes every index anew, so that an error in `Geometry` cannot hide in it.
    """

    def forward(
        fmap1: Array, fmap2: Array, geometry: Geometry, dtype: str, normalize: bool
    ) -> Array:
        divisor = _full_window(fmap1, geometry) if normalize else 1
        if similarity == "l1":
            (fmap1, fmap2), geometry, _ = _framed((fmap1, fmap2), geometry)
        cost = np.zeros(geometry.cost_shape(fmap1.shape))
        for where, at1, at2 in _terms(fmap1.shape, geometry):
            one, two = fmap1[at1], fmap2[at2]
            cost[where] += (np.abs(one - two) if similarity == "l1" else one * two).sum(1)
        return cost / divisor

    def vjp(
        grad: Array, fmap1: Array, fmap2: Array, geometry: Geometry, dtype: str, normalize: bool
    ) -> tuple[Array, Array]:
        divisor = _full_window(fmap1, geometry) if normalize else 1
        inside: tuple[slice, ...] = ()
        if similarity == "l1":
            (fmap1, fmap2), geometry, inside = _framed((fmap1, fmap2), geometry)
        grad_fmap1, grad_fmap2 = np.zeros(fmap1.shape), np.zeros(fmap2.shape)
        for where, at1, at2 in _terms(fmap1.shape, geometry):
            upstream, one, two = grad[where][:, None], fmap1[at1], fmap2[at2]
            if similarity == "l1":
                sign = (one > two) * 1.0 - (one < two)
                one, two = -sign, sign
            grad_fmap1[at1] += upstream * two
            grad_fmap2[at2] += upstream * one
        return grad_fmap1[inside] / divisor, grad_fmap2[inside] / divisor

    return Engine("definition", forward, vjp, similarity)


def check(
    engine: Engine,
    shape: tuple[int, int, int, int],
    geometry: Geometry,
    dtype: str,
    *,
    seed: int = 0,
    oracle: Engine | None = None,
) -> Iterator[Check]:
    """Check an engine on one shape, geometry and dtype; yields one result per check.

    Parameters
    ----------
    engine : Engine
        What is checked.
    shape : (N, C, H, W)
        Shape of the maps.
    geometry : Geometry
        Geometry of the cost volume.
    dtype : {"float16", "bfloat16", "float32", "float64"}
        What the engine computes in; "bfloat16" needs ml_dtypes with the NumPy engine.
    seed : int, default 0
        Seed of the random maps.
    oracle : Engine, optional
        What is taken for the truth, in float64; by default the NumPy engine.
    """
    oracle = numpy_engine(engine.similarity) if oracle is None else oracle
    rng = np.random.default_rng(seed)
    cost_shape = geometry.cost_shape(shape)
    names = "cost", "grad_fmap1", "grad_fmap2"

    # Exact integers, and on the same results the adjoint identity of products
    # <cost, grad_cost> = <fmap1, grad_fmap1> = <fmap2, grad_fmap2>. Of differences the last two add
    # up to the first, by Euler's theorem on homogeneous functions.
    fmap1, fmap2, grad = (
        rng.integers(-2, 3, s).astype(np.float64) for s in (shape, shape, cost_shape)
    )
    got = _run(engine, grad, fmap1, fmap2, geometry, dtype)
    want = _run(oracle, grad, fmap1, fmap2, geometry, "float64")
    for name, one, other in zip(names, got, want, strict=True):
        yield Check(f"{name} exact on integers", difference(one, round_to(other, dtype)))
    if dtype in ("float32", "float64"):
        sums = [float((a * b).sum()) for a, b in zip(got, (grad, fmap1, fmap2), strict=True)]
        equal = sums[0] == sums[1] == sums[2]
        if engine.similarity == "l1":
            equal = sums[0] == sums[1] + sums[2]
        yield Check("adjoint identity", None if equal else f"inner products are {sums}")

    fmap1, fmap2, grad = (
        round_to(rng.standard_normal(s), dtype) for s in (shape, shape, cost_shape)
    )
    for normalize in (False, True):
        got = _run(engine, grad, fmap1, fmap2, geometry, dtype, normalize)
        want = _run(oracle, grad, fmap1, fmap2, geometry, "float64", normalize)
        size = _sizes(oracle, grad, fmap1, fmap2, geometry, normalize)
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
    engine: Engine,
    grad: Array,
    fmap1: Array,
    fmap2: Array,
    geometry: Geometry,
    dtype: str,
    normalize: bool = False,
) -> tuple[Array, Array, Array]:
    cost = engine.forward(fmap1, fmap2, geometry, dtype, normalize)
    return (cost, *engine.vjp(grad, fmap1, fmap2, geometry, dtype, normalize))


def _sizes(
    oracle: Engine, grad: Array, fmap1: Array, fmap2: Array, geometry: Geometry, normalize: bool
) -> tuple[Array, Array, Array]:
    """Return the sums of the absolute values of terms, of cost and gradients."""
    if oracle.similarity == "product":
        grad, fmap1, fmap2 = (np.abs(array) for array in (grad, fmap1, fmap2))
        return _run(oracle, grad, fmap1, fmap2, geometry, "float64", normalize)
    # Terms are absolute values already, those of the gradients upstream values with a sign; where
    # all of one map is above all of the other, that sign is +1.
    one, zero = np.ones(fmap1.shape), np.zeros(fmap1.shape)
    cost = oracle.forward(fmap1, fmap2, geometry, "float64", normalize)
    sizes1 = oracle.vjp(np.abs(grad), one, zero, geometry, "float64", normalize)
    sizes2 = oracle.vjp(np.abs(grad), zero, one, geometry, "float64", normalize)
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
        least = geometry.first_displacement[a]
        most = least + (geometry.patch_size[a] - 1) * geometry.dilation_patch[a]
        margins.append(max(0, -first - min(0, least), last + max(0, most) - shape[2 + a] + 1))
    y, x = margins
    framed = [np.pad(array, ((0, 0), (0, 0), (y, y), (x, x))) for array in maps]
    padding = geometry.padding[0] - y, geometry.padding[1] - x
    fields = {name: getattr(geometry, name) for name in Axis._fields}
    every = slice(None)
    inside = every, every, slice(y, y + shape[2]), slice(x, x + shape[3])
    return framed, Geometry(**fields | {"padding": padding}), inside


def _full_window(fmap: Array, geometry: Geometry) -> int:
    """Return the number of terms of a window that lies in both images."""
    channels: int = fmap.shape[1]
    return max(1, channels) * geometry.kernel_size[0] * geometry.kernel_size[1]


def _describe(wrong: npt.NDArray[np.bool_], got: Array, want: Array) -> str | None:
    if not wrong.any():
        return None
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    return (
        f"{wrong.sum()} of {wrong.size} values differ, first at {first}: "
        f"{got[first]} instead of {want[first]}"
    )


def _from_cupy(array: Any) -> Array:
    return np.asarray(array.get().astype(np.float64))


def _from_torch(tensor: Any) -> Array:
    return np.asarray(tensor.detach().cpu().double().numpy())


def _to_dtype(array: Array, dtype: str) -> npt.NDArray[Any]:
    if dtype == "bfloat16":
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16)
    return array.astype(dtype)
