"""The CUDA kernels of the flow-guided lookup, run on the processor by hostcuda.h."""

import math

import host
import lookup_definition
import lookup_host
import numpy as np
import pytest
from host import ORDERS, SM_75, SM_80
from lookup_cases import CASES, arguments

from cupycorr import verify
from cupycorr.cuda import lookup_tiles
from cupycorr.lookup import Lookup

pytestmark = pytest.mark.skipif(host.unavailable() is not None, reason=str(host.unavailable()))

SCALE = 0.25


@pytest.fixture(autouse=True)
def _tiles_that_do_not_pay(monkeypatch):
    """Tile small problems too, for which the plain kernel would be faster."""
    lookup_tiles.tile.cache_clear()
    monkeypatch.setattr(lookup_tiles, "_plain_cycles", lambda *_: math.inf)
    yield
    lookup_tiles.tile.cache_clear()


EVERY_CASE = pytest.mark.parametrize("name", CASES)


def compare(name, device, dtype="float32", **how):
    """Describe the difference between a kernel's cost and the definition's."""
    fmap1, levels, coords, indices = arguments(name)
    lookup = CASES[name].lookup
    want = lookup_definition.cost(
        fmap1, levels, coords.astype(np.float32), lookup, SCALE, **indices
    )
    got = lookup_host.cost(device, fmap1, levels, coords, lookup, SCALE, dtype, **indices, **how)
    return verify.difference(got, verify.round_to(want, dtype))


