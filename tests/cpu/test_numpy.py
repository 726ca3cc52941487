"""The values that the NumPy engine computes, against the definition."""

import definition
import numpy as np
import pytest
from cases import CASES, GEOMETRIES
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cases, pairs

import cupycorr
from cupycorr import Geometry, verify
from cupycorr.cpu import engine as numpy_engine
from cupycorr.cpu import pairs as all_pairs
from cupycorr.layer import DTYPES, Layer

# Large enough for every strategy of the engine: matrix products over whole rows, over tiles, and
# one multiplication per displacement; windows or not; several chunks of work.
LARGE = {
    "FlowNetC": ((1, 100, 24, 32), Geometry(patch_size=21, dilation_patch=2)),
    "FlowNetC, stride 2": ((1, 64, 30, 34), Geometry(patch_size=21, stride=2, dilation_patch=2)),
    "PWC-Net": ((1, 70, 40, 50), Geometry(patch_size=9)),
    "LiteFlowNet": ((1, 64, 40, 50), Geometry(patch_size=7, stride=2, dilation_patch=2)),
    "stereo": ((2, 64, 12, 150), Geometry(patch_size=(1, 41))),
    "one-sided stereo": (
        (1, 40, 10, 160),
        Geometry(patch_size=(1, 40), first_displacement=(0, -39)),
    ),
    "vertical": ((1, 40, 150, 9), Geometry(patch_size=(33, 1))),
    "dense window": ((1, 40, 26, 30), Geometry(3, 9, padding=1)),
    "defaults": ((3, 64, 50, 47), Geometry(3, 3, 2, 1, 2, 2)),
    "large dilated window": ((1, 24, 40, 50), Geometry((7, 5), 5, padding=4, dilation=(2, 3))),
    "windows far apart": ((1, 48, 50, 60), Geometry(2, 7, stride=(9, 8), padding=1)),
    "stride not dividing dilation_patch": (
        (1, 48, 50, 47),
        Geometry(patch_size=(8, 9), stride=(3, 2), dilation_patch=(2, 3)),
    ),
    "patch larger than the map": ((2, 65, 9, 11), Geometry(patch_size=21)),
    "one displacement": ((2, 100, 40, 50), Geometry()),
    "one channel": ((2, 1, 40, 50), Geometry(patch_size=9)),
    "three channels": ((1, 3, 60, 50), Geometry(3, 5, padding=1)),
    "one row": ((1, 100, 1, 200), Geometry(patch_size=(3, 21))),
    "one column": ((1, 100, 200, 1), Geometry(patch_size=(21, 3))),
    "small maps": ((8, 128, 16, 28), Geometry(patch_size=9)),
    "many small maps": ((40, 32, 6, 7), Geometry(patch_size=7)),
    "far off centre": ((1, 32, 40, 50), Geometry(patch_size=5, first_displacement=(-31, 40))),
    "even patch, cropped": ((1, 33, 41, 43), Geometry(1, (8, 10), padding=(-3, -5))),
}
ROUND_OFF = ("FlowNetC", "stereo", "dense window", "windows far apart", "one channel")


