"""Every check of `verify` accepts what is right and catches a planted error."""

from dataclasses import replace

import definition
import ml_dtypes
import numpy as np
import pytest
from cases import GEOMETRIES
from hypothesis import given, settings
from strategies import cases

from cupycorr import Geometry, verify
from cupycorr.layer import DTYPES, Layer

CORRECT = verify.numpy_engine()
WINDOW = Geometry((3, 2), (4, 3), (1, 2), (2, 1), (1, 2), (2, 1))
SHAPE = (2, 3, 7, 8)
SIXTEEN_BIT = ["float16", "bfloat16"]
NAMES = ["cost", "grad_fmap1", "grad_fmap2"]


def failed(engine, dtype="float32", shape=SHAPE, geometry=WINDOW, oracle=CORRECT):
    """Return the names of the checks that an engine fails."""
    checks = verify.check(engine, shape, Layer(geometry), dtype, oracle=oracle)
    return [check.name for check in checks if check.error is not None]


def altered_terms(alter, *, cost=True, grads=True):
    """Return the literal loops with every term passed through ``alter``, where asked for.

    ``alter`` takes (i, j, p, q, y, x, Y1, X1, Y2, X2), with the tap's indices i and j, and
    returns such a tuple, or None to drop the term.
    """

    def terms(shape, geometry):
        for p, q, y, x, y1, x1, y2, x2 in definition.terms(shape, geometry):
            i = (y1 + geometry.padding[0] - y * geometry.stride[0]) // geometry.dilation[0]
            j = (x1 + geometry.padding[1] - x * geometry.stride[1]) // geometry.dilation[1]
            term = alter(i, j, p, q, y, x, y1, x1, y2, x2)
            if term is not None:
                yield term[2:]

    def altered_cost(fmap1, fmap2, layer, dtype):
        geometry = layer.geometry
        cost = np.zeros(definition.cost_shape(fmap1.shape, geometry))
        for p, q, y, x, y1, x1, y2, x2 in terms(fmap1.shape, geometry):
            cost[:, p, q, y, x] += (fmap1[:, :, y1, x1] * fmap2[:, :, y2, x2]).sum(1)
        return cost / layer.divisor(fmap1.shape[1])

    def altered_grads(grad, fmap1, fmap2, layer, dtype):
        geometry, divisor = layer.geometry, layer.divisor(fmap1.shape[1])
        grad1, grad2 = np.zeros(fmap1.shape), np.zeros(fmap2.shape)
        for p, q, y, x, y1, x1, y2, x2 in terms(fmap1.shape, geometry):
            grad1[:, :, y1, x1] += grad[:, p, q, y, x, None] * fmap2[:, :, y2, x2]
            grad2[:, :, y2, x2] += grad[:, p, q, y, x, None] * fmap1[:, :, y1, x1]
        return grad1 / divisor, grad2 / divisor

    return verify.Engine(
        "altered",
        altered_cost if cost else CORRECT.cost,
        altered_grads if grads else CORRECT.grads,
    )


def unaltered(*term):
    return term


def without_the_last_tap(i, j, *rest):
    return None if (i, j) == (2, 1) else (i, j, *rest)


def one_displacement_late(i, j, p, q, *rest):
    return (i, j, p + 1, q, *rest) if p + 1 < WINDOW.patch_size[0] else None


def even_patch_centred_after_the_middle(i, j, p, q, y, x, y1, x1, y2, x2):
    y2 -= WINDOW.dilation_patch[0]
    return (i, j, p, q, y, x, y1, x1, y2, x2) if y2 >= 0 else None


def displacements_exchanged(i, j, p, q, y, x, y1, x1, y2, x2):
    y2, x2 = y1 + (x2 - x1), x1 + (y2 - y1)
    inside = 0 <= y2 < SHAPE[2] and 0 <= x2 < SHAPE[3]
    return (i, j, p, q, y, x, y1, x1, y2, x2) if inside else None


def without_the_first_column_of_fmap1(*term):
    return None if term[-3] == 1 else term  # no tap touches column 0


