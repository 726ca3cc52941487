"""The CUDA kernels of the volume lookup, run on the processor by hostcuda.h."""

import host
import lookup_definition
import numpy as np
import pytest
import volume_lookup_host
from host import ORDERS
from lookup_cases import CASES, volume_arguments

from cupycorr import verify
from cupycorr.cuda import volume_lookup_plan
from cupycorr.cuda.cost import SECTOR_BYTES
from cupycorr.lookup import Lookup

pytestmark = pytest.mark.skipif(host.unavailable() is not None, reason=str(host.unavailable()))

EVERY_CASE = pytest.mark.parametrize("name", CASES)
RESULTS = pytest.mark.parametrize("what", ["cost", "grads"])


def differences(what, arguments, lookup, dtype="float32", **how):
    """Describe how a kernel's results differ from the definition's, by name."""
    grad, levels, coords = arguments
    narrow = coords.astype(np.float32)
    with np.errstate(invalid="ignore"):
        if what == "cost":
            got = {"cost": volume_lookup_host.cost(levels, coords, lookup, dtype, **how)}
            want = {"cost": lookup_definition.volume_cost(levels, narrow, lookup)}
        else:
            got = volume_lookup_host.grads(grad, levels, coords, lookup, dtype, **how)
            wanted = lookup_definition.volume_grads(grad, levels, narrow, lookup)
            want = dict(zip(volume_lookup_plan.GRADIENTS, wanted, strict=True))
        if "grad_levels" in got:
            for arrays in (got, want):
                pairs = enumerate(arrays.pop("grad_levels"))
                arrays |= {f"grad_level{number}": level for number, level in pairs}
        found = {
            name: verify.difference(
                got[name], value if name == "grad_coords" else verify.round_to(value, dtype)
            )
            for name, value in want.items()
        }
    return {name: text for name, text in found.items() if text is not None}


def compare(what, name, dtype="float32", *, special=None, **how):
    """As `differences`, of a case; ``special`` is a value, and the inputs that get some of it."""
    arguments = volume_arguments(name)
    if special is not None:
        value, inputs = special
        rng = np.random.default_rng(1)
        for array in [arguments[0]] if inputs == "grad" else arguments[1]:
            array.flat[rng.choice(array.size, array.size // 150 + 1, replace=False)] = value
    return differences(what, arguments, CASES[name].lookup, dtype, **how)


@RESULTS
@EVERY_CASE
def test_every_case_is_exact(name, what):
    assert not compare(what, name)


@RESULTS
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["four levels", "edges of patches", "special"])
def test_every_dtype_is_exact(name, dtype, what):
    assert not compare(what, name, dtype)


@RESULTS
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["outside", "three maps"])
def test_misaligned_arrays_are_exact(name, dtype, what):
    assert not compare(what, name, dtype, aligned=False)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(
    ("what", "inputs"), [("cost", "levels"), ("grads", "levels"), ("grads", "grad")]
)
@pytest.mark.parametrize("name", ["integers", "four levels", "dilated", "stereo"])
def test_what_is_not_finite_reaches_only_what_it_is_a_term_of(name, what, inputs, value):
    assert not compare(what, name, special=(value, inputs))


# Radii for which a block computes a part of the outputs, or a gradient a few positions, or nothing
# is staged; with the dtype for which that is so.
LARGE = {
    "rows apart": (Lookup(9), "float32"),
    "rows apart in double": (Lookup((5, 6)), "float64"),
    "columns apart": (Lookup((0, 130)), "float32"),
    "both apart": (Lookup((1, 41), dilation_patch=(2, 3), order="xy"), "float64"),
    "a gradient of one position": (Lookup(20, order="xy"), "float32"),
    "nothing staged": (Lookup(26, dilation_patch=(2, 1)), "float32"),
}


def large(name, positions=(2, 3)):
    lookup, dtype = LARGE[name]
    rng = np.random.default_rng(0)
    levels = [rng.integers(-2, 3, (1, *positions, 5, 9)).astype(float)]
    coords = rng.integers(-8, 40, (1, 2, *positions)) / 8
    grad = rng.integers(-2, 3, lookup.cost_shape((1, 1, *positions), coords.shape)).astype(float)
    return (grad, levels, coords), lookup, dtype


@RESULTS
@pytest.mark.parametrize("name", LARGE)
def test_large_radii_are_exact(name, what):
    assert not differences(what, *large(name))


