"""The flow-guided lookup on NumPy arrays: the definition, its seams, its identities, its errors."""

import lookup_cases
import lookup_definition
import numpy as np
import pytest

import cupycorr
from cupycorr import Geometry, Lookup
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


def test_the_pixel_grid_gives_the_cost_volume(rng):
    fmap1, fmap2, _ = smooth(rng, 2, 5, (9, 11))
    y, x = np.indices((9, 11), np.float32)
    coords = np.stack([x, y])[None].repeat(2, 0)
    lookup = Lookup((2, 1), dilation_patch=(1, 2))
    cost = cupycorr.correlation_lookup(fmap1, fmap2, coords, lookup, scale=1)
    geometry = Geometry(patch_size=lookup.patch_size, dilation_patch=lookup.dilation_patch)
    np.testing.assert_allclose(
        cost[:, 0], cupycorr.correlation(fmap1, fmap2, geometry), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["four levels", "RAFT, rough", "stereo, fractional rows"])
def test_gradients_are_adjoint(name):
    lookup = CASES[name].lookup
    fmap1, levels, coords, _ = arrays(name, "float64")
    fmap2 = levels[0]
    cost = cupycorr.correlation_lookup(fmap1, fmap2, coords, lookup, scale=SCALE)
    grad = np.random.default_rng(1).integers(-2, 3, cost.shape).astype(float)
    grad1, grad2, _ = cupycorr.correlation_lookup_vjp(
        grad, fmap1, fmap2, coords, lookup, scale=SCALE
    )
    assert (cost * grad).sum() == (fmap1 * grad1).sum() == (fmap2 * grad2).sum()


def test_a_step_of_coordinates_shifts_the_patch():
    lookup = CASES["square"].lookup
    fmap1, levels, coords, _ = arrays("square")
    cost = cupycorr.correlation_lookup(fmap1, levels, coords, lookup, scale=SCALE)
    shifted = cupycorr.correlation_lookup(fmap1, levels, coords + 1, lookup, scale=SCALE)
    same(shifted[:, :, :-1, :-1], cost[:, :, 1:, 1:])


@pytest.mark.parametrize("axis", [0, 1])
def test_coordinates_have_the_slope_of_differences(axis, rng):
    lookup = Lookup(1, 2)
    fmap1, fmap2, coords = smooth(rng, 1, 3, (5, 6), np.float64)
    coords = np.floor(coords.astype(float)) + 0.25
    grad = rng.standard_normal(lookup.cost_shape(fmap1.shape, coords.shape))
    slope = cupycorr.correlation_lookup_vjp(
        grad, fmap1, fmap2, coords, lookup, needs=(False, False, True)
    )[2][0, axis]
    step = np.zeros((1, 2, 1, 1))
    step[0, axis] = 0.125  # stays between the same cells
    high, low = (
        cupycorr.correlation_lookup(fmap1, fmap2, coords + sign * step, lookup) for sign in (1, -1)
    )
    np.testing.assert_allclose(slope, ((high - low) * grad).sum((0, 1, 2, 3)) / 0.25, atol=1e-12)


def test_an_infinity_reaches_those_who_read_it():
    lookup = Lookup(1)
    fmap1, fmap2 = np.ones((1, 2, 6, 6), np.float32), np.ones((1, 2, 6, 6), np.float32)
    y, x = np.indices((6, 6), np.float32)
    coords = np.stack([x, y])[None]
    fmap2[0, 0, 2, 3] = np.inf
    fmap1[0, 1, 0, 0] = np.inf
    args = fmap1, fmap2, coords, lookup
    same(
        cupycorr.correlation_lookup(*args, scale=SCALE),
        lookup_definition.cost(fmap1, [fmap2], coords, lookup, SCALE),
    )
    grad = np.ones((1, 1, 3, 3, 6, 6), np.float32)
    grad[0, 0, 1, 1, 5, 5] = np.inf
    got = cupycorr.correlation_lookup_vjp(grad, *args, scale=SCALE)
    with np.errstate(invalid="ignore"):
        want = lookup_definition.grads(grad, fmap1, [fmap2], coords, lookup, SCALE)
    same(got[0], want[0])
    same(got[1], want[1][0])


