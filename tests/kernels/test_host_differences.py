"""Sums of absolute differences by the CUDA kernels, run on the processor."""

import random
from dataclasses import replace
from itertools import islice

import definition
import host
import numpy as np
import pytest
import test_host
from cases import CASES, l1
from host import DEVICES, SM_75, SM_80, SM_90
from test_host import GRADIENT_TILES, LAYERS, MIXED, PRODUCT_TILES, TILED, force, most  # noqa: F401

from cupycorr import verify

pytestmark = test_host.pytestmark
EVERY_CASE = pytest.mark.parametrize("case", CASES)
BOTH_COPIES = pytest.mark.parametrize("device", ["sm_75", "sm_80"])
# A row outside of the map follows one inside in its slot of shared memory; and strides and phases.
FEW = ["displacement beyond the map", "everything differs per axis"]
SOME = pytest.mark.parametrize("case", FEW)


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead(request):
    """Compile in the background what the selected tests will need."""
    with host.compiling_ahead(test_host.requested(request, of=l1)):
        yield


def compare_with_the_definition(device, shape, layer, **options):
    got = test_host.results(host.host_engine(device, order="shuffled"), shape, layer, **options)
    want = test_host.results(definition.engine(), shape, layer, **options)
    assert test_host.differences(got, want) == [None, None, None]


@pytest.mark.parametrize(
    ("case", "device"), [*((case, "sm_80") for case in CASES), *((case, "sm_75") for case in FEW)]
)
def test_tiled_kernels_are_correct(case, device):
    assert not test_host.errors(host.host_engine(DEVICES[device]), *l1(TILED[case]))


@EVERY_CASE
def test_plain_kernels_are_correct(case):
    assert not test_host.errors(host.host_engine(SM_75, plain=True), *l1(CASES[case]))


@pytest.mark.parametrize("device", ["sm_80"])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("case", FEW[-1:])
def test_other_dtypes_are_correct(case, dtype, device):
    assert not test_host.errors(host.host_engine(DEVICES[device]), *l1(TILED[case]), dtype)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_plain_kernels_are_correct_in_other_dtypes(dtype):
    assert not test_host.errors(host.host_engine(SM_75, plain=True), *l1(CASES[FEW[-1]]), dtype)


@pytest.mark.parametrize(("case", "device"), [("FlowNetC", "sm_90")])
def test_layers_of_networks_are_exact(case, device):
    checks = verify.check(host.host_engine(DEVICES[device]), *l1(LAYERS[case]), "float32")
    assert not [check for check in islice(checks, 4) if check.error]


@BOTH_COPIES
@SOME
def test_the_order_of_threads_changes_no_bit(case, device):
    assert not any(test_host.differences_of_orders(DEVICES[device], *l1(TILED[case])))


@pytest.mark.parametrize("mode", ["trace"])
@BOTH_COPIES
@SOME
def test_threads_share_no_word_without_a_barrier(case, device, mode):
    test_host.results(host.host_engine(DEVICES[device], mode=mode), *l1(TILED[case]))


@pytest.mark.parametrize("special", [(np.nan,), (np.inf, -np.inf)], ids=["NaN", "infinity"])
@BOTH_COPIES
@SOME
def test_what_is_not_finite_reaches_only_what_it_is_a_term_of(case, device, special):
    shape, layer = l1(TILED[case])
    oracle = verify.numpy_engine()
    want = test_host.results(oracle, shape, layer, special=special)
    for plain in (False, True):
        one = host.host_engine(DEVICES[device], plain=plain)
        got = test_host.results(one, shape, layer, special=special)
        assert test_host.differences(got, want) == [None, None, None]


@pytest.mark.parametrize(("device", "dtype"), [("sm_75", "float16"), ("sm_80", "float32")])
@pytest.mark.parametrize("case", ["FlowNetC"])
def test_misaligned_arrays_are_correct(case, device, dtype):
    engine = host.host_engine(DEVICES[device], aligned=False)
    assert not test_host.errors(engine, *l1(TILED[case]), dtype)


# ---- the tangent


def tangents(case, special=()):
    """Return maps and tangents of small integers, and of some special values among them."""
    shape, layer = l1(CASES[case])
    rng = np.random.default_rng(0)
    arrays = rng.integers(-2, 3, (4, *shape)).astype(np.float64)
    where = rng.choice(arrays.size, min(arrays.size, len(special)), replace=False)
    arrays.flat[where] = special[: len(where)]
    return arrays, layer


@pytest.mark.parametrize("order", ["ascending", "shuffled"])
@EVERY_CASE
def test_the_tangent_is_that_of_the_definition(case, order):
    arrays, layer = tangents(case)
    got = host.tangent(SM_80, *arrays, layer, "float32", order=order)
    assert verify.difference(got, definition.differences_tangent(*arrays, layer.geometry)) is None


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_the_tangent_is_that_of_the_definition_in_other_dtypes(dtype):
    arrays, layer = tangents(FEW[-1])
    got = host.tangent(SM_80, *arrays, layer, dtype)
    want = definition.differences_tangent(*arrays, layer.geometry)
    assert verify.difference(got, verify.round_to(want, dtype)) is None


@pytest.mark.parametrize("special", [(np.nan,) * 9, (np.inf, -np.inf) * 5], ids=["NaN", "infinity"])
def test_a_tangent_that_is_not_finite_is_that_of_the_definition(special):
    arrays, layer = tangents(FEW[-1], special)
    with np.errstate(invalid="ignore"):
        want = definition.differences_tangent(*arrays, layer.geometry)
    got = host.tangent(SM_80, *arrays, layer, "float32")
    assert verify.difference(got, want) is None


def test_a_tangent_is_divided_as_the_cost_is():
    arrays, layer = tangents("window")
    got = host.tangent(SM_80, *arrays, replace(layer, normalize=True), "float64")
    want = definition.differences_tangent(*arrays, layer.geometry) / (3 * 9)
    terms = np.abs(want).max() * np.ones(want.shape)
    assert verify.excess(got, want, terms, 3 * 9, "float64") is None


# ---- tiles that the model would not choose for problems that run in a moment


@pytest.mark.parametrize("tile", ["channels shared", "not ahead", "vectors"])
def test_sums_in_unusual_tiles_are_exact(tile, force):  # noqa: F811
    device, problem, value = PRODUCT_TILES[tile]
    force(product=most(value))
    compare_with_the_definition(device, *l1(problem))


@pytest.mark.parametrize(
    "tile", ["many rows", "many channels", "not ahead", "vectors", "vectors through registers"]
)
def test_gradients_in_unusual_tiles_are_exact(tile, force):  # noqa: F811
    device, problem, value = GRADIENT_TILES[tile]
    force(gradient=most(value))
    compare_with_the_definition(device, *l1(problem))


@pytest.mark.parametrize("seed", range(2))
def test_tiles_taken_at_random_are_exact(seed, force):  # noqa: F811
    choose = random.Random(seed).choice
    force(*2 * [lambda tiles: choose(tiles) if tiles else None])
    case = TILED[choose([*MIXED, *FEW, "window at the border", "stride 6, dilation_patch 4"])]
    compare_with_the_definition(choose([SM_75, SM_80, SM_90]), *l1(case))