def test_the_large_radii_are_planned_as_their_names_say():
    def constants(name):
        (_, levels, coords), lookup, dtype = large(name)
        problem = volume_lookup_plan.problem_of(coords.shape, (levels[0].shape[-2:],))
        cost = volume_lookup_plan.plan_cost(problem, lookup, dtype)
        grads = volume_lookup_plan.plan_grads(volume_lookup_plan.GRADIENTS, problem, lookup, dtype)
        found = dict(cost.constants) | {key: dict(grads.constants)[key] for key in ("staged",)}
        found["positions"] = dict(grads.constants)["tile"]
        outputs = lookup.patch_size
        return found["outputs_j"] < outputs[0], found["outputs_i"] < outputs[1], found

    assert constants("rows apart")[:2] == constants("rows apart in double")[:2] == (True, False)
    assert constants("columns apart")[:2] == (False, True)
    assert constants("both apart")[:2] == (True, True)
    assert constants("a gradient of one position")[2]["positions"] == 1
    assert [name for name in LARGE if not constants(name)[2]["staged"]] == ["nothing staged"]


@RESULTS
@pytest.mark.parametrize("positions", [(41,), (2, 1, 3, 2)], ids=str)
def test_positions_may_have_one_to_four_axes(positions, what):
    rng = np.random.default_rng(0)
    lookup = Lookup((1, 2), 2)
    sizes = lookup.level_sizes(5, 9)
    levels = [rng.integers(-2, 3, (2, *positions, *size)).astype(float) for size in sizes]
    coords = rng.integers(-8, 72, (2, 2, *positions)) / 8
    grad = rng.integers(-2, 3, lookup.cost_shape((2, 1, *positions), coords.shape)).astype(float)
    assert not differences(what, (grad, levels, coords), lookup)


@RESULTS
@pytest.mark.parametrize("name", ["RAFT, rough", "stereo", "edges of patches"])
def test_threads_share_no_word_without_a_barrier(name, what):
    assert not compare(what, name, mode="trace")


@pytest.mark.parametrize("name", ["RAFT, rough", "special"])
def test_the_order_of_threads_changes_no_bit(name):
    grad, levels, coords = volume_arguments(name)
    rng = np.random.default_rng(0)
    given = rng.standard_normal(grad.shape), [rng.standard_normal(one.shape) for one in levels]
    lookup = CASES[name].lookup
    first, *others = (
        (
            volume_lookup_host.cost(given[1], coords, lookup, order=order),
            *(slopes := volume_lookup_host.grads(*given, coords, lookup, order=order))[
                "grad_levels"
            ],
            slopes["grad_coords"],
        )
        for order in ORDERS
    )
    for other in others:
        pairs = zip(first, other, strict=True)
        assert all(np.array_equal(one, two, equal_nan=True) for one, two in pairs)


@pytest.mark.parametrize("result", volume_lookup_plan.GRADIENTS)
def test_one_gradient_alone_is_the_same(result):
    grad, levels, coords = volume_arguments("RAFT, rough")
    lookup = CASES["RAFT, rough"].lookup
    both = volume_lookup_host.grads(grad, levels, coords, lookup)
    alone = volume_lookup_host.grads(grad, levels, coords, lookup, results=(result,))
    assert alone.keys() == {result}
    for one, two in zip(alone[result], both[result], strict=True):
        assert verify.difference(one, two) is None


@pytest.mark.parametrize("name", ["RAFT", "stereo", "dilated", "edges of patches"])
def test_gradients_are_adjoint_to_the_cost(name):
    grad, levels, coords = volume_arguments(name)
    lookup = CASES[name].lookup
    cost = volume_lookup_host.cost(levels, coords, lookup)
    got = volume_lookup_host.grads(grad, levels, coords, lookup)["grad_levels"]
    pairs = zip(levels, got, strict=True)
    assert sum((one * two).sum() for one, two in pairs) == (cost * grad).sum()


# ---- what is moved

MOST_MOVED = 1.3
MOVED = {
    "RAFT": (Lookup(4, 2, order="xy"), (8, 16), (8, 16)),
    "stereo": (Lookup((0, 4), 3, pool=(1, 2)), (2, 64), (1, 64)),
}