def test_bfloat16_is_rounded_once():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    lookup = CASES["RAFT"].lookup
    fmap1, levels, coords, _ = arrays("RAFT")
    narrow = [array.astype(ml_dtypes.bfloat16) for array in (fmap1, *levels)]
    wide = [array.astype(np.float32) for array in narrow]
    got = cupycorr.correlation_lookup(narrow[0], narrow[1:], coords, lookup, scale=SCALE)
    want = cupycorr.correlation_lookup(wide[0], wide[1:], coords, lookup, scale=SCALE)
    assert got.dtype == ml_dtypes.bfloat16
    same(got, want.astype(ml_dtypes.bfloat16))
    grad = np.random.default_rng(1).integers(-2, 3, got.shape)
    needs = (True, True, True)
    got = cupycorr.correlation_lookup_vjp(
        grad.astype(ml_dtypes.bfloat16), narrow[0], narrow[1:], coords, lookup, needs=needs
    )
    want = cupycorr.correlation_lookup_vjp(
        grad.astype(np.float32), wide[0], wide[1:], coords, lookup, needs=needs
    )
    same(got[0], want[0].astype(ml_dtypes.bfloat16))
    for one, other in zip(got[1], want[1], strict=True):
        same(one, other.astype(ml_dtypes.bfloat16))
    same(got[2], want[2])


@pytest.mark.parametrize("dtype", STORED)
def test_levels_are_means_rounded_level_by_level(dtype, rng):
    torch = pytest.importorskip("torch")
    lookup = Lookup(1, 3, pool=(2, 3))
    fmap2 = rng.standard_normal((2, 5, 13, 20)).astype(dtype)
    want = [torch.from_numpy(fmap2)]
    want += [torch.nn.functional.avg_pool2d(want[0], lookup.pool)]
    want += [torch.nn.functional.avg_pool2d(want[1], lookup.pool)]
    for level, other in zip(cupycorr.pyramid(fmap2, lookup), want, strict=True):
        same(level, other.numpy())
        assert np.moveaxis(level, 1, -1).flags.c_contiguous


def test_levels_that_lie_well_are_not_copied(rng):
    fmap2 = np.moveaxis(rng.standard_normal((2, 6, 7, 5)), -1, 1)
    assert cupycorr.pyramid(fmap2, Lookup(1, 2))[0] is fmap2


def test_arrays_may_have_any_strides_and_byte_order(rng):
    lookup = Lookup(2, 2)
    fmap1, fmap2, coords = smooth(rng, 2, 5, (9, 11))
    want = cupycorr.correlation_lookup(fmap1, fmap2, coords, lookup)
    strided = np.empty((2, 5, 18, 11), np.float32)[:, :, ::2]
    strided[...] = fmap1
    levels = [level.astype(">f4") for level in cupycorr.pyramid(fmap2, lookup)]
    got = cupycorr.correlation_lookup(
        strided, levels, coords.swapaxes(2, 3).copy().swapaxes(2, 3), lookup
    )
    same(got, want)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3)])
def test_nothing_gives_nothing_or_zeros(shape):
    lookup = Lookup(1, 2)
    fmap1, fmap2 = np.ones(shape, np.float32), np.ones((*shape[:2], 4, 5), np.float32)
    coords = np.ones((shape[0], 2, *shape[2:]), np.float32)
    cost = cupycorr.correlation_lookup(fmap1, fmap2, coords, lookup)
    assert cost.shape == lookup.cost_shape(shape, coords.shape)
    assert not cost.any()
    grads = cupycorr.correlation_lookup_vjp(
        np.ones_like(cost), fmap1, fmap2, coords, lookup, needs=(True, True, True)
    )
    for grad, array in zip(grads, (fmap1, fmap2, coords), strict=True):
        assert grad.shape == array.shape
        assert not grad.any()


MAP, COORDS = np.zeros((2, 4, 5, 6), np.float32), np.zeros((2, 2, 5, 6), np.float32)
INDEX = np.zeros(2, np.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((MAP, MAP, COORDS, Geometry()), TypeError, "lookup must be a Lookup, got Geometry"),
        ((MAP, MAP[:, :3], COORDS, Lookup(1)), ValueError, "must have the channels of fmap1"),
        ((MAP, [MAP], COORDS, Lookup(1, 2)), ValueError, "fmap2 must have 2 levels, got 1"),
        ((MAP, [MAP, MAP[:1]], COORDS, Lookup(1, 2)), ValueError, r"as many maps as other levels"),
        ((MAP, MAP, COORDS.astype(float), Lookup(1)), TypeError, "coords must have dtype float32"),
        ((MAP, MAP, COORDS.astype("f2"), Lookup(1)), TypeError, "coords must have dtype float32"),
        ((MAP, MAP.astype("f2"), COORDS, Lookup(1)), TypeError, "must have equal dtypes"),
        ((MAP.astype(int), MAP.astype(int), COORDS, Lookup(1)), TypeError, "must have dtype"),
        ((MAP, MAP, COORDS[:, :1], Lookup(1)), ValueError, r"\(N, C, \*P\) and \(N, 2, \*P\)"),
        ((MAP, MAP, COORDS[:1], Lookup(1)), ValueError, "an entry for each map of fmap1"),
        (
            (MAP, MAP, COORDS, Lookup(1, 4)),
            ValueError,
            r"every level must have cells, got \(0, 0\)",
        ),
        ((MAP[0, 0], MAP, COORDS, Lookup(1)), ValueError, "must have"),
    ],
)
def test_errors_say_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        cupycorr.correlation_lookup(*arguments)


