"""The flow-guided lookup on NumPy arrays: the definition, its seams, its identities, its errors."""

import lookup_cases
import lookup_definition
import numpy as np
import pytest

import cupycorr
from cupycorr import Lookup
from cupycorr.cpu import lookup as cpu
from cupycorr.cpu import windows
from cupycorr.layer import DTYPES

CASES = lookup_cases.CASES
STORED = [name for name in DTYPES if name != "bfloat16"]
SCALE = 0.5


def arrays(name, dtype="float32"):
    """Return a case's arrays in some dtype, and its indices, which all exist."""
    fmap1, levels, coords, indices = lookup_cases.arguments(name)
    for index, maps in zip(indices.values(), (fmap1, levels[0]), strict=False):
        index %= len(maps)
    wide = np.float64 if dtype == "float64" else np.float32
    return (
        fmap1.astype(dtype),
        [level.astype(dtype) for level in levels],
        coords.astype(wide),
        indices,
    )


def same(got, want):
    """Tell whether arrays are equal bit for bit, but for NaN's bits and zero's sign."""
    np.testing.assert_array_equal(got, np.asarray(want, got.dtype))


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("name", CASES)
def test_costs_and_gradients_are_those_of_the_definition(name, dtype):
    lookup = CASES[name].lookup
    fmap1, levels, coords, indices = arrays(name, dtype)
    cost = cupycorr.correlation_lookup(fmap1, levels, coords, lookup, scale=SCALE, **indices)
    assert cost.dtype == fmap1.dtype
    assert cost.flags.c_contiguous
    same(cost, lookup_definition.cost(fmap1, levels, coords, lookup, SCALE, **indices))

    grad = np.random.default_rng(1).integers(-2, 3, cost.shape).astype(dtype)
    got = cupycorr.correlation_lookup_vjp(
        grad, fmap1, levels, coords, lookup, scale=SCALE, **indices, needs=(True, True, True)
    )
    want = lookup_definition.grads(grad, fmap1, levels, coords, lookup, SCALE, **indices)
    same(got[0], want[0])
    for one, other in zip(got[1], want[1], strict=True):
        same(one, other)
    same(got[2], want[2])


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("name", ["four levels", "stereo", "edges of patches"])
def test_each_gradient_alone_is_the_same(name, needs):
    lookup = CASES[name].lookup
    fmap1, levels, coords, indices = arrays(name)
    shape = lookup.cost_shape(fmap1.shape, coords.shape)
    grad = np.random.default_rng(1).integers(-2, 3, shape).astype(np.float32)
    given, indices = (grad, fmap1, levels, coords, lookup), {**indices, "scale": SCALE}
    together = cupycorr.correlation_lookup_vjp(*given, **indices, needs=(True, True, True))
    alone = cupycorr.correlation_lookup_vjp(*given, **indices, needs=needs)
    for need, one, other in zip(needs, alone, together, strict=True):
        if not need:
            assert one is None
        elif isinstance(one, tuple):
            for a, b in zip(one, other, strict=True):
                same(a, b)
        else:
            same(one, other)


def smooth(rng, count, channels, size, dtype=np.float32):
    """Return maps and coordinates of a smooth flow."""
    y, x = np.indices(size)
    flow = 3 * np.sin(x / 9 + y / 7), 2 * np.cos(x / 5 - y / 8)
    coords = np.stack([x + flow[0], y + flow[1]]).astype(np.float32)[None].repeat(count, 0)
    maps = rng.standard_normal((2, count, channels, *size)).astype(dtype)
    return *maps, coords


@pytest.mark.parametrize("chunk", [1, 7, 16, 4096])
def test_bits_do_not_depend_on_chunks_or_threads(rng, chunk, monkeypatch):
    lookup = Lookup(2, 2)
    fmap1, fmap2, coords = smooth(rng, 2, 9, (12, 17))
    levels = cupycorr.pyramid(fmap2, lookup)
    cost = cupycorr.correlation_lookup(fmap1, levels, coords, lookup)
    grads = cupycorr.correlation_lookup_vjp(cost, fmap1, levels, coords, lookup)
    monkeypatch.setattr(windows, "CHUNK", chunk)
    monkeypatch.setattr("cupycorr.cpu.threads.WORTH_THREADS", 0)
    for threads in (1, 3):
        out = np.empty_like(cost)
        cpu.run(
            "cost", {"fmap1": fmap1, "levels": levels, "coords": coords, "cost": out}, lookup,
            9**-0.5, threads=threads,
        )  # fmt: skip
        np.testing.assert_allclose(out, cost, rtol=1e-5, atol=1e-5)
        results = [np.empty_like(fmap1), [np.empty_like(level) for level in levels]]
        cpu.run(
            "grads",
            {"fmap1": fmap1, "levels": levels, "coords": coords, "grad_cost": cost,
             "grad_fmap1": results[0], "grad_levels": results[1]},
            lookup, 9**-0.5, threads=threads,
        )  # fmt: skip
        if threads == 1:
            first = results
    same(first[0], results[0])
    for one, other in zip(first[1], results[1], strict=True):
        same(one, other)
    np.testing.assert_allclose(results[0], grads[0], rtol=1e-4, atol=1e-4)
