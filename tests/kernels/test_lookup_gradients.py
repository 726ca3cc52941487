"""The CUDA kernels of the lookup's gradients, run on the processor by hostcuda.h."""

import host
import lookup_definition
import lookup_grads_host
import lookup_host
import numpy as np
import pytest
from host import ORDERS, SM_80
from lookup_cases import CASES
from lookup_grads_host import SCALE, differences, problem

from cupycorr import verify
from cupycorr.cuda import lookup_grads_plan
from cupycorr.lookup import Lookup

pytestmark = pytest.mark.skipif(host.unavailable() is not None, reason=str(host.unavailable()))

EVERY_CASE = pytest.mark.parametrize("name", CASES)
BOTH = pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
# With one multiprocessor no level is cut into segments, with the A100's most of them are.
ONE = SM_80._replace(multiprocessors=1)


def compare(name, device, dtype="float32", *, special=None, **how):
    """Describe how the kernels' gradients differ from the definition's, by name.

    ``special`` is a value and the inputs that get some of it: "grad", "fmap1" or "levels".
    """
    given, indices = problem(name)
    grad, fmap1, levels, coords = given
    if special is not None:
        value, inputs = special
        of_name = {"grad": [grad], "fmap1": [fmap1], "levels": levels}
        rng = np.random.default_rng(1)
        for array in (one for which in inputs for one in of_name[which]):
            where = rng.choice(array.size, array.size // 150 + 1, replace=False)
            array.flat[where] = value
    with np.errstate(invalid="ignore"):
        wanted = lookup_definition.grads(
            grad, fmap1, levels, coords.astype(np.float32), CASES[name].lookup, SCALE, **indices
        )
    if "index" in how:
        kind = how.pop("index")
        indices = {which: value.astype(kind) for which, value in indices.items()}
    got = lookup_grads_host.grads(
        device, *given, CASES[name].lookup, SCALE, dtype, **indices, **how
    )
    return differences(got, wanted, dtype)


@BOTH
@EVERY_CASE
def test_every_case_is_exact(name, plain):
    assert not compare(name, SM_80, plain=plain)


@pytest.mark.parametrize("name", ["RAFT", "RAFT, rough", "edges of patches", "three maps"])
def test_levels_without_segments_are_exact(name):
    assert not compare(name, ONE)


@BOTH
@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels apart"])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["four levels", "edges of patches", "special"])
def test_every_dtype_is_exact(name, dtype, last, plain):
    assert not compare(name, SM_80, dtype, last=last, plain=plain)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_misaligned_arrays_are_exact(dtype):
    assert not compare("RAFT, rough", SM_80, dtype, aligned=False)


@BOTH
def test_indices_may_have_32_bits(plain):
    assert not compare("edges of patches", SM_80, index="int32", plain=plain)


@BOTH
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("inputs", [("grad",), ("fmap1",), ("levels",)], ids="".join)
@pytest.mark.parametrize("name", ["integers", "four levels", "dilated", "edges of patches"])
def test_what_is_not_finite_reaches_only_what_it_is_a_term_of(name, inputs, value, plain):
    assert not compare(name, SM_80, special=(value, inputs), plain=plain)


def test_what_is_not_finite_reaches_no_other_sum_of_a_level_without_segments():
    assert not compare("RAFT, rough", ONE, special=(np.inf, ("fmap1", "levels")))


@pytest.mark.parametrize("name", ["RAFT, rough", "edges of patches", "special"])
def test_the_order_of_threads_changes_no_bit(rng, name):
    (_, fmap1, levels, coords), indices = problem(name)
    lookup = CASES[name].lookup
    given = [
        rng.standard_normal(array.shape)
        for array in (np.empty(lookup.cost_shape(fmap1.shape, coords.shape)), fmap1)
    ]
    first, *others = (
        lookup_grads_host.grads(SM_80, *given, levels, coords, lookup, order=order, **indices)
        for order in ORDERS
    )
    for other in others:
        for which, value in first.items():
            assert all(
                verify.difference(one, two) is None
                for one, two in zip(value, other[which], strict=True)
            )


@BOTH
@pytest.mark.parametrize("name", ["RAFT, rough", "edges of patches", "tokens"])
def test_threads_share_no_word_without_a_barrier(name, plain):
    assert not compare(name, SM_80, mode="trace", plain=plain)
    assert not compare(name, SM_80, mode="trace", plain=plain, special=(np.inf, ("fmap1",)))


@BOTH
@pytest.mark.parametrize("name", ["RAFT", "stereo", "dilated", "edges of patches"])
def test_gradients_are_adjoint_to_the_cost(name, plain):
    (grad, fmap1, levels, coords), indices = problem(name)
    lookup = CASES[name].lookup
    cost = lookup_host.cost(SM_80, fmap1, levels, coords, lookup, SCALE, plain=True, **indices)
    got = lookup_grads_host.grads(
        SM_80, grad, fmap1, levels, coords, lookup, SCALE, plain=plain, **indices
    )
    product = (cost * grad).sum()
    assert (fmap1 * got["grad_fmap1"]).sum() == product
    pairs = zip(levels, got["grad_levels"], strict=True)
    assert sum((one * two).sum() for one, two in pairs) == product


@pytest.mark.parametrize("result", lookup_grads_plan.RESULTS)
def test_one_gradient_alone_is_computed_from_what_it_needs(result):
    given, indices = problem("RAFT, rough")
    lookup = CASES["RAFT, rough"].lookup
    every = lookup_grads_host.grads(SM_80, *given, lookup, last=False, **indices)
    alone = lookup_grads_host.grads(SM_80, *given, lookup, last=False, results=(result,), **indices)
    assert alone.keys() == {result}
    for one, two in zip(alone[result], every[result], strict=True):
        assert verify.difference(one, two) is None


def test_large_windows_and_double_are_left_to_the_plain_kernels():
    def kernels(lookup, dtype):
        cells = tuple(lookup.level_sizes(64, 64))
        of = lookup_grads_plan.Problem(1, (1, 1), 8, (64, 64), cells, (True,) * 5)
        plan = lookup_grads_plan.plan_grads(lookup_grads_plan.RESULTS, of, lookup, dtype, SM_80)
        return {launch.kernel for launch in plan.launches}

    assert "lookup_grad_fmap1" in kernels(Lookup(4), "float16")
    for found in (kernels(Lookup(4), "float64"), kernels(Lookup(4, dilation_patch=5), "float32")):
        assert found == {
            "plain_grad_fmap1",
            "plain_grad_levels",
            "plain_grad_coords",
            "bound_tiles",
        }


PYRAMIDS = pytest.mark.parametrize("pool", [2, (1, 2), 4], ids=str)


def compare_pyramid(pool, dtype="float32", **how):
    """Describe how the gradient of a pyramid differs from the definition's."""
    lookup = Lookup(1, 2 if pool == 4 else 3, pool=pool)
    rng = np.random.default_rng(0)
    grads = [16.0 * rng.integers(-2, 3, (2, 35, *size)) for size in lookup.level_sizes(11, 13)]
    got = lookup_grads_host.pyramid_grads(SM_80, grads, lookup, dtype, **how)
    want = lookup_definition.pyramid_vjp(grads, lookup)
    return verify.difference(got, verify.round_to(want, dtype))


@PYRAMIDS
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_the_gradient_of_a_pyramid_is_exact(pool, dtype):
    assert compare_pyramid(pool, dtype) is None


def test_threads_share_no_word_of_a_pyramid_without_a_barrier():
    assert compare_pyramid(2, mode="trace") is None