def without_the_last_row_of_fmap2(*term):
    return None if term[-2] == SHAPE[2] - 1 else term


def border_clamped(i, j, p, q, y, x, y1, x1, y2, x2):
    return i, j, p, q, y, x, y1, x1, y2, min(x2, SHAPE[3] - 2)


def without_one_term(*term):
    return None if term[2:6] == (1, 1, 4, 2) and term[:2] == (0, 0) else term


INDEX_ERRORS = [
    without_the_last_tap,
    one_displacement_late,
    even_patch_centred_after_the_middle,
    displacements_exchanged,
    without_the_first_column_of_fmap1,
    without_the_last_row_of_fmap2,
    border_clamped,
    without_one_term,
]


# The whole check.


@pytest.mark.parametrize("dtype", DTYPES)
def test_correct_engine_is_accepted(dtype):
    assert failed(CORRECT, dtype, oracle=definition.engine()) == []


def test_unaltered_loops_are_accepted():
    assert failed(altered_terms(unaltered), "float64") == []


@pytest.mark.parametrize("alter", INDEX_ERRORS)
def test_wrong_term_in_the_cost_volume_is_caught(alter):
    assert "cost exact on integers" in failed(altered_terms(alter, grads=False))


@pytest.mark.parametrize("alter", INDEX_ERRORS)
def test_wrong_term_in_the_gradients_is_caught(alter):
    wrong = failed(altered_terms(alter, cost=False))
    assert {"grad_fmap1 exact on integers", "grad_fmap2 exact on integers"} <= set(wrong)


@pytest.mark.parametrize("alter", INDEX_ERRORS)
def test_gradients_of_another_operator_fail_the_adjoint_identity(alter):
    """Even if the oracle makes the same mistake."""
    engine = altered_terms(alter, cost=False)
    assert failed(engine, "float64", oracle=engine) == ["adjoint identity"]


def test_gradient_of_fmap2_that_is_not_mirrored_is_caught():
    def grads(grad, *rest):
        return CORRECT.grads(grad, *rest)[0], CORRECT.grads(grad[:, ::-1, ::-1], *rest)[1]

    engine = verify.Engine("unmirrored", CORRECT.cost, grads)
    assert failed(engine)[:2] == ["grad_fmap2 exact on integers", "adjoint identity"]


def test_gradients_in_the_wrong_order_are_caught():
    def grads(*arguments):
        return CORRECT.grads(*arguments)[::-1]

    wrong = failed(verify.Engine("exchanged", CORRECT.cost, grads))
    assert {"grad_fmap1 exact on integers", "grad_fmap2 exact on integers"} <= set(wrong)