@pytest.mark.parametrize("name", ["index1", "index2"])
@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (INDEX - 1, IndexError, "must be at least 0 and below 2, got -1 to -1"),
        (INDEX + 2, IndexError, "must be at least 0 and below 2, got 2 to 2"),
        (INDEX.astype(float), TypeError, "must have dtype int32 or int64, got float64"),
        (INDEX[:1], ValueError, "must have an entry for each of coords"),
    ],
)
def test_errors_of_indices(name, index, error, message):
    with pytest.raises(error, match=f"{name} {message}"):
        cupycorr.correlation_lookup(MAP, MAP, COORDS, Lookup(1), **{name: index})


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"radius": 1.5}, TypeError, "radius must be an int or a pair of ints, got 1.5"),
        ({"radius": -1}, ValueError, "radius must be at least 0, got -1"),
        ({"radius": 1, "levels": 0}, ValueError, "levels must be at least 1, got 0"),
        ({"radius": 1, "levels": 17}, ValueError, "levels must be at most 16, got 17"),
        ({"radius": 1, "pool": 0}, ValueError, "pool must be at least 1, got 0"),
        ({"radius": 65, "dilation_patch": 64}, ValueError, "must be at most 4096, got"),
        ({"radius": 1, "order": "zyx"}, ValueError, "order must be 'yx' or 'xy', got 'zyx'"),
    ],
)
def test_errors_of_parameters(parameters, error, message):
    with pytest.raises(error, match=message):
        Lookup(**parameters)


def test_a_lookup_is_a_value():
    lookup = Lookup((1, 2), 3, pool=(1, 2), order="xy")
    assert eval(repr(lookup)) == lookup
    assert hash(Lookup(1)) == hash(Lookup((1, 1)))
    assert lookup.patch_size == (3, 5)
    assert lookup.displacements == (range(-1, 2), range(-2, 3))
    assert lookup.level_sizes(5, 9) == [(5, 9), (5, 4), (5, 2)]


def as_volume(fmap1, levels):
    """Return the volumes (N, *P, h, w) of maps whose products are exact."""
    return [np.einsum("nc...,nchw->n...hw", fmap1, level) for level in levels]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(
    "name", ["outside", "four levels", "stereo", "dilated", "special", "tokens"]
)
def test_samples_of_a_volume_are_a_lookup(name, dtype):
    lookup = CASES[name].lookup
    fmap1, levels, coords, _ = arrays(name, dtype)
    volume = as_volume(fmap1, levels)
    got = cupycorr.volume_lookup(volume, coords, lookup)
    if dtype == "float16":  # products as they are stored in the volume
        wide = [array.astype(np.float32) for array in volume]
        same(got, cupycorr.volume_lookup(wide, coords, lookup).astype(dtype))
    else:
        same(got, cupycorr.correlation_lookup(fmap1, levels, coords, lookup, scale=1))

    grad = np.random.default_rng(1).integers(-2, 3, got.shape).astype(dtype)
    grads, grad_coords = cupycorr.volume_lookup_vjp(
        grad, volume, coords, lookup, needs=(True, True)
    )
    for n in range(len(fmap1)):
        for p in np.ndindex(fmap1.shape[2:]):
            at = (n, slice(None), *p)
            want = lookup_definition.grads(
                grad[(n, ..., *p)][None, ..., None],
                np.ones((1, 1, 1)),
                [level[(n, *p)][None, None] for level in volume],
                coords[at][None, :, None],
                lookup,
                1.0,
            )
            for level, other in zip(grads, want[1], strict=True):
                same(level[(n, *p)], other[0, 0])
            same(grad_coords[at], want[2][0, :, 0])