@pytest.fixture(scope="module", params=["chosen", "tiles"], autouse=True)
def way(request):
    """Compute small maps as the engine chooses to, and once more by tiles."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tiles":
            patch.setattr(all_pairs, "fit", lambda shape, geometry: False)
        yield


def integers(rng, shape, dtype="float64"):
    return rng.integers(-2, 3, shape).astype(dtype)


def maps(rng, shape, geometry, dtype="float64"):
    """Return (grad_cost, fmap1, fmap2) of small integers."""
    return [integers(rng, s, dtype) for s in (geometry.cost_shape(shape), shape, shape)]


def errors(checks):
    return [check for check in checks if check.error is not None]


def first_difference(shape, geometry, arrays, dtype):
    """Compare the engine's three results with the definition's on integers, exactly.

    Where arrays hold infinities, every result that is not finite counts as NaN: whether infinite
    terms cancel to NaN depends on the order of summation.
    """
    engine, oracle = verify.numpy_engine(), verify.definition()
    got = (
        engine.cost(*arrays[1:], Layer(geometry), dtype),
        *engine.grads(*arrays, Layer(geometry), dtype),
    )
    want = (
        oracle.cost(*arrays[1:], Layer(geometry), "float64"),
        *oracle.grads(*arrays, Layer(geometry), "float64"),
    )
    if not np.isfinite(np.concatenate([a.reshape(-1) for a in arrays])).all():
        got, want = ([np.where(np.isfinite(a), a, np.nan) for a in both] for both in (got, want))
    found = (verify.difference(*both) for both in zip(got, want, strict=True))
    return next((error for error in found if error), None)


# The ladder.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_engine_agrees_with_the_literal_loops(name, dtype):
    shape, geometry = GEOMETRIES[name]
    oracle = definition.engine()
    assert (
        errors(verify.check(verify.numpy_engine(), shape, Layer(geometry), dtype, oracle=oracle))
        == []
    )


@given(cases())
def test_engine_agrees_with_the_definition_on_any_small_case(case):
    shape, geometry = case
    oracle = verify.definition()
    checks = verify.check(verify.numpy_engine(), shape, Layer(geometry), "float64", oracle=oracle)
    assert errors(checks) == []


@pytest.mark.parametrize("name", LARGE)
def test_engine_is_exact_on_large_integer_maps(name, rng):
    shape, geometry = LARGE[name]
    assert not first_difference(shape, geometry, maps(rng, shape, geometry), "float32")


@settings(max_examples=40)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 80), st.integers(1, 30), st.integers(1, 30)),
    pairs(1, 2),
    pairs(1, 12),
    pairs(1, 3),
    pairs(0, 3),
    pairs(1, 3),
)
def test_engine_is_exact_on_any_medium_case(shape, kernel, patch, stride, padding, spacing):
    padding = tuple(max(p, k - 1) for p, k in zip(padding, kernel, strict=True))
    geometry = Geometry(kernel, patch, stride, padding, 1, spacing)
    arrays = maps(np.random.default_rng(0), shape, geometry)
    assert not first_difference(shape, geometry, arrays, "float32")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ROUND_OFF)
def test_large_maps_stay_within_round_off(name, dtype):
    shape, geometry = LARGE[name]
    oracle = verify.numpy_engine()  # in float64, itself exact on integers of this shape
    checks = verify.check(verify.numpy_engine(), shape, Layer(geometry), dtype, oracle=oracle)
    assert errors(checks) == []


# Results.


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("name", ["odd patch", "FlowNetC", "even window"])
def test_gradients_that_are_not_needed_are_none_and_change_no_other(name, needs, rng):
    shape, geometry = GEOMETRIES[name]
    arrays = maps(rng, shape, geometry)
    both = cupycorr.correlation_vjp(*arrays, geometry)
    some = cupycorr.correlation_vjp(*arrays, geometry, needs=needs)
    for one, of_both, needed in zip(some, both, needs, strict=True):
        assert (one is None) if not needed else not verify.difference(one, of_both)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_results_have_the_dtype_of_the_maps(dtype, rng):
    shape, geometry = GEOMETRIES["window"]
    grad, fmap1, fmap2 = maps(rng, shape, geometry, dtype)
    results = (
        cupycorr.correlation(fmap1, fmap2, geometry),
        *cupycorr.correlation_vjp(grad, fmap1, fmap2, geometry),
    )
    assert {result.dtype for result in results} == {np.dtype(dtype)}


@pytest.mark.parametrize("shape", [(0, 3, 5, 6), (2, 0, 5, 6), (1, 2, 0, 6), (1, 2, 5, 0)])
def test_cost_volume_of_nothing_is_zero(shape):
    fmap, geometry = np.zeros(shape), Geometry(patch_size=3, padding=1)
    cost = cupycorr.correlation(fmap, fmap, geometry)
    assert not verify.difference(cost, np.zeros(geometry.cost_shape(shape)))


def test_normalized_cost_volume_without_channels_is_zero():
    fmap, geometry = np.zeros((1, 0, 4, 4), np.float32), Geometry(3, 3)
    cost = cupycorr.correlation(fmap, fmap, geometry, normalize=True)
    assert not verify.difference(cost, np.zeros((1, 3, 3, 2, 2)))


# Accumulation.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_sums_over_channels_do_not_stop_growing(dtype):
    fmap = np.ones((1, 4096, 2, 3))  # in 16 bits, 2048 + 1 is 2048, and 256 + 1 is 256
    cost = verify.numpy_engine().cost(fmap, fmap, Layer(Geometry()), dtype)
    assert not verify.difference(cost, np.full((1, 1, 1, 2, 3), 4096.0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_sums_over_displacements_do_not_stop_growing(dtype):
    fmap, geometry = np.ones((1, 1, 48, 48)), Geometry(patch_size=48, first_displacement=0)
    grad = np.ones(geometry.cost_shape(fmap.shape))
    got = verify.numpy_engine().grads(grad, fmap, fmap, Layer(geometry), dtype)
    want = verify.definition().grads(grad, fmap, fmap, Layer(geometry), "float64")
    assert not verify.difference(got[0], verify.round_to(want[0], dtype))
    assert not verify.difference(got[1], verify.round_to(want[1], dtype))


def test_16_bit_sums_are_divided_before_they_are_rounded():
    fmap = np.full((1, 4096, 2, 3), 16.0)  # the sum, 2**20, is beyond float16; the mean is not
    cost = verify.numpy_engine().cost(fmap, fmap, Layer(Geometry(), normalize=True), "float16")
    assert not verify.difference(cost, np.full((1, 1, 1, 2, 3), 256.0))


def test_sum_over_262144_channels_stays_within_round_off(rng):
    shape, geometry = (1, 262_144, 2, 3), Geometry(patch_size=3)
    fmap1, fmap2 = (verify.round_to(rng.random(shape), "float32") for _ in range(2))
    got = verify.numpy_engine().cost(fmap1, fmap2, Layer(geometry), "float32")
    want = verify.definition().cost(fmap1, fmap2, Layer(geometry), "float64")
    assert not verify.excess(got, want, want, shape[1], "float32")


# Extreme values.

EXTREME = [GEOMETRIES["one displacement"], GEOMETRIES["window at the border"], LARGE["PWC-Net"],
           LARGE["dense window"], LARGE["stereo"]]  # fmt: skip


@pytest.mark.parametrize(("shape", "geometry"), EXTREME, ids=str)
def test_products_of_huge_and_tiny_values_are_exact(shape, geometry, rng):
    grad, fmap1, fmap2 = maps(rng, shape, geometry)
    arrays = grad * 2.0**100, fmap1 * 2.0**126, fmap2 * 2.0**-100
    engine, oracle = verify.numpy_engine(), verify.definition()
    got = engine.cost(*arrays[1:], Layer(geometry), "float32")
    want = oracle.cost(*arrays[1:], Layer(geometry), "float64")
    assert not verify.difference(got, want)


@pytest.mark.parametrize(("shape", "geometry"), EXTREME, ids=str)
def test_gradients_with_huge_and_tiny_values_are_exact(shape, geometry, rng):
    grad, fmap1, fmap2 = maps(rng, shape, geometry)
    arrays = grad * 2.0**-110, fmap1 * 2.0**126, fmap2 * 2.0**126
    got = verify.numpy_engine().grads(*arrays, Layer(geometry), "float32")
    want = verify.definition().grads(*arrays, Layer(geometry), "float64")
    assert not verify.difference(got[0], want[0])
    assert not verify.difference(got[1], want[1])


def test_products_that_overflow_beyond_the_patch_are_seen_nowhere():
    shape, geometry = (1, 40, 20, 60), Geometry(patch_size=5)
    fmap1, fmap2 = np.ones(shape), np.ones(shape)
    fmap1[..., :30], fmap2[..., 34:] = 2.0**120, 2.0**120
    got = verify.numpy_engine().cost(fmap1, fmap2, Layer(geometry), "float32")
    want = verify.definition().cost(fmap1, fmap2, Layer(geometry), "float64")
    assert np.isfinite(got).all()
    assert not verify.difference(got, want)


# Values that are not finite: they reach what their taps touch, and nothing else.

SPREADING = {
    **{
        name: GEOMETRIES[name]
        for name in (
            "one displacement",
            "even patch, dilated",
            "displacement beyond the map",
            "window at the border",
            "dilated window",
            "stride",
            "stride above window",
            "lattice with untouched rows",
            "negative padding, window",
            "one-sided displacements",
            "spatial-correlation-sampler's defaults",
            "everything differs per axis",
        )
    },
    **{f"large {name}": LARGE[name] for name in ("PWC-Net", "dense window", "windows far apart")},
    "large lattice with untouched rows": (
        (1, 40, 30, 32),
        Geometry(2, 7, stride=2, padding=1, dilation=3),
    ),
    "rows of tiles": ((1, 64, 24, 32), Geometry(patch_size=13, dilation_patch=2)),
}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["grad_cost", "fmap1", "fmap2"])
@pytest.mark.parametrize("name", SPREADING)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_value_that_is_not_finite_reaches_only_what_its_taps_touch(name, which, value, rng):
    shape, geometry = SPREADING[name]
    arrays = maps(rng, shape, geometry)
    flat = arrays[which].reshape(-1)
    flat[rng.integers(0, flat.size, 2)] = value
    assert not first_difference(shape, geometry, arrays, "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["grad_cost", "fmap1", "fmap2"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_value_that_is_not_finite_reaches_the_same_in_16_bits(which, dtype, rng):
    shape, geometry = (1, 2, 9, 11), Geometry((1, 2), (3, 2), padding=1)
    arrays = maps(rng, shape, geometry)
    arrays[which].reshape(-1)[50] = np.nan
    arrays[which].reshape(-1)[90] = np.inf
    assert not first_difference(shape, geometry, arrays, dtype)


@pytest.mark.parametrize("name", SPREADING)
def test_upstream_of_displacements_that_lead_outside_is_never_read(name, rng):
    shape, geometry = SPREADING[name]
    grad, fmap1, fmap2 = maps(rng, shape, geometry)
    ones = np.ones(shape)
    unreachable = cupycorr.correlation(ones, ones, geometry) == 0
    grad[unreachable] = np.nan
    assert not first_difference(shape, geometry, [grad, fmap1, fmap2], "float32")


# Repetition.

REPEATED = [("FlowNetC", "float32"), ("dense window", "float16"), ("windows far apart", "float64"),
            ("defaults", "float32"), ("stereo", "float32"), ("small maps", "float32")]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), REPEATED)
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_cost_volume_has_the_same_bits_on_any_number_of_threads(name, dtype, threads, rng):
    shape, geometry = LARGE[name]
    fmap1, fmap2 = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    one, other = (np.empty(geometry.cost_shape(shape), dtype) for _ in range(2))
    for count, cost in ((1, one), (threads, other)):
        arrays = {"fmap1": fmap1, "fmap2": fmap2, "cost": cost}
        numpy_engine.run("cost", arrays, Layer(geometry), threads=count)
    assert not verify.difference(other, one)


@pytest.mark.parametrize(("name", "dtype"), REPEATED)
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_gradients_have_the_same_bits_on_any_number_of_threads(name, dtype, threads, rng):
    shape, geometry = LARGE[name]
    cost_shape = geometry.cost_shape(shape)
    shapes = {"grad_cost": cost_shape, "fmap1": shape, "fmap2": shape}
    arrays = {name: rng.standard_normal(s).astype(dtype) for name, s in shapes.items()}
    one, other = ([np.empty(shape, dtype) for _ in range(2)] for _ in range(2))
    for count, grads in ((1, one), (threads, other)):
        results = dict(zip(("grad_fmap1", "grad_fmap2"), grads, strict=True))
        numpy_engine.run("grads", arrays | results, Layer(geometry), threads=count)
    assert not verify.difference(other[0], one[0])
    assert not verify.difference(other[1], one[1])


@pytest.mark.parametrize(("name", "dtype"), REPEATED)
def test_same_inputs_give_the_same_bits_again(name, dtype, rng):
    shape, geometry = LARGE[name]
    cost_shape = geometry.cost_shape(shape)
    grad, *both = (rng.standard_normal(s).astype(dtype) for s in (cost_shape, shape, shape))
    first, again = (
        (cupycorr.correlation(*both, geometry), *cupycorr.correlation_vjp(grad, *both, geometry))
        for _ in range(2)
    )
    assert [verify.difference(*pair) for pair in zip(again, first, strict=True)] == [None] * 3
