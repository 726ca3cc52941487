"""The volume lookup on real CuPy arrays, on whatever CUDA device is there."""

import host
import lookup_definition
import numpy as np
import pytest
from lookup_cases import CASES, volume_arguments
from test_volume_lookup import LARGE, large

from cupycorr import verify
from cupycorr.layer import DTYPES

pytestmark = pytest.mark.gpu


@pytest.fixture
def cp():
    return pytest.importorskip("cupy")


def computed(cp, arguments, lookup, dtype, *, bits=False, **how):
    """Return the cost, the levels' gradients and that of coords, in float64.

    With ``bits`` arrays of 16 bits are given as integers.
    """
    from cupycorr.cuda import volume_lookup

    grad, levels, coords = arguments
    kind, wide = host.storage(dtype), DTYPES[dtype].accumulator

    def there(array):
        values = cp.asarray(array.astype(kind))
        return values.view(np.int16) if bits else values

    arrays = {"levels": [there(level) for level in levels], "coords": cp.asarray(coords, wide)}
    cost = there(np.full(grad.shape, np.nan))
    grads = {
        "grad_levels": [there(np.full(level.shape, np.nan)) for level in levels],
        "grad_coords": cp.full(coords.shape, np.nan, wide),
    }
    how |= {"dtype": dtype} if bits else {}
    volume_lookup.run("cost", arrays | {"cost": cost}, lookup, **how)
    volume_lookup.run("grads", arrays | {"grad_cost": there(grad)} | grads, lookup, **how)

    def here(array):
        return array.get().view(kind).astype(np.float64)

    return here(cost), [here(level) for level in grads["grad_levels"]], grads["grad_coords"].get()


def differences(cp, arguments, lookup, dtype, **how):
    """Describe how the device's results differ from the definition's."""
    grad, levels, coords = arguments
    got_cost, got_levels, got_coords = computed(cp, arguments, lookup, dtype, **how)
    narrow = coords.astype(np.float32)
    want_levels, want_coords = lookup_definition.volume_grads(grad, levels, narrow, lookup)
    pairs = [
        (got_cost, lookup_definition.volume_cost(levels, narrow, lookup)),
        *zip(got_levels, want_levels, strict=True),
    ]
    found = [verify.difference(got, verify.round_to(want, dtype)) for got, want in pairs]
    found.append(verify.difference(got_coords.astype(np.float64), want_coords))
    return [text for text in found if text is not None]


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_exact(cp, name):
    assert not differences(cp, volume_arguments(name), CASES[name].lookup, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_exact(cp, dtype):
    assert not differences(cp, volume_arguments("special"), CASES["special"].lookup, dtype)


@pytest.mark.parametrize("name", LARGE)
def test_large_radii_are_exact(cp, name):
    assert not differences(cp, *large(name))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_arrays_may_hold_bits(cp, dtype):
    case = CASES["three maps"]
    assert not differences(cp, volume_arguments("three maps"), case.lookup, dtype, bits=True)


def strided(cp, array):
    """Return an array, of which every other element of a larger one is an element."""
    wide = cp.zeros((*array.shape, 2), np.float32)
    wide[..., 1] = cp.asarray(array)
    return wide[..., 1]


def test_coords_and_upstream_gradients_may_have_any_strides(cp):
    from cupycorr.cuda import volume_lookup

    grad, levels, coords = volume_arguments("three maps")
    lookup, allocated = CASES["three maps"].lookup, []

    def allocate(size):
        memory = cp.cuda.alloc(size)
        allocated.append(size)
        return memory.ptr, memory

    got = [cp.empty(level.shape, np.float32) for level in levels]
    arrays = {"levels": [cp.asarray(level, np.float32) for level in levels], "grad_levels": got}
    arrays |= {"coords": strided(cp, coords), "grad_cost": strided(cp, grad)}
    stream = cp.cuda.Stream()
    stream.wait_event(cp.cuda.get_current_stream().record())
    volume_lookup.run("grads", arrays, lookup, allocate=allocate, stream=stream)
    stream.synchronize()
    assert allocated == [4 * coords.size, 4 * grad.size]
    want, _ = lookup_definition.volume_grads(grad, levels, coords, lookup)
    for one, two in zip(got, want, strict=True):
        assert verify.difference(one.get().astype(np.float64), two) is None


@pytest.mark.parametrize("result", ["grad_levels", "grad_coords"])
def test_one_gradient_alone_leaves_the_other(cp, result):
    from cupycorr.cuda import volume_lookup

    grad, levels, coords = volume_arguments("square")
    given = {"levels": [cp.asarray(level, np.float32) for level in levels]}
    given |= {"coords": cp.asarray(coords, np.float32), "grad_cost": cp.asarray(grad, np.float32)}
    written = {"grad_levels": [cp.empty_like(given["levels"][0])]}
    written["grad_coords"] = cp.empty_like(given["coords"])
    other = {name: None for name in written if name != result}
    volume_lookup.run("grads", given | written | other, CASES["square"].lookup)
    want = lookup_definition.volume_grads(grad, levels, coords, CASES["square"].lookup)
    got, want = (
        (written["grad_levels"][0], want[0][0])
        if result == "grad_levels"
        else (written["grad_coords"], want[1])
    )
    assert verify.difference(got.get().astype(np.float64), want) is None


@pytest.mark.parametrize("empty", ["samples", "positions"])
def test_what_is_empty_launches_nothing(cp, empty):
    shape = (0, 3) if empty == "samples" else (2, 0)
    levels = [np.ones((*shape, 4, 5))]
    coords = np.ones((shape[0], 2, shape[1]))
    lookup = CASES["three axes"].lookup
    grad = np.ones(lookup.cost_shape((0, 1, shape[1]), coords.shape))
    cost, _, _ = computed(cp, (grad, levels, coords), lookup, "float32")
    assert cost.size == 0


def test_a_repeated_call_plans_nothing(cp, monkeypatch):
    from cupycorr.cuda import volume_lookup

    given = cp, volume_arguments("square"), CASES["square"].lookup, "float32"
    assert not differences(*given)
    for name in ("plan_cost", "plan_grads"):
        monkeypatch.setattr(volume_lookup, name, lambda *_: pytest.fail("it plans anew"))
    assert not differences(*given)
