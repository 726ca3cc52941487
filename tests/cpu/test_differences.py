"""Absolute differences: what the NumPy engine computes, against the definition."""

import definition
import numpy as np
import pytest
from cases import CASES, GEOMETRIES, l1
from hypothesis import given
from strategies import cases

import cupycorr
from cupycorr import Geometry, verify
from cupycorr.cpu import engine as numpy_engine
from cupycorr.cpu import l1 as numpy_differences
from cupycorr.layer import DTYPES, Layer

L1 = verify.numpy_engine()
SMALL_BLOCKS = {
    "BLOCK_ELEMENTS": 7,
    "VOLUME_ELEMENTS": 5,
    "MAP_ELEMENTS": 1,
    "CHANNELS_LAST": 1,
    "CHANNELS_AT_ONCE": 2,
    "UNITS": 3,
}
LARGE = {
    "large FlowNetC": ((2, 64, 24, 32), Geometry(patch_size=21, dilation_patch=2)),
    "PWC-Net": ((2, 40, 20, 28), Geometry(patch_size=9)),
    "stereo": ((1, 48, 12, 90), Geometry(patch_size=(1, 41), first_displacement=(0, -40))),
    "defaults": ((2, 24, 30, 34), Geometry(3, 3, 2, 1, 2, 2)),
    "windows far apart": ((1, 20, 60, 61), Geometry(2, 5, stride=9, padding=3)),
}

LARGER = [pytest.param("large FlowNetC", marks=pytest.mark.slow), *[*LARGE][1:]]


def errors(checks):
    return [check for check in checks if check.error is not None]


def integers(rng, shape, geometry, maps=2):
    """Return the gradient of a cost volume and some maps, of small integers."""
    shapes = (geometry.cost_shape(shape), *(shape,) * maps)
    return [rng.integers(-2, 3, s).astype(float) for s in shapes]


def tangent_of(shape, geometry, arrays, dtype="float64"):
    cost = np.empty(geometry.cost_shape(shape), dtype)
    names = "fmap1", "fmap2", "tangent1", "tangent2"
    given = {name: a.astype(dtype) for name, a in zip(names, arrays, strict=True)}
    numpy_engine.run("tangent", given | {"cost": cost}, Layer(geometry, "l1"))
    return cost


# The ladder.


@pytest.mark.parametrize("name", CASES)
def test_definition_of_differences_agrees_with_the_literal_loops(name):
    engine, oracle = verify.definition(), definition.engine()
    assert errors(verify.check(engine, *l1(CASES[name]), "float64", oracle=oracle)) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_differences_agree_with_the_definition(name, dtype):
    checks = verify.check(L1, *l1(CASES[name]), dtype, oracle=verify.definition())
    assert errors(checks) == []


@pytest.mark.parametrize("name", CASES)
def test_differences_in_small_blocks_agree_with_the_definition(name, monkeypatch):
    for constant, value in SMALL_BLOCKS.items():
        monkeypatch.setattr(numpy_differences, constant, value)
    checks = verify.check(L1, *l1(CASES[name]), "float64", oracle=verify.definition())
    assert errors(checks) == []