def compare_infinite(name, device, value, dtype="float32", **how):
    """As `compare`, of maps with some values that are not finite."""
    fmap1, levels, coords, indices = arguments(name)
    rng = np.random.default_rng(1)
    for fmap in (fmap1, *levels):
        fmap.flat[rng.choice(fmap.size, fmap.size // 100 + 1, replace=False)] = value
    lookup = CASES[name].lookup
    with np.errstate(invalid="ignore"):
        want = lookup_definition.cost(fmap1, levels, coords, lookup, SCALE, **indices)
    got = lookup_host.cost(device, fmap1, levels, coords, lookup, SCALE, dtype, **indices, **how)
    return verify.difference(got, verify.round_to(want, dtype))


INFINITE = pytest.mark.parametrize("name", ["integers", "four levels", "dilated", "stereo"])


@EVERY_CASE
def test_the_plain_kernel_is_exact(name):
    assert compare(name, SM_80, plain=True) is None


# Copies past the registers and through them; FMA units and tensor cores.
TILED = {
    "sm_80 float32": (SM_80, "float32"),
    "sm_80 float16": (SM_80, "float16"),
    "sm_80 bfloat16": (SM_80, "bfloat16"),
    "sm_75 float32": (SM_75, "float32"),
    "sm_75 float16": (SM_75, "float16"),
}
EVERY_TILED = pytest.mark.parametrize("how", TILED)


def tiled(plan):
    """Return a plan, which must use the tiled kernel."""
    assert plan.launches[-1].kernel == "lookup_tiled"
    return plan


@EVERY_TILED
@EVERY_CASE
def test_the_tiled_kernel_is_exact(name, how):
    assert compare(name, *TILED[how], planned=tiled) is None


@pytest.mark.parametrize("order", ORDERS[1:])
@EVERY_TILED
@pytest.mark.parametrize("name", ["RAFT", "RAFT, rough", "special"])
def test_the_tiled_kernel_does_not_depend_on_the_order_of_threads(name, how, order):
    assert compare(name, *TILED[how], planned=tiled, order=order) is None


@EVERY_TILED
@pytest.mark.parametrize("name", ["RAFT", "RAFT, rough", "stereo", "edges of patches"])
def test_threads_share_no_word_without_a_barrier(name, how):
    assert compare(name, *TILED[how], planned=tiled, mode="trace") is None


@EVERY_TILED
@pytest.mark.parametrize("name", ["RAFT", "edges of patches"])
def test_maps_that_lie_otherwise_are_packed(name, how):
    assert compare(name, *TILED[how], planned=tiled, last=False) is None
    assert compare(name, *TILED[how], planned=tiled, aligned=False) is None


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("device", [SM_75, SM_80], ids=["sm_75", "sm_80"])
@INFINITE
def test_what_is_not_finite_reaches_only_its_terms_in_tiles(name, device, value):
    for dtype in ("float32", "float16"):
        assert compare_infinite(name, device, value, dtype, planned=tiled) is None


@pytest.mark.parametrize("name", ["RAFT", "RAFT, rough", "dilated", "large radius"])
def test_tiles_sum_as_the_plain_kernel_does(rng, name):
    fmap1, levels, coords, indices = arguments(name)
    fmap1 = rng.standard_normal(fmap1.shape).astype(np.float32)
    levels = [rng.standard_normal(level.shape).astype(np.float32) for level in levels]
    coords = coords + rng.random(coords.shape).astype(np.float32)
    got, want = (
        lookup_host.cost(
            SM_80, fmap1, levels, coords, CASES[name].lookup, SCALE, **indices, plain=plain
        )
        for plain in (False, True)
    )
    assert np.array_equal(got, want)


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels apart"])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["four levels", "edges of patches", "special"])
def test_the_plain_kernel_is_exact_in_every_dtype(name, dtype, last):
    assert compare(name, SM_80, dtype, plain=True, last=last) is None


@pytest.mark.parametrize("value", [np.inf, np.nan])
@INFINITE
def test_what_is_not_finite_reaches_only_what_it_is_a_term_of(name, value):
    assert compare_infinite(name, SM_80, value, plain=True) is None


def rounded_levels(fmap2, lookup, dtype):
    """Return the levels of a map, each rounded, from sums in float32 row by row."""
    wide = np.float64 if dtype == "float64" else np.float32
    (py, px), levels = lookup.pool, [fmap2.astype(wide)]
    for _ in range(1, lookup.levels):
        finer, total = levels[-1], wide(0)
        h, w = finer.shape[2] // py, finer.shape[3] // px
        for y in range(py):
            for x in range(px):
                total = total + finer[:, :, y : h * py : py, x : w * px : px]
        mean = (total / wide(py * px)).astype(np.float64)
        levels.append(verify.round_to(mean, dtype).astype(wide))
    return levels


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels apart"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("pool", [2, (1, 3)], ids=str)
def test_levels_are_rounded_one_by_one(rng, dtype, pool, last):
    lookup = Lookup(1, 3, pool=pool)
    fmap2 = verify.round_to(rng.standard_normal((2, 35, 9, 38)), dtype)
    got = lookup_host.pyramid(SM_80, fmap2, lookup, dtype, last=last)
    for one, want in zip(got, rounded_levels(fmap2, lookup, dtype), strict=True):
        assert np.array_equal(one, want)


@pytest.mark.parametrize("order", ORDERS)
def test_packing_does_not_depend_on_the_order_of_threads(rng, order):
    fmap2 = rng.integers(-2, 3, (2, 35, 9, 38)).astype(float)
    got = lookup_host.pyramid(SM_80, fmap2, Lookup(1, 2), order=order)
    for one, want in zip(got, lookup_definition.pyramid(fmap2, Lookup(1, 2)), strict=True):
        assert np.array_equal(one, want)


# ---- planted errors: (text, what takes its place, the case that finds it)

PLANTED = {
    "truncated": ("= round_down(near);", "= static_cast<int>(near);", "outside"),
    "NaN lost": ("scaled == scaled ? near - below : scaled", "near - below", "special"),
    "2 * level": ("found.pool_y * pool_y", "found.pool_y + pool_y", "four levels"),
    "pools exchanged": ("x[0], level.pool_x", "x[0], level.pool_y", "stereo"),
    "coordinates exchanged": ("x[positions_of(s)], level", "x[0], level", "square"),
    "corners exchanged": (
        "between(w.y, between(w.x, s00, s01), between(w.x, s10, s11))",
        "between(w.y, between(w.x, s00, s10), between(w.x, s01, s11))",
        "square",
    ),
    "order ignored": ("x_first ? i *", "false ? i *", "three maps"),
    "one sample for all": ("indices ? indices[e] : e", "indices ? indices[e] : 0", "three maps"),
    "index ignored": ("indices ? indices[e] : e", "e", "edges of patches"),
    "index not checked": ("inside<long long>(m, maps)", "true", "edges of patches"),
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_found(error):
    *patch, name = PLANTED[error]
    assert compare(name, SM_80, plain=True, patch=tuple(patch)) is not None


@pytest.mark.parametrize(
    ("patch", "name"),
    [
        (("(weight == 0 ? 0 : value)", "value"), "integers"),
        (("j * spacing_y - reach_y + d", "j * spacing_y - reach_y + d * spacing_y"), "dilated"),
    ],
)
def test_a_planted_error_is_found_by_infinities(patch, name):
    assert compare_infinite(name, SM_80, np.inf, plain=True, patch=patch) is not None


@pytest.mark.parametrize(
    "patch",
    [
        ("v * pool_y; y < (v + 1) * pool_y", "v; y < v + pool_y"),
        ("sum / static_cast<accumulator>(pool_y * pool_x)", "sum / pool_y"),
        ("square[along * pitch + k]", "square[k * pitch + along]"),
    ],
)
def test_a_planted_error_in_levels_is_found(rng, patch):
    fmap2 = rng.integers(-2, 3, (2, 35, 9, 38)).astype(float)
    got = lookup_host.pyramid(SM_80, fmap2, Lookup(1, 2), patch=patch)
    want = lookup_definition.pyramid(fmap2, Lookup(1, 2))
    assert any(not np.array_equal(*pair) for pair in zip(got, want, strict=True))


# ---- of the tiled kernel: (text, what takes its place, the case, how it runs)

PLANTED_IN_TILES = {
    "a barrier before sums land in buffers": (
        "      __syncthreads();\n      float* const to", "      float* const to",
        "RAFT", "sm_80 float32", "shuffled"),
    "a barrier before the products": (
        "land(c);\n      __syncthreads();", "land(c);", "RAFT", "sm_75 float32", "shuffled"),
    "no wait for copies": (
        "\n        wait_for_copies();", "", "RAFT", "sm_80 float32", "ascending"),
    "one buffer": ("c % buffers", "0", "RAFT", "sm_75 float32", "shuffled"),
    "a box one row short": (
        "smaller(y + span_y - (w", "smaller(y + span_y - 1 - (w", "RAFT", "sm_80 float16",
        "ascending"),
    "a row of weight 1 left out": (
        "(w.y.weight == 0), plan.rows", "(w.y.weight != 0), plan.rows", "RAFT", "sm_80 float32",
        "ascending"),
    "no zeros behind the last channel": (
        "const bool exists = (c * units", "const bool exists = true || (c * units",
        "integers", "sm_80 float32", "ascending"),
    "regions overlap": (
        "plan.start[r] = stored;", "plan.start[r] = 0;", "RAFT, rough", "sm_80 float16",
        "ascending"),
    "all in one region": (
        "if (stored_cells(all, skew) <= capacity)", "if (true)", "RAFT, rough", "sm_80 float32",
        "ascending"),
    "entries of one position": (
        "i += part, ++entry", "i += part + 1, ++entry", "RAFT, rough", "sm_80 float32",
        "ascending"),
    "columns of fragments": (
        "lane % 4 * 2;", "lane % 4 * 2 + 1;", "RAFT", "sm_80 bfloat16", "ascending"),
    "the first band only": (
        "plan.j0 * spacing_y - reach_y, x", "-reach_y, x", "large radius", "sm_80 float16",
        "ascending"),
}  # fmt: skip


@pytest.mark.parametrize("error", PLANTED_IN_TILES)
def test_a_planted_error_in_tiles_is_found(error):
    *patch, name, how, order = PLANTED_IN_TILES[error]
    try:
        found = compare(name, *TILED[how], planned=tiled, order=order, patch=tuple(patch))
    except host.HostError as raised:
        found = str(raised)
    assert found is not None
