"""The CUDA kernels of the lookup's gradients, run on the processor by hostcuda.h."""

import re

import host
import lookup_definition
import lookup_grads_host
import lookup_host
import numpy as np
import pytest
from devices import DEVICES
from host import ORDERS, SM_80
from lookup_cases import CASES
from lookup_grads_host import SCALE, differences, problem

from cupycorr import verify
from cupycorr.cuda import lookup_grads_plan
from cupycorr.cuda import sources as cuda_sources
from cupycorr.cuda.lookup_plan import Problem
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


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["RAFT", "RAFT, rough", "edges of patches", "three maps"])
def test_levels_without_segments_are_exact(name, dtype):
    assert not compare(name, ONE, dtype)


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("inputs", [("grad",), ("fmap1",), ("levels",)], ids="".join)
@pytest.mark.parametrize("name", ["integers", "four levels", "edges of patches"])
def test_what_is_not_finite_reaches_no_other_sum_on_tensor_cores(name, inputs, dtype):
    assert not compare(name, SM_80, dtype, special=(np.inf, inputs))


def test_what_is_not_finite_reaches_no_other_sum_of_a_level_without_segments():
    assert not compare("RAFT, rough", ONE, special=(np.inf, ("fmap1", "levels")))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["RAFT, rough", "edges of patches", "special"])
