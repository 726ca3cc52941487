"""The gradients of the flow-guided lookup on real CuPy arrays, on whatever CUDA device is there."""

import host
import lookup_definition
import numpy as np
import pytest
from lookup_cases import CASES, arguments
from lookup_grads_host import SCALE, differences, problem

from cupycorr import verify
from cupycorr.layer import DTYPES
from cupycorr.lookup import Lookup

pytestmark = pytest.mark.gpu
NAMES = ("grad_fmap1", "grad_levels", "grad_coords")


@pytest.fixture
def cp():
    return pytest.importorskip("cupy")


def grads(
    cp, given, lookup, dtype, *, index1=None, index2=None, index="int64", last=True, names=NAMES,
    **how,
):  # fmt: skip
    """Return the gradients in float64 by name; ``last`` as in `lookup_grads_host.grads`."""
    from cupycorr.cuda import lookup as cuda_lookup

    kind, wide = host.storage(dtype), DTYPES[dtype].accumulator
    grad, fmap1, levels, coords = given

    def there(fmap, last=last):
        if not last:
            return cp.asarray(fmap.astype(kind))
        return cp.moveaxis(cp.asarray(np.moveaxis(fmap, 1, -1).astype(kind, order="C")), -1, 1)

    arrays = {"fmap1": there(fmap1), "levels": [there(level) for level in levels]}
    arrays |= {
        "coords": cp.asarray(coords.astype(wide)),
        "grad_cost": cp.asarray(grad.astype(kind)),
    }
    for name, value in (("index1", index1), ("index2", index2)):
        arrays[name] = None if value is None else cp.asarray(value.astype(index))
    results = {
        "grad_fmap1": there(np.full(fmap1.shape, np.nan)),
        "grad_levels": [there(np.full(level.shape, np.nan), True) for level in levels],
        "grad_coords": cp.empty(coords.shape, wide),
    }
    arrays |= {name: results[name] if name in names else None for name in NAMES}
    cuda_lookup.run("grads", arrays, lookup, SCALE, **how)
    found = {name: results[name] for name in names}
    return {
        name: [one.get().astype(np.float64) for one in value]
        if name == "grad_levels"
        else value.get().astype(np.float64)
        for name, value in found.items()
    }


def compare(cp, name, dtype, **how):
    """Describe how the device's gradients differ from the definition's, by name."""
    given, indices = problem(name)
    *rest, coords = given
    lookup = CASES[name].lookup
    wanted = lookup_definition.grads(*rest, coords.astype(np.float32), lookup, SCALE, **indices)
    return differences(grads(cp, given, lookup, dtype, **indices, **how), wanted, dtype)


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_every_case_is_exact(cp, name, dtype, plain):
    assert not compare(cp, name, dtype, plain=plain)


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels apart"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["four levels", "special", "RAFT"])
def test_every_dtype_is_exact(cp, name, dtype, last):
    assert not compare(cp, name, dtype, last=last)


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_maps_that_no_index_names_have_no_terms(cp, index, plain):
    assert not compare(cp, "edges of patches", "float32", index=index, plain=plain)


@pytest.mark.parametrize("name", NAMES)
def test_one_gradient_alone_is_the_same(cp, name):
    given, indices = problem("RAFT, rough")
    lookup = CASES["RAFT, rough"].lookup
    alone = grads(cp, given, lookup, "float32", names=(name,), **indices)
    every = grads(cp, given, lookup, "float32", **indices)
    assert np.array_equal(np.concatenate([one.ravel() for one in _list(alone[name])]),
                          np.concatenate([one.ravel() for one in _list(every[name])]))  # fmt: skip


def _list(value):
    return value if isinstance(value, list) else [value]


def test_samples_may_be_taken_in_turns(cp, monkeypatch):
    from cupycorr.cuda import lookup_grads, lookup_grads_plan

    monkeypatch.setattr(lookup_grads_plan, "WINDOWS_BYTES", 1)
    lookup_grads._prepared.cache_clear()
    assert not compare(cp, "three maps", "float32")
    assert not compare(cp, "three maps", "float16", last=False)
    lookup_grads._prepared.cache_clear()