@given(cases())
def test_differences_agree_with_the_definition_on_any_small_case(case):
    assert (
        errors(
            verify.check(L1, case[0], Layer(case[1], "l1"), "float64", oracle=verify.definition())
        )
        == []
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", LARGER)
def test_differences_of_large_maps_agree_with_the_definition(name, dtype):
    checks = verify.check(
        L1, LARGE[name][0], Layer(LARGE[name][1], "l1"), dtype, oracle=verify.definition()
    )
    assert errors(checks) == []


# The tangent.


@pytest.mark.parametrize("blocks", [{}, SMALL_BLOCKS], ids=["blocks", "small blocks"])
@pytest.mark.parametrize("name", CASES)
def test_tangent_agrees_with_the_literal_loops(name, blocks, monkeypatch, rng):
    for constant, value in blocks.items():
        monkeypatch.setattr(numpy_differences, constant, value)
    shape, geometry = GEOMETRIES[name]
    _, *arrays = integers(rng, shape, geometry, maps=4)
    want = definition.differences_tangent(*arrays, geometry)
    assert not verify.difference(tangent_of(shape, geometry, arrays), want)


@pytest.mark.parametrize("name", LARGE)
def test_tangent_is_adjoint_to_the_gradients(name, rng):
    shape, geometry = LARGE[name]
    grad, fmap1, fmap2, *tangents = integers(rng, shape, geometry, maps=4)
    cost = tangent_of(shape, geometry, (fmap1, fmap2, *tangents), "float32")
    grads = L1.grads(grad, fmap1, fmap2, Layer(geometry, "l1"), "float32")
    products = [(one * two).sum() for one, two in zip(grads, tangents, strict=True)]
    assert (cost * grad).sum() == sum(products)


# Single points.


def test_a_difference_counts_where_one_position_is_outside():
    fmap1, fmap2 = np.full((1, 1, 1, 2), 3.0), np.full((1, 1, 1, 2), 5.0)
    geometry = Geometry(patch_size=(1, 3), padding=(0, 1))
    cost = cupycorr.correlation(fmap1, fmap2, geometry, similarity="l1")
    # x = -1, 0, 1, 2 in the first map; rows are the displacements -1, 0, 1.
    want = [[[0, 3, 2, 5], [0, 2, 2, 0], [5, 2, 3, 0]]]
    assert not verify.difference(cost[0, :, :, 0], np.array(want, float))


def test_equal_values_have_no_gradient():
    fmap, geometry = np.ones((1, 2, 3, 4)), Geometry()
    grads = cupycorr.correlation_vjp(np.ones((1, 1, 1, 3, 4)), fmap, fmap, geometry,
                                     similarity="l1")  # fmt: skip
    assert not verify.difference(grads[0], np.zeros(fmap.shape))
    assert not verify.difference(grads[1], np.zeros(fmap.shape))


def test_normalized_differences_are_means(rng):
    shape, geometry = GEOMETRIES["window"]
    _, fmap1, fmap2 = integers(rng, shape, geometry)
    total = cupycorr.correlation(fmap1, fmap2, geometry, similarity="l1")
    mean = cupycorr.correlation(fmap1, fmap2, geometry, normalize=True, similarity="l1")
    assert not verify.difference(mean, total / (shape[1] * 9))


@pytest.mark.parametrize("function", ["correlation", "correlation_vjp"])
def test_another_similarity_is_refused(function):
    maps = (np.zeros((1, 1, 2, 2)),) * 2
    arrays = maps if function == "correlation" else (np.zeros((1, 1, 1, 2, 2)), *maps)
    with pytest.raises(ValueError, match="similarity must be 'product' or 'l1', got 'l2'"):
        getattr(cupycorr, function)(*arrays, Geometry(), similarity="l2")


@pytest.mark.parametrize("shape", [(0, 3, 5, 6), (2, 0, 5, 6), (1, 2, 0, 6)])
def test_differences_of_nothing_are_zero(shape):
    fmap, geometry = np.zeros(shape), Geometry(patch_size=3, padding=1)
    cost_shape = geometry.cost_shape(shape)
    cost = cupycorr.correlation(fmap, fmap, geometry, similarity="l1")
    grads = cupycorr.correlation_vjp(np.ones(cost_shape), fmap, fmap, geometry, similarity="l1")
    assert not verify.difference(cost, np.zeros(cost_shape))
    assert [grad.shape for grad in grads] == [shape, shape]


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_gradients_that_are_not_needed_are_none_and_change_no_other(needs, rng):
    shape, geometry = GEOMETRIES["everything differs per axis"]
    arrays = integers(rng, shape, geometry)
    both = cupycorr.correlation_vjp(*arrays, geometry, similarity="l1")
    some = cupycorr.correlation_vjp(*arrays, geometry, similarity="l1", needs=needs)
    for one, of_both, needed in zip(some, both, needs, strict=True):
        assert (one is None) if not needed else not verify.difference(one, of_both)


# Values that are not finite, and repetition.


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["grad_cost", "fmap1", "fmap2"])
@pytest.mark.parametrize("name", [*CASES, *LARGER])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_value_that_is_not_finite_reaches_only_what_its_taps_touch(name, which, value, rng):
    shape, geometry = (GEOMETRIES | LARGE)[name]
    arrays = integers(rng, shape, geometry)
    flat = arrays[which].reshape(-1)
    if flat.size:
        flat[rng.integers(0, flat.size, 2)] = value
    for engine in (L1, verify.definition()):
        results = [
            engine.cost(*arrays[1:], Layer(geometry, "l1"), "float64"),
            *engine.grads(*arrays, Layer(geometry, "l1"), "float64"),
        ]
        # Whether infinities cancel to NaN depends on the order of summation.
        results = [np.where(np.isfinite(array), array, np.nan) for array in results]
        if engine is L1:
            got = results
    assert [verify.difference(*both) for both in zip(got, results, strict=True)] == [None] * 3


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", LARGE)
def test_differences_have_the_same_bits_on_any_number_of_threads(name, dtype, rng):
    shape, geometry = LARGE[name]
    fmap1, fmap2 = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    grad = rng.standard_normal(geometry.cost_shape(shape)).astype(dtype)
    results = []
    for threads in (1, 3):
        cost, *grads = (np.empty_like(array) for array in (grad, fmap1, fmap2))
        layer, maps = Layer(geometry, "l1"), {"fmap1": fmap1, "fmap2": fmap2}
        numpy_engine.run("cost", maps | {"cost": cost}, layer, threads=threads)
        upstream = {"grad_cost": grad, "grad_fmap1": grads[0], "grad_fmap2": grads[1]}
        numpy_engine.run("grads", maps | upstream, layer, threads=threads)
        results.append([cost, *grads])
    assert [verify.difference(*both) for both in zip(*results, strict=True)] == [None] * 3


# What the checks are worth: planted errors.

BORDER = l1(CASES["window at the border"])


def test_check_finds_terms_with_one_position_outside_left_out(monkeypatch):
    monkeypatch.setattr(verify, "_framed", lambda maps, geometry: (maps, geometry, ()))
    assert errors(verify.check(verify.definition(), *BORDER, "float64"))


def test_check_finds_a_gradient_where_values_are_equal(monkeypatch):
    def sign(one, two, scratch):
        return np.where(one >= two, 1, -1).astype(np.int8)

    monkeypatch.setattr(numpy_differences, "_sign", sign)
    assert errors(verify.check(L1, *BORDER, "float64", oracle=verify.definition()))


@pytest.mark.parametrize("wrong", [(-1, 1), (1, -1), (-1, -1)])
def test_check_finds_gradients_of_the_wrong_sign(wrong):
    def grads(*arguments):
        grad1, grad2 = L1.grads(*arguments)
        return grad1 * wrong[0], grad2 * wrong[1]

    assert errors(verify.check(L1._replace(grads=grads), *BORDER, "float64"))


def test_check_finds_differences_summed_in_half_precision():
    def cost(fmap1, fmap2, layer, dtype):
        return verify.round_to(L1.cost(fmap1, fmap2, layer, "float16"), dtype)

    assert errors(verify.check(L1._replace(cost=cost), *BORDER, "float32"))
