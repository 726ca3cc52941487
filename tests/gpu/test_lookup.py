"""The flow-guided lookup on real CuPy arrays, on whatever CUDA device is there."""

import host
import lookup_definition
import numpy as np
import pytest
from lookup_cases import CASES, arguments
from test_lookup_kernels import SCALE, rounded_levels

from cupycorr import verify
from cupycorr.layer import DTYPES
from cupycorr.lookup import Lookup

pytestmark = pytest.mark.gpu


@pytest.fixture
def cp():
    return pytest.importorskip("cupy")


def cost(cp, fmap1, levels, coords, lookup, dtype, *, index="int64", last=True, **how):
    """Return the cost in float64, of maps that lie in memory with channels last or apart."""
    from cupycorr.cuda import lookup as cuda_lookup

    kind = host.storage(dtype)

    def there(fmap):
        if not last:
            return cp.asarray(fmap.astype(kind))
        return cp.moveaxis(cp.asarray(np.moveaxis(fmap, 1, -1).astype(kind, order="C")), -1, 1)

    arrays = {"fmap1": there(fmap1), "levels": [there(level) for level in levels]}
    arrays["coords"] = cp.asarray(coords.astype(DTYPES[dtype].accumulator))
    for name in ("index1", "index2"):
        value = how.pop(name, None)
        arrays[name] = None if value is None else cp.asarray(value.astype(index))
    arrays["cost"] = cp.empty(lookup.cost_shape(fmap1.shape, coords.shape), kind)
    cuda_lookup.run("cost", arrays, lookup, SCALE, **how)
    return arrays["cost"].get().astype(np.float64)


def compare(cp, name, dtype, **how):
    """Describe the difference between the device's cost and the definition's."""
    fmap1, levels, coords, indices = arguments(name)
    lookup, narrow = CASES[name].lookup, coords.astype(np.float32)
    want = lookup_definition.cost(fmap1, levels, narrow, lookup, SCALE, **indices)
    got = cost(cp, fmap1, levels, coords, lookup, dtype, **indices, **how)
    return verify.difference(got, verify.round_to(want, dtype))


@pytest.mark.parametrize("name", CASES)
def test_the_plain_kernel_computes_every_case_right(cp, name):
    assert compare(cp, name, "float32", plain=True) is None


# Fewer, because a tile takes long to compile.
@pytest.mark.parametrize("name", ["RAFT", "RAFT, rough", "special", "stereo", "large radius"])
def test_tiles_are_exact(cp, name):
    assert compare(cp, name, "float32") is None


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels apart"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_exact(cp, dtype, last):
    assert compare(cp, "RAFT", dtype, last=last) is None


@pytest.mark.parametrize("plain", [False, True], ids=["tiled", "plain"])
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_maps_that_no_index_names_have_no_terms(cp, index, plain):
    assert compare(cp, "edges of patches", "float32", index=index, plain=plain) is None


def test_arrays_may_have_any_strides(cp, rng):
    fmap1, levels, coords, _ = arguments("three maps")
    lookup = CASES["three maps"].lookup
    want = lookup_definition.cost(fmap1, levels, coords, lookup, SCALE)

    def strided(array, dtype=np.float32):
        wide = cp.zeros((*array.shape, 2), dtype)
        wide[..., 1] = cp.asarray(array)
        return wide[..., 1]

    from cupycorr.cuda import lookup as cuda_lookup

    got = cp.empty(want.shape, np.float32)
    arrays = {
        "fmap1": strided(fmap1),
        "levels": tuple(map(strided, levels)),
        "coords": strided(coords),
        "cost": got,
    }
    cuda_lookup.run("cost", arrays, lookup, SCALE)
    assert verify.difference(got.get().astype(np.float64), want) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("itself", [False, True], ids=["copied", "the map itself"])
def test_levels_are_rounded_one_by_one(cp, rng, dtype, itself):
    from cupycorr.cuda import lookup as cuda_lookup

    lookup, kind = Lookup(1, 3), host.storage(dtype)
    fmap2 = verify.round_to(rng.standard_normal((2, 5, 9, 13)), dtype)
    given = cp.asarray(fmap2.astype(kind))
    levels = [
        cp.moveaxis(cp.empty((2, *size, 5), kind), 3, 1) for size in lookup.level_sizes(9, 13)
    ]
    if itself:
        levels[0][...] = given
        given = levels[0]
    cuda_lookup.pyramid(given, levels, lookup)
    for got, want in zip(levels, rounded_levels(fmap2, lookup, dtype), strict=True):
        assert np.array_equal(got.get().astype(np.float64), want)


@pytest.mark.parametrize("empty", ["channels", "maps", "samples", "positions"])
def test_what_is_empty_gives_zeros_or_nothing(cp, empty):
    shapes = {"fmap1": (2, 3, 4, 5), "level": (2, 3, 6, 7), "coords": (2, 2, 4, 5)}
    where = {"channels": (1, 1, None), "maps": (None, 0, None), "samples": (0, None, 0),
             "positions": (2, None, 2)}[empty]  # fmt: skip
    for name, axis in zip(shapes, where, strict=True):
        if axis is not None:
            shapes[name] = tuple(0 if k == axis else n for k, n in enumerate(shapes[name]))
    fmap1, level, coords = (np.ones(shape) for shape in shapes.values())
    indices = {} if empty == "channels" else dict.fromkeys(
        ("index1", "index2"), np.zeros(len(coords))
    )  # fmt: skip
    got = cost(cp, fmap1, [level], coords, Lookup(1), "float32", **indices)
    assert got.shape == Lookup(1).cost_shape(fmap1.shape, coords.shape)
    assert not got.any()


def test_a_repeated_call_plans_nothing(cp, monkeypatch):
    from cupycorr.cuda import lookup as cuda_lookup

    assert compare(cp, "square", "float32") is None
    monkeypatch.setattr(cuda_lookup, "plan_cost", lambda *_, **__: pytest.fail("it plans anew"))
    assert compare(cp, "square", "float32") is None