def test_the_order_of_threads_changes_no_bit(rng, name, dtype):
    (_, fmap1, levels, coords), indices = problem(name)
    lookup = CASES[name].lookup
    given = [
        verify.round_to(rng.standard_normal(array.shape), dtype)
        for array in (np.empty(lookup.cost_shape(fmap1.shape, coords.shape)), fmap1)
    ]
    first, *others = (
        lookup_grads_host.grads(
            SM_80, *given, levels, coords, lookup, dtype=dtype, order=order, **indices
        )
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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_threads_of_tensor_cores_share_no_word_without_a_barrier(dtype):
    assert not compare("RAFT, rough", SM_80, dtype, mode="trace")


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


def compare_many(samples=400, channels=4, dtype="float32", **how):
    """As `compare`, of many samples with one map, or of many channels."""
    rng, lookup = np.random.default_rng(0), Lookup(1, 2)
    fmap1 = rng.integers(-2, 3, (1, channels, 1, 2)).astype(float)
    levels = lookup_definition.pyramid(16.0 * rng.integers(-2, 3, (1, channels, 5, 6)), lookup)
    coords = rng.integers(-8, 56, (samples, 2, 1, 2)) / 8
    coords[: samples * 5 // 8] += 100  # no tile of the first that a block's threads see reaches it
    grad = rng.integers(-2, 3, lookup.cost_shape(fmap1.shape, coords.shape)).astype(float)
    indices = dict.fromkeys(("index1", "index2"), np.zeros(samples, np.int64))
    given = grad, fmap1, levels, coords, lookup, SCALE
    want = lookup_definition.grads(*given, **indices)
    return differences(lookup_grads_host.grads(ONE, *given, dtype, **indices, **how), want, dtype)


@pytest.mark.parametrize("channels", [300, 512, 777])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_more_channels_than_a_warp_owns_are_exact(channels, dtype):
    assert not compare_many(8, channels, dtype)


def compare_channels(channels=160, dtype="float32", **how):
    """As `compare`, of positions with a few cells each."""
    return compare_many(8, channels, dtype, **how)


def compare_growing(**how):
    """As `compare`, of positions whose last shares are much larger than their first."""
    return compare_digits(growing=True, **how)


def compare_digits(dtype="float32", spread=0, growing=False, **how):
    """As `compare`, of shares with 18 digits; those of positions differ by powers of 2.

    Maps of -1, 0 and 1 keep sums exact: all of them, or where shares differ those of positions.
    """
    rng, lookup, size = np.random.default_rng(0), Lookup(2, 2), (6, 7)
    fmap1 = rng.integers(-1, 2, (1, 40, *size)).astype(float)
    levels = [rng.integers(-1, 2, (1, 40, *one)).astype(float) for one in lookup.level_sizes(*size)]
    coords = np.stack(np.mgrid[:6, :7][::-1]) + rng.integers(-64, 64, (2, *size)) / 32
    grad = rng.integers(-255, 256, lookup.cost_shape(fmap1.shape, (1, 2, *size))).astype(float)
    grad *= 2.0 ** rng.integers(-spread, 1, size)
    if growing:
        coords = np.floor(coords)
        grad[:, :, :2] /= 2**10
    given = grad, fmap1, levels, coords[None], lookup, SCALE
    want = lookup_definition.grads(*given)
    results = "grad_fmap1", "grad_levels"
    got = lookup_grads_host.grads(SM_80, *given, dtype, results=results, **how)
    found = differences(got, want, dtype)
    return {name: text for name, text in found.items() if spread == 0 or name == "grad_fmap1"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("spread", [0, 14])
def test_shares_keep_their_digits_on_tensor_cores(dtype, spread):
    assert not compare_digits(dtype, spread)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_shares_may_grow_on_tensor_cores(dtype):
    assert not compare_growing(dtype=dtype)


@pytest.mark.parametrize("gpu", ["2070S", "V100", "A100", "4090", "H100", "5090"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensor_cores_multiply_where_they_are_faster(dtype, gpu):
    cells = tuple(Lookup(4, 4).level_sizes(64, 64))
    of = Problem(1, (1, 1), 256, (64, 64), cells, (True,) * 5)
    plan = lookup_grads_plan.plan_grads(
        lookup_grads_plan.RESULTS, of, Lookup(4, 4), dtype, DEVICES[gpu]
    )
    used = {one.kernel for one in plan.launches if dict(one.constants).get("tensor", False)}
    faster = {"float16": {"A100", "4090", "H100"}, "bfloat16": {"A100", "H100"}}
    wanted = lookup_grads_plan.MATRICES if gpu in faster.get(dtype, ()) else ()
    assert used == set(wanted)


def test_more_tiles_than_threads_are_exact():
    assert not compare_many()


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
        of = Problem(1, (1, 1), 8, (64, 64), cells, (True,) * 5)
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


ONE_BY_ONE = pytest.mark.parametrize(
    ("name", "dtype", "special"),
    [
        ("RAFT", "float32", None),
        ("edges of patches", "float16", None),
        ("RAFT, rough", "float32", (np.inf, ("fmap1", "levels"))),
    ],
)


@ONE_BY_ONE
def test_levels_may_be_stored_one_by_one(monkeypatch, name, dtype, special):
    assert not compare(name, SM_80, dtype, special=special)
    monkeypatch.setattr(lookup_grads_plan, "WINDOWS_BYTES", 1)
    assert not compare(name, SM_80, dtype, special=special)


@ONE_BY_ONE
def test_a_sum_that_is_not_resumed_is_found(monkeypatch, name, dtype, special):
    monkeypatch.setattr(lookup_grads_plan, "WINDOWS_BYTES", 1)
    patch = "before ? before[to] : 0", "0"
    if special is None:
        patch = "if (s.first > 0) resume(", "if (false) resume("
    assert compare(name, SM_80, dtype, special=special, patch=patch)


@pytest.mark.parametrize(
    "given", [(Lookup(4, 4), (55, 128), 64), (Lookup(7, 4), (270, 480), 2)], ids=["small", "4K"]
)
def test_stored_windows_take_bounded_memory(given):
    def words(lookup, size, samples):
        cells = tuple(lookup.level_sizes(*size))
        of = Problem(samples, (samples, samples), 256, size, cells, (True,) * (1 + lookup.levels))
        at_once = lookup_grads_plan.samples_at_once(of, lookup, False)
        of = of._replace(samples=at_once, maps=(at_once, at_once))
        plan = lookup_grads_plan.plan_grads(lookup_grads_plan.RESULTS, of, lookup, "float32", SM_80)
        return next(one.shape[0] for one in plan.workspaces if one.name == "windows")

    assert 128 << 20 < 4 * words(*given) <= 256 << 20


# ---- planted errors: (text, what takes its place, the case that finds it, options of `compare`)

INFINITE = {"special": (np.inf, ("fmap1", "levels"))}
PLAIN = {"plain": True}
HALF, BFLOAT16 = {"dtype": "float16"}, {"dtype": "bfloat16"}
PLANTED = {
    # lookup_grad.cuh
    "corners of weight 0": ("wy == 0 || wx == 0", "false", "integers", INFINITE | PLAIN),
    "dilated corners": (
        "j = lattice_index(v, d,", "j = lattice_index(v, d * spacing_y,",
        "dilated", {}),
    "axes exchanged": ("wy * wx * grad(j, i)", "wy * wx * grad(i, j)", "square", PLAIN),
    "weights exchanged": (
        "wx = k ? w.x.weight : 1 - w.x", "wx = k ? 1 - w.x.weight : w.x",
        "square", {}),
    "no scale": ("  sum *= scale;\n", "", "square", PLAIN),
    "spread without scale": ("= scale * widen(", "= widen(", "square", {}),
    "rows of weight 0": ("below >= 0 && w.y.weight != 0", "below >= 0", "integers", INFINITE),
    "columns of weight 0": ("right >= 0 && behind != 0", "right >= 0", "integers", INFINITE),
    "zero is no term": ("!exists ? no_term : sum == 0 ? 0 : sum", "sum == 0 ? no_term : sum",
                        "RAFT", {"special": (np.inf, ("fmap1", "levels"))}),
    "all terms": ("return share != 0 || 1 / share > 0;", "return true;", "integers", INFINITE),
    "a wrong sample": ("list ? list[k] : k", "k", "edges of patches", {}),
    "a reader lost": ("behind(readers ? readers[m + 1]", "behind(readers ? readers[m] + 1",
                      "edges of patches", {}),
    "a tile lost above": ("b.bottom + span_y > y", "b.bottom + span_y > y + 1", "RAFT", PLAIN),
    "a tile lost on the right": ("b.left < x + columns", "b.left < x", "RAFT, rough", {}),
    "right-sided": ("if (wy != 0) sum.x", "if (wy != 0 && wx != 0) sum.x", "integers", {}),
    "no pool of coords": ("(d ? wx : -wx) / level.pool_y", "(d ? wx : -wx)", "four levels", {}),
    "pools exchanged": (
        "(k ? wy : -wy) / level.pool_x", "(k ? wy : -wy) / level.pool_y",
        "stereo", {}),
    "NaN lost": ("x == x && y == y ? slope", "x == x || y == y ? slope", "special", {}),
    "coords exchanged": ("lane == 0 ? sum.x : sum.y", "lane == 0 ? sum.y : sum.x", "square", {}),
    # lookup_grad_lists.cu
    "readers not sorted": ("m < own_map || (m == own_map && e < own)", "e < own",
                           "edges of patches", {}),
    "bounds of the first position": (
        "for (int half = positions / 2; half > 0;", "for (int half = positions / 2; half > 16;",
        "RAFT, rough", {}),
    # lookup_grad.cu
    "a window's column lost": (
        "passes && inside(v, span_y) && inside(u, span_x)",
        "passes && inside(v, span_y) && inside(u, span_x - 1)",
        "RAFT", {}),
    "a row of a position's window lost": (
        "if (!inside(v, span_y) || ", "if (!inside(v, span_y - 1) || ",
        "RAFT", {}),
    "windows one by one": ("entry == targets || entry == target", "true", "RAFT, rough", {}),
    "tiles of other segments": ("first + thread * piece.segments", "first + thread",
                                "RAFT, rough", {}),
    "tiles in one segment": ("int first = first_tile;", "int first = 0;", "RAFT, rough", {}),
    "a part lost": (
        "k < segments; ++k) sum +=", "k < segments - 1; ++k) sum +=",
        "RAFT, rough", {}),
    "parts of another level": ("parts += s.segments[l] * elements_of(s, l)", "parts += 0",
                               "RAFT, rough", {}),
    "parts of another segment": ("parts += piece.segment *", "parts += 0 *", "RAFT, rough", {}),
    "the last list": ("(last && waiting > 0)", "false", "RAFT", {}),
    "items that wait": ("          list();\n        }\n", "        }\n", "RAFT", {}),
    "no end of a list": ("tiles.sample(hits[h + 1]) != e", "false", "edges of patches", {}),
    "the first level alone": ("s.first + k % stored_levels(s)", "s.first", "RAFT", {}),
    "the first cell's column": ("first_row(w), first_column(w)}", "first_row(w), 0}", "RAFT", {}),
    "hits of other warps": ("before += k < warp", "before += k <= warp", "edges of patches", {}),
    "nothing added anew": ("again |= 1u << i;", "again = 0;", "RAFT, rough", INFINITE),
    "the last channels": (
        "smaller(channel(load), count - unit)", "channel(load)",
        "one channel", {"mode": "trace"}),
    "a vote of 31 lanes": (
        "__ballot_sync(~0u, reads)", "(__ballot_sync(~0u, reads) & ~1u)",
        "RAFT", {}),
    "slopes of the first cells": (
        "at[lane] = exists ?", "at[lane] = exists && first == 0 ?",
        "RAFT", {}),
    # lookup_grad.cu, on tensor cores
    "units not exchanged": ("of[2][w], lane & 2)", "of[2][w], lane & 4)", "four levels", HALF),
    "pairs of an item": ("values[i + 1][at]", "values[i][at]", "four levels", HALF),
    "channels exchanged": ("c + k % 2, i = k / 2", "c + 1 - k % 2, i = k / 2", "four levels", HALF),
    "another target": ("lane % 4 * own_targets + i : i", "lane % 4 + 4 * i : i", "RAFT", HALF),
    "a part of float16 lost": ("? 3 : 2", "? 2 : 1", "many digits", HALF),
    "a part of bfloat16 lost": ("? 3 : 2", "? 1 : 2", "four levels", BFLOAT16),
    "the last units": ("smaller(offsets[k] + behind, last)", "offsets[k] + behind",
                       "one channel", HALF | {"mode": "trace"}),
    "factors left in": (
        "power_of_two(-exponent_of(factor(lane))), lane);\n    }", "1, lane);\n    }",
        "RAFT", HALF),
    "sums of another factor": ("multiply(sums, factor(lane) * inverse, lane)",
                               "multiply(sums, 1, lane)", "growing", HALF),
    "factors of other targets": ("shared[4 * (lane % 4 * own_targets + i)]", "shared[lane]",
                                 "four levels", HALF),
    "a share's neighbour": ("share(i);\n    }\n    if constexpr (scaled)",
                            "share(i ^ 1);\n    }\n    if constexpr (scaled)", "RAFT", HALF),
    "no more channels": ("own.start + first * 8 * unit >= own.count", "first > 0",
                         "many channels", HALF),
    # lookup_grad_plain.cu
    "plain: one level": (
        "if (l == number && output >= of_level)", "if (false)",
        "four levels", PLAIN),
    "plain: every term": ("if (is_term(share)) sum +=", "sum +=", "integers", INFINITE | PLAIN),
    "plain: a row lost": ("row < read_y", "row < read_y - 1", "square", PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_found(error):
    *patch, name, options = PLANTED[error]
    options = options | {"patch": tuple(patch)}
    others = {
        "many digits": compare_digits,
        "growing": compare_growing,
        "many channels": compare_channels,
    }
    assert found(
        lambda: others[name](**options) if name in others else compare(name, SM_80, **options)
    )


def found(*comparisons):
    """Whether one of some comparisons differs, or the shim notices what is wrong."""
    try:
        return any(comparison() for comparison in comparisons)
    except host.HostError:
        return True


def barriers():
    """Return the barriers of the kernels, each with the lines before it that make it unique."""
    for file in ("lookup_grad.cuh", "lookup_grad.cu", "lookup_grad_lists.cu"):
        lines = cuda_sources._read(file).splitlines(keepends=True)
        text = "".join(lines)
        for last, line in enumerate(lines):
            if re.fullmatch(r" *__sync(warp|threads)\(\);\n", line):
                first = last
                while text.count("".join(lines[first : last + 1])) > 1:
                    first -= 1
                yield f"{file}:{last + 1}", "".join(lines[first : last + 1]), line


BARRIERS = {where: (old, old[: -len(line)]) for where, old, line in barriers()}


@pytest.mark.parametrize("where", BARRIERS)
def test_a_missing_barrier_is_a_race(where):
    how = {"patch": BARRIERS[where], "mode": "trace"}
    assert found(
        lambda: compare("RAFT, rough", SM_80, **how),
        lambda: compare("RAFT, rough", SM_80, "float16", **how),
        lambda: compare("edges of patches", SM_80, **how, **INFINITE),
        lambda: compare_many(**how),
    )


@pytest.mark.parametrize(
    "patch",
    [
        ("v /= pool_y, u /= pool_x;", "v /= pool_x, u /= pool_y;"),
        ("sum / static_cast<accumulator>(pool_y * pool_x)", "sum / pool_y"),
        ("square[along * pitch + k]", "square[k * pitch + along]"),
        ("v >= s.rows[l]", "v > s.rows[l]"),
    ],
)
def test_a_planted_error_in_a_pyramid_is_found(patch):
    assert found(*(lambda pool=pool: compare_pyramid(pool, patch=patch) for pool in (2, (1, 2))))