def moved(what, name, dtype, **how):
    """Return the sectors that all blocks move, each once a block, by those that anyone moves."""
    lookup, positions, size = MOVED[name]
    rng = np.random.default_rng(0)
    y, x = np.indices(positions)
    rows = y - 1.375 if name == "RAFT" else 0 * y
    levels = [rng.standard_normal((1, *positions, *of)) for of in lookup.level_sizes(*size)]
    log, coords = [], np.stack([x + 2.25, rows])[None]
    if what == "cost":
        volume_lookup_host.cost(levels, coords, lookup, dtype, mode="trace", log=log, **how)
    else:
        grad = rng.standard_normal(lookup.cost_shape((1, 1, *positions), coords.shape))
        volume_lookup_host.grads(
            grad, levels, coords, lookup, dtype, mode="trace", log=log, results=(what,), **how
        )
    (accesses,) = log
    ends = accesses["offset"], accesses["offset"] + accesses["bytes"] - 1
    sectors = [end // SECTOR_BYTES for end in ends]  # of an access, the first and the last
    rows = np.concatenate(
        [np.stack([accesses["array"], one, accesses["block"]], 1) for one in sectors]
    )
    return len(np.unique(rows, axis=0)) / len(np.unique(rows[:, :2], axis=0))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("what", ["cost", *volume_lookup_plan.GRADIENTS])
@pytest.mark.parametrize("name", MOVED)
def test_blocks_move_little_more_than_each_sector_once(name, what, dtype):
    assert moved(what, name, dtype) <= MOST_MOVED


def with_small_tiles(launch):
    """Turn a launch into one whose tiles have four positions."""
    constants = dict(launch.constants) | {"tile": 4}
    blocks = launch.blocks * dict(launch.constants)["tile"] // 4
    return launch._replace(constants=tuple(constants.items()), blocks=blocks)


def test_tiles_that_share_sectors_are_found():
    assert moved("cost", "stereo", "float16", planned=with_small_tiles) > MOST_MOVED


@pytest.mark.parametrize(
    ("cells", "samples", "text"), [((8192, 8192), 1, "cells"), ((8, 8), 2**31, "blocks")]
)
def test_sizes_that_overflow_are_refused(cells, samples, text):
    problem = volume_lookup_plan.problem_of((samples, 2, 9), (cells,))
    with pytest.raises(RuntimeError, match=text):
        volume_lookup_plan.plan_cost(problem, Lookup(4), "float32")
    with pytest.raises(RuntimeError, match=text):
        volume_lookup_plan.plan_grads(("grad_levels",), problem, Lookup(4), "float32")


# ---- planted errors: (text, what takes its place, the case that finds it)

PLANTED = {
    "windows of the first": ("first_row(windows[own])", "first_row(windows[0])", "outside"),
    "columns not clipped": (
        "among(left + across[k], level.columns)", "left + across[k] < level.columns", "outside",
    ),
    "one map for all": ("maps + own * cells_of(level)", "maps", "square"),
    "corners spread": ("read / 2 * spacing + read % 2", "read * spacing", "dilated"),
    "rows shared": ("spacing_y == 1 ? below : row(k)", "below", "dilated"),
    "axes exchanged": ("between(w.y, above, below)", "between(w.x, above, below)", "square"),
    "order ignored": ("(x_first ? 1 : outputs_x)", "1", "square"),
    "band ignored": ("across[k] = i0 * spacing_x +", "across[k] =", "columns apart"),
}  # fmt: skip
PLANTED_IN_GRADIENTS = {
    "order ignored": ("x_first ? i * outputs_y + j : j", "j", "three maps"),
    "reader on the other side": ("? read - d : -1", "? read + d : -1", "square"),
    "one reader for both": ("return read % 2 == d ? read / 2 : -1", "return read / 2", "dilated"),
    "gaps written": (" && offset % spacing < 2", "", "dilated"),
    "weights exchanged": (
        "interpolate(w, of_reader[0][0], of_reader[0][1], of_reader[1][0]",
        "interpolate(w, of_reader[0][0], of_reader[1][0], of_reader[0][1]",
        "square",
    ),
    "row not counted": ("u -= level.columns, ++v", "u -= level.columns", "RAFT"),
    "position not counted": ("++of;", "", "a level of one cell"),
    "pool ignored": ("of_maps.x / level.pool_x", "of_maps.x", "four levels"),
    "slope from the left": ("product[0][1] - product[0][0]", "product[0][0]", "integers"),
    "slopes exchanged": ("sum.x += between(w.y", "sum.x += between(w.x", "square"),
    "parts left out": ("k < parts; ++k", "k < parts - 1; ++k", "RAFT"),
    "NaN of y lost": (" && coords[y] == coords[y]", "", "special"),
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_found(error):
    *patch, name = PLANTED[error]
    if name in LARGE:
        assert differences("cost", *large(name), patch=tuple(patch))
    else:
        assert compare("cost", name, patch=tuple(patch))


@pytest.mark.parametrize("error", PLANTED_IN_GRADIENTS)
def test_a_planted_error_in_gradients_is_found(error):
    *patch, name = PLANTED_IN_GRADIENTS[error]
    assert compare("grads", name, patch=tuple(patch))


def test_a_cell_that_does_not_exist_times_infinity_is_found():
    patch = ("among(v + d, level.rows) && among(u + k, level.columns)", "true")
    assert compare("grads", "four levels", patch=patch, special=(np.inf, "grad"))


@pytest.mark.parametrize(
    ("what", "before"),
    [("cost", "\n  if (q >= count) return;"), ("grads", "\n        write_maps"),
     ("grads", "\n    }\n    const auto upstream")],
)  # fmt: skip
def test_a_missing_barrier_is_found(what, before):
    patch = f"__syncthreads();{before}", before
    if what == "cost":
        patch = f"__syncthreads();\n{before}", before
    with pytest.raises(host.HostError, match="data race"):
        compare(what, "RAFT, rough", mode="trace", patch=patch)