def test_arrays_may_have_any_strides(cp):
    from cupycorr.cuda import lookup as cuda_lookup

    (grad, fmap1, levels, coords), _ = problem("three maps")
    lookup = CASES["three maps"].lookup
    want = lookup_definition.grads(grad, fmap1, levels, coords.astype(np.float32), lookup, SCALE)

    def strided(array):
        wide = cp.zeros((*array.shape, 2), np.float32)
        wide[..., 1] = cp.asarray(array)
        return wide[..., 1]

    arrays = {
        "fmap1": strided(fmap1),
        "levels": tuple(map(strided, levels)),
        "coords": strided(coords),
        "grad_cost": strided(grad),
        "grad_fmap1": strided(fmap1),
    }
    cuda_lookup.run("grads", arrays, lookup, SCALE)
    got = arrays["grad_fmap1"].get().astype(np.float64)
    assert verify.difference(got, want[0]) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool", [2, (1, 2), 4], ids=str)
def test_the_gradient_of_a_pyramid_is_exact(cp, rng, dtype, pool):
    from cupycorr.cuda import lookup_grads

    lookup, kind = Lookup(1, 2 if pool == 4 else 3, pool=pool), host.storage(dtype)
    size = 11, 13
    given = [16.0 * rng.integers(-2, 3, (2, 35, *cells)) for cells in lookup.level_sizes(*size)]
    there = [
        cp.moveaxis(cp.asarray(np.moveaxis(one, 1, -1).astype(kind, order="C")), -1, 1)
        for one in given
    ]
    got = cp.full((2, 35, *size), np.nan, kind)
    lookup_grads.pyramid_grads(there, got, lookup)
    want = verify.round_to(lookup_definition.pyramid_vjp(given, lookup), dtype)
    assert verify.difference(got.get().astype(np.float64), want) is None


@pytest.mark.parametrize("empty", ["channels", "maps", "samples", "positions"])
def test_what_is_empty_gives_zeros_or_nothing(cp, empty):
    shapes = {"fmap1": (2, 3, 4, 5), "level": (2, 3, 6, 7), "coords": (2, 2, 4, 5)}
    where = {"channels": (1, 1, None), "maps": (None, 0, None), "samples": (0, None, 0),
             "positions": (2, None, 2)}[empty]  # fmt: skip
    for name, axis in zip(shapes, where, strict=True):
        if axis is not None:
            shapes[name] = tuple(0 if k == axis else n for k, n in enumerate(shapes[name]))
    fmap1, level, coords = (np.ones(shape) for shape in shapes.values())
    grad = np.ones(Lookup(1).cost_shape(fmap1.shape, coords.shape))
    indices = {} if empty == "channels" else dict.fromkeys(
        ("index1", "index2"), np.zeros(len(coords))
    )  # fmt: skip
    got = grads(cp, (grad, fmap1, [level], coords), Lookup(1), "float32", **indices)
    for name, want in (("grad_fmap1", fmap1), ("grad_coords", coords)):
        assert got[name].shape == want.shape
        assert not got[name].any()
    assert not got["grad_levels"][0].any()


def test_a_repeated_call_plans_nothing_and_gives_the_same_bits(cp, rng, monkeypatch):
    from cupycorr.cuda import lookup_grads

    fmap1, levels, coords, _ = arguments("RAFT, rough")
    lookup = CASES["RAFT, rough"].lookup
    grad = rng.standard_normal(lookup.cost_shape(fmap1.shape, coords.shape))
    given = (grad, rng.standard_normal(fmap1.shape), levels, coords)
    first = grads(cp, given, lookup, "float32")
    monkeypatch.setattr(lookup_grads, "plan_grads", lambda *_, **__: pytest.fail("it plans anew"))
    second = grads(cp, given, lookup, "float32")
    assert all(
        np.array_equal(one, two)
        for name in NAMES
        for one, two in zip(_list(first[name]), _list(second[name]), strict=True)
    )