def with_one_element(number, change):
    """Return the correct engine, with one element of one of its results changed."""

    def results(index, array):
        if index == number:
            array, middle = array.copy(), tuple((n - 1) // 2 for n in array.shape)
            array[middle] = change(array[middle])
        return array

    def cost(*arguments):
        return results(0, CORRECT.cost(*arguments))

    def grads(*arguments):
        grad1, grad2 = CORRECT.grads(*arguments)
        return results(1, grad1), results(2, grad2)

    return verify.Engine("one element", cost, grads)


CHANGES = {
    "plus one": lambda value: value + 1,
    "not a number": lambda value: np.nan,
    "infinite": lambda value: np.inf,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("number", [0, 1, 2], ids=NAMES)
def test_single_wrong_element_is_caught_by_its_name(number, change, dtype):
    wrong = failed(with_one_element(number, CHANGES[change]), dtype)
    assert f"{NAMES[number]} exact on integers" in wrong
    others = set(NAMES) - {NAMES[number]}
    assert not [name for name in wrong if others & set(name.split())]


@pytest.mark.parametrize("number", [0, 1, 2], ids=NAMES)
def test_element_in_the_last_places_of_float64_is_caught(number):
    engine = with_one_element(number, lambda value: value * (1 + 2**-40))
    assert f"{NAMES[number]} round-off" in failed(engine, "float64")


@pytest.mark.parametrize("dtype", DTYPES)
def test_forgotten_normalization_of_the_cost_volume_is_caught(dtype):
    def cost(*arguments):
        *maps, layer, dtype = arguments
        return CORRECT.cost(*maps, replace(layer, normalize=False), dtype)

    wrong = failed(verify.Engine("sums", cost, CORRECT.grads), dtype)
    assert wrong == ["normalized cost round-off"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_forgotten_normalization_of_the_gradients_is_caught(dtype):
    def grads(*arguments):
        *arrays, layer, dtype = arguments
        return CORRECT.grads(*arrays, replace(layer, normalize=False), dtype)

    wrong = failed(verify.Engine("sums", CORRECT.cost, grads), dtype)
    assert wrong == ["normalized grad_fmap1 round-off", "normalized grad_fmap2 round-off"]


# Precision.


def accumulating(round_sum, round_result):
    """Return a cost volume that rounds after every addition, for one tap and displacement."""

    def cost(fmap1, fmap2, layer, dtype):
        total = np.zeros((fmap1.shape[0], 1, 1, *fmap1.shape[2:]))
        for c in range(fmap1.shape[1]):
            total = round_sum(total + (fmap1[:, c] * fmap2[:, c])[:, None, None], dtype)
        return round_result(total / layer.divisor(fmap1.shape[1]), dtype)

    return verify.Engine("accumulating", cost, CORRECT.grads)


def exactly(values, dtype):
    return values


def in_float32(values, dtype):
    return verify.round_to(values, "float32")


def truncated(values, dtype):
    """Round towards zero."""
    rounded = verify.round_to(values, dtype)
    spacing = np.abs(values) * DTYPES[dtype].rounding
    below = verify.round_to(np.sign(values) * (np.abs(values) - spacing), dtype)
    return np.where(np.abs(rounded) > np.abs(values), below, rounded)


def rounded_twice(values, dtype):
    """Round to one bit more than the dtype has before the last rounding."""
    mantissa, exponent = np.frexp(values)
    finer = 1 / DTYPES[dtype].rounding * 2
    coarse = np.ldexp(np.rint(mantissa * finer) / finer, exponent)
    return verify.round_to(coarse, dtype)


DEEP = (1, 512, 3, 4)
"""So many channels that the error of 16-bit sums shows."""
SHALLOW = (1, 5, 12, 13)
"""So few channels that the error of one rounding shows; by 5, divisions round too."""


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_float32_sums_rounded_once_are_accepted(dtype):
    engine = accumulating(in_float32, verify.round_to)
    assert failed(engine, dtype, DEEP, Geometry()) == []


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_16_bit_sums_are_caught(dtype):
    engine = accumulating(verify.round_to, verify.round_to)
    assert "cost round-off" in failed(engine, dtype, DEEP, Geometry())


def test_float32_sums_in_float64_are_caught():
    engine = accumulating(in_float32, exactly)
    assert "cost round-off" in failed(engine, "float64", DEEP, Geometry())


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_results_rounded_towards_zero_are_caught(dtype):
    engine = accumulating(in_float32, truncated)
    assert "cost round-off" in failed(engine, dtype, SHALLOW, Geometry())


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_results_rounded_twice_are_caught(dtype):
    engine = accumulating(in_float32, rounded_twice)
    assert "cost round-off" in failed(engine, dtype, SHALLOW, Geometry())


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_sums_rounded_before_they_are_divided_are_caught(dtype):
    def cost(fmap1, fmap2, layer, dtype):
        total = CORRECT.cost(fmap1, fmap2, replace(layer, normalize=False), dtype)
        return verify.round_to(total / layer.divisor(fmap1.shape[1]), dtype)

    wrong = failed(verify.Engine("early", cost, CORRECT.grads), dtype, SHALLOW, Geometry())
    assert wrong == ["normalized cost round-off"]


# The parts.


def test_arrays_of_different_shapes_differ():
    found = verify.difference(np.zeros((2, 3)), np.zeros((3, 2)))
    assert found == "shape (2, 3) instead of (3, 2)"


def test_nan_equals_nan():
    values = np.array([np.nan, 1.0, np.inf])
    assert verify.difference(values, values.copy()) is None


@pytest.mark.parametrize(("got", "want"), [(np.nan, 0.0), (0.0, np.nan), (np.inf, -np.inf)])
def test_values_that_are_not_finite_differ_from_others(got, want):
    assert verify.difference(np.array([got]), np.array([want])) is not None


def test_difference_says_how_many_and_where():
    got = np.zeros((2, 3))
    got[1, 1:] = 5
    text = "2 of 6 values differ, first at (1, 1): 5.0 instead of 0.0"
    assert verify.difference(got, np.zeros((2, 3))) == text


def test_excess_is_none_at_one_rounding_and_found_at_two():
    want = np.ones(1)
    errors = [verify.excess(want + n * 2.0**-11, want, np.zeros(1), 0, "float16") for n in (1, 2)]
    assert [error is None for error in errors] == [True, False]


@pytest.mark.parametrize("got", [np.nan, np.inf])
def test_excess_is_found_where_a_value_is_not_finite(got):
    assert verify.excess(np.array([got]), np.ones(1), np.ones(1), 9, "float16") is not None


def test_excess_of_arrays_of_different_shapes_is_found():
    zeros = np.zeros((2, 1))
    assert verify.excess(zeros, zeros[0], zeros, 1, "float32") is not None


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_rounding_agrees_with_the_conversion_of_arrays(dtype, rng):
    values = rng.standard_normal(10_000).astype(np.float32).astype(np.float64)
    want = values.astype(np.float32).astype(dtype).astype(np.float64)
    assert not verify.difference(verify.round_to(values, np.dtype(dtype).name), want)


def test_rounding_to_bfloat16_is_one_rounding():
    just_above_a_tie = np.array([1 + 2.0**-8 + 2.0**-40])  # float32 would drop the last term
    assert verify.round_to(just_above_a_tie, "bfloat16") == 1 + 2.0**-7


# The oracle has an oracle.


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_definition_agrees_with_the_literal_loops(name, normalize, rng):
    shape, geometry = GEOMETRIES[name]
    assert differences(shape, geometry, normalize, rng) == [None] * 3


@settings(max_examples=15)
@given(cases())
def test_definition_agrees_with_the_literal_loops_on_any_case(case):
    assert differences(*case, False, np.random.default_rng(0)) == [None] * 3


def differences(shape, geometry, normalize, rng):
    """Compare the definition's three results with the loops' on integers."""
    shapes = geometry.cost_shape(shape), shape, shape
    grad, fmap1, fmap2 = (rng.integers(-2, 3, s).astype(float) for s in shapes)
    got, want = (
        (
            engine.cost(fmap1, fmap2, Layer(geometry, normalize=normalize), "float64"),
            *engine.grads(grad, fmap1, fmap2, Layer(geometry, normalize=normalize), "float64"),
        )
        for engine in (verify.definition(), definition.engine())
    )
    return [verify.difference(*both) for both in zip(got, want, strict=True)]


DOWNWARDS = [
    Geometry(patch_size=(1, 5), dilation_patch=(1, -1), first_displacement=0),
    Geometry(3, (4, 3), 2, 1, 2, dilation_patch=(-2, 1)),
    Geometry(patch_size=(2, 3), dilation_patch=(-1, -3), first_displacement=(4, 1)),
]


@pytest.mark.parametrize("similarity", ["product", "l1"])
@pytest.mark.parametrize("geometry", DOWNWARDS, ids=repr)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_displacements_that_run_downwards_are_those_of_the_definition(
    library, geometry, similarity
):
    if library == "torch":
        pytest.importorskip("torch")
    engine = verify.numpy_engine() if library == "numpy" else verify.torch_engine()
    layer = Layer(geometry, similarity)
    checks = verify.check(engine, (2, 3, 9, 8), layer, "float64", oracle=verify.definition())
    assert [check for check in checks if check.error] == []
