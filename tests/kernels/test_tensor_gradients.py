"""The gradients of 16-bit cost volumes on tensor cores, run on the processor by hostcuda.h."""

import random
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import host
import numpy as np
import pytest
import test_host
from cases import CASES, l1
from host import ORDERS, SM_75, SM_80, SM_90
from test_tensor import (
    BOTH_LAYOUTS,
    COPIES,
    EVERY_COPY,
    EVERY_WIDTH,
    FULL,
    HALVES,
    LAYOUT,
    ROWS,
    SPARSE,
    apart,  # noqa: F401
    assert_written_once,
    engine,
    is_caught,
    layout,  # noqa: F401
    turn,
    with_channels,
)
from test_tensor import WIDTHS as PIXELS

from cupycorr import Geometry, verify
from cupycorr.cuda import plan as cuda_plan
from cupycorr.cuda import tensor_adjoint, turning
from cupycorr.cuda.launch import targets
from cupycorr.layer import Layer

pytestmark = test_host.pytestmark

GRADS = ("grad_fmap1", "grad_fmap2")
# Sums that are not finite stay so: then it shows where a finite one took what it must not take.
NOT_AGAIN = ("if (!finite)", "if (false)")
# Phases; advance, where only one gradient has sources on the lattice; targets that lie apart.
MIXED = ["even patch, dilated", "FlowNetC", "stride not dividing dilation_patch", "stride"]
# Widths of the lattice decide how much of the upstream gradient is copied at a time.
PATCH = Layer(Geometry(patch_size=(3, 5)))
WIDTHS = {
    "16 bytes": ((1, 24, 6, 24), PATCH),
    "8 bytes": ((1, 24, 6, 20), PATCH),
    "4 bytes": ((1, 24, 6, 22), PATCH),
    "element by element": ((1, 24, 6, 21), PATCH),
    "8 bytes of two phases": ((1, 24, 7, 36), Layer(Geometry(patch_size=4, dilation_patch=2))),
    "padding": ((1, 24, 5, 20), Layer(Geometry(patch_size=(3, 5), padding=(1, 2)))),
}


def arrays(shape, layer, special=(), seed=0):
    """Return an upstream gradient and two maps of small integers and some special values."""
    rng = np.random.default_rng(seed)
    found = []
    for size in (layer.geometry.cost_shape(shape), shape, shape):
        array = rng.integers(-2, 3, size).astype(np.float64)
        where = rng.choice(array.size, min(array.size, len(special)), replace=False)
        array.flat[where] = special[: len(where)]
        found.append(array)
    return found


def once(*args, patch=(), **how):
    """Return an engine whose kernels sum nothing anew."""
    return engine(*args, patch=(*patch, *NOT_AGAIN), **how)


def errors(computed, shape, layer, dtype, *, special=(), oracle=None, seed=0):
    """Compare gradients with those of an oracle, rounded once; describe differences."""
    given = arrays(shape, layer, special, seed)
    wanted = (oracle or verify.numpy_engine()).grads(*given, layer, "float64")
    with np.errstate(invalid="ignore"):
        wanted = [verify.round_to(want, dtype) for want in wanted]
    found = zip(computed.grads(*given, layer, dtype), wanted, strict=True)
    return [error for got, want in found if (error := verify.difference(got, want))]


def kernels(shape, layer, dtype="float16", device=SM_80, results=GRADS, **how):
    plan = cuda_plan.plan(results, layer, shape, dtype, device, **{**LAYOUT, **how})
    return [launch.kernel for launch in plan.launches]


def expected(case, shape, layer):
    """Return how many gradients of a case are for tensor cores."""
    axis = layer.geometry.x
    if case in SPARSE or layer.geometry.taps > 1:
        return 0
    return 1 + (targets(axis, shape[3], 2).step == axis.lattice_step)


@BOTH_LAYOUTS
@pytest.mark.parametrize("case", FULL)
def test_every_case_is_exact(case):
    shape, layer = with_channels(case, 24)
    assert kernels(shape, layer).count("tensor_gradient") == expected(case, shape, layer)
    assert not errors(once(order="shuffled"), shape, layer, "float16")


@BOTH_LAYOUTS
@pytest.mark.parametrize("case", [case for case in FULL if "channel" in case])
def test_few_and_odd_channels_are_exact(case):
    assert not errors(once(), *FULL[case], "float16")


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", HALVES)
@EVERY_WIDTH
@pytest.mark.parametrize("case", MIXED)
def test_every_copy_and_dtype_is_exact(case, channels, dtype):
    assert not errors(once(SM_90), *with_channels(case, channels), dtype)


@BOTH_LAYOUTS
@pytest.mark.parametrize("case", WIDTHS)
def test_every_copy_of_the_upstream_gradient_is_exact(case):
    for aligned in (True, False):
        assert not errors(once(aligned=aligned), *WIDTHS[case], "bfloat16")


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", HALVES)
def test_sums_are_rounded_once(dtype):
    # Sums of 256 products have more significant bits than the result.
    shape, layer = (1, 16, 16, 24), Layer(Geometry(patch_size=16))
    rng = np.random.default_rng(0)
    sizes = layer.geometry.cost_shape(shape), shape, shape
    most = {"float16": 15, "bfloat16": 127}[dtype]
    given = [rng.integers(-most, most + 1, size).astype(np.float64) for size in sizes]
    wanted = verify.numpy_engine().grads(*given, layer, "float64")
    for got, want in zip(once().grads(*given, layer, dtype), wanted, strict=True):
        assert verify.difference(got, verify.round_to(want, dtype)) is None


@BOTH_LAYOUTS
@EVERY_COPY
@pytest.mark.parametrize("case", MIXED)
def test_the_order_of_threads_changes_no_bit(case, channels):
    shape, layer = with_channels(case, channels)
    rng = np.random.default_rng(0)
    given = [rng.standard_normal(array.shape) for array in arrays(shape, layer)]
    first, *others = (engine(order=order).grads(*given, layer, "float16") for order in ORDERS)
    for other in others:
        assert test_host.differences(first, other) == [None, None]


@BOTH_LAYOUTS
@EVERY_COPY
@pytest.mark.parametrize("case", MIXED)
def test_threads_share_no_word_without_a_barrier(case, channels):
    shape, layer = with_channels(case, channels)
    engine(mode="trace").grads(*arrays(shape, layer), layer, "float16")


@BOTH_LAYOUTS
@EVERY_COPY
@pytest.mark.parametrize("case", [case for case in FULL if case not in SPARSE])
def test_what_is_not_finite_reaches_only_what_it_is_a_term_of(case, channels):
    shape, layer = with_channels(case, channels)
    for special, oracle in test_host.SPECIAL:
        how = {"special": 3 * special, "oracle": oracle()}
        assert not errors(engine(), shape, layer, "bfloat16", **how)


@BOTH_LAYOUTS
@EVERY_COPY
@pytest.mark.parametrize("case", MIXED)
def test_misaligned_arrays_are_exact(case, channels):
    assert not errors(once(aligned=False), *with_channels(case, channels), "float16")


# ---- the order of the maps' axes in memory


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", PIXELS)
def test_gradients_of_contiguous_maps_are_exact_by_every_load(width, rows):
    shape, layer = (2, 21, 6, PIXELS[width]), Layer(ROWS[rows])
    assert "tensor_gradient" in kernels(shape, layer)
    assert not errors(once(order="shuffled"), shape, layer, "bfloat16")


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("shape", [(2, 24, 12, 16), (1, 67, 13, 9)], ids=str)
def test_turned_maps_have_contiguous_gradients(shape, aligned, monkeypatch):
    turn(monkeypatch)
    layer = CASES["FlowNetC"][1]
    how = {"channels_last": False, "aligned": aligned}
    assert kernels(shape, layer, **how) == 2 * ["transpose"] + 2 * ["tensor_gradient"] + 2 * [
        "transpose"
    ]
    for mode in ("run", "trace"):
        assert not errors(engine(mode=mode, **how), shape, layer, "bfloat16")


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_one_gradient_turns_one_map(which, dtype, monkeypatch):
    turn(monkeypatch)
    shape, layer = with_channels("FlowNetC", 24)
    plan = cuda_plan.plan(
        (f"grad_fmap{which}",), layer, shape, dtype, SM_80, channels_last=dtype == "float32"
    )
    first, gradient, last = plan.launches
    source, result = f"fmap{3 - which}", f"grad_fmap{which}"
    assert first.arrays == (source, f"{source}_turned")
    assert f"{source}_turned" in gradient.arrays
    assert gradient.arrays[-1] == f"{result}_turned"
    assert last.arrays == (f"{result}_turned", result)
    assert {one.name for one in plan.workspaces} == {f"{source}_turned", f"{result}_turned"}


@pytest.mark.parametrize("width", [64, 63])
def test_contiguous_arrays_are_turned_where_it_pays(width, monkeypatch):
    layer, shape = Layer(Geometry(patch_size=21, dilation_patch=2)), (4, 256, 48, width)
    axes = layer.geometry.y, layer.geometry.x
    y, x = (targets(axis, size, 1) for axis, size in zip(axes, shape[2:], strict=True))

    def cycles(**how):
        return tensor_adjoint.gradient(layer, shape, "float16", SM_80, 1, (y, x), **how).cycles

    native = cycles(turn=False)
    turned = cycles(channels_last=True) + turning.turning_cycles(shape, "float16", SM_80)
    first, last = (["transpose"] * (turned < native) for _ in range(2))
    found = kernels(shape, layer, results=GRADS[:1], channels_last=False)
    assert found == [*first, "tensor_gradient", *last]
    monkeypatch.setattr(cuda_plan, "_cycles", lambda _: min(turned, native))
    assert kernels(shape, layer, results=GRADS[:1], channels_last=False) == ["product_gradient"]


def test_arrays_that_are_larger_than_the_workspace_are_not_turned(monkeypatch):
    turn(monkeypatch)
    flownetc = Layer(Geometry(patch_size=21, dilation_patch=2))
    assert "transpose" in kernels((42, 256, 48, 64), flownetc, channels_last=False)
    for samples, results in ((43, GRADS), (86, GRADS[:1])):
        found = kernels((samples, 256, 48, 64), flownetc, results=results, channels_last=False)
        assert {*found} == {"tensor_gradient"}


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("case", ["FlowNetC", "window", "l1"])
def test_gradients_of_other_kernels_are_turned_back(case, dtype, plain):
    shape, layer = l1(CASES["odd patch"]) if case == "l1" else with_channels(case, 11)
    assert not test_host.errors(engine(plain=plain), shape, layer, dtype)


@pytest.mark.parametrize(
    ("device", "dtype", "case"),
    [(SM_75, "float16", CASES["FlowNetC"]), (SM_80, "float32", CASES["FlowNetC"]),
     (SM_80, "float16", l1(CASES["FlowNetC"])), (SM_80, "float16", CASES["window"])],
    ids=["an old GPU", "float32", "absolute differences", "several taps"],
)  # fmt: skip
def test_tensor_cores_are_left_alone(device, dtype, case):
    shape, layer = case
    assert "tensor_gradient" not in kernels(shape, layer, dtype, device)


# ---- tiles that the model would not choose for problems that run in a moment

PHASES = ((1, 40, 17, 22), Layer(Geometry(patch_size=(5, 7), dilation_patch=(1, 2))))
STRIDE = ((1, 40, 13, 29), Layer(Geometry(patch_size=(5, 7), stride=(1, 2))))
ADVANCE = ((1, 24, 21, 64), Layer(Geometry(patch_size=(3, 4), stride=(2, 3))))
ONE_ROW = ((1, 24, 3, 72), Layer(Geometry(patch_size=(1, 9))))
WIDE = ((1, 16, 3, 34), Layer(Geometry(patch_size=(2, 140))))
MANY_PHASES = ((1, 16, 5, 24), Layer(Geometry(patch_size=(2, 3), dilation_patch=(3, 6))))
SEVEN_PHASES = ((1, 16, 5, 24), Layer(Geometry(patch_size=(2, 3), dilation_patch=(3, 7))))
CHANNELS = ((1, 136, 5, 16), Layer(Geometry(patch_size=3)))

#   id: (problem, what is true, or largest, of the tile)
TILES = {
    "two rows": (PHASES, lambda t: t["tile_rows"] == 2 and t["row_tiles"]),
    "one row": (PHASES, lambda t: t["tile_rows"] == 1 and t["row_tiles"]),
    "one tile": (PHASES, lambda t: t["row_tiles"] == 1 and t["tile_rows"]),
    "three tiles": (STRIDE, lambda t: t["row_tiles"] == 3 and t["tile_rows"]),
    "warps side by side": (STRIDE, lambda t: t["x_groups"]),
    "advance, two rows": (ADVANCE, lambda t: t["tile_rows"] == 2 and t["row_tiles"]),
    "advance, one row": (ADVANCE, lambda t: t["tile_rows"] == 1 and t["x_groups"]),
    "a patch of one row": (ONE_ROW, lambda t: t["tile_rows"] == 1 and t["x_groups"]),
    "a patch of one row, two rows": (ONE_ROW, lambda t: t["tile_rows"] == 2),
    "a wide patch": (WIDE, lambda t: t["channel_tiles"]),
    "groups of phases": (MANY_PHASES, lambda t: t["phases"] < 6),
    "a partial group of phases": (SEVEN_PHASES, lambda t: 7 % t["phases"]),
    "groups of channels": (CHANNELS, lambda t: t["channel_groups"]),
    "few channels": (CHANNELS, lambda t: t["channel_tiles"] == 2 and t["channel_groups"] == 1),
    "two rows at a time": (PHASES, lambda t: t["at_once"] == 2 and t["row_tiles"]),
    "all rows at once": (STRIDE, lambda t: t["buffers"] == 1 and t["row_tiles"]),
    "many channels": (CHANNELS, lambda t: t["channel_tiles"] == 8 and t["row_tiles"]),
}  # fmt: skip


@pytest.fixture
def force(monkeypatch):
    """Return a function that lets tiles be chosen from all that fit: the most of some value."""

    def force(value):
        def choose(problem, device):
            tiles = list(tensor_adjoint._tiles(problem, device))
            best = max(tiles, key=lambda tile: value(dict(tile.constants)), default=None)
            return best if best and value(dict(best.constants)) else None

        monkeypatch.setattr(tensor_adjoint, "_tile", choose)

    return force


@BOTH_LAYOUTS
@pytest.mark.parametrize("tile", TILES)
def test_unusual_tiles_are_exact(tile, force):
    (shape, layer), value = TILES[tile]
    force(value)
    assert "tensor_gradient" in kernels(shape, layer)
    assert not errors(once(order="shuffled"), shape, layer, "float16")


def ones(shape, layer, plan):
    """Return the arrays of a plan between guards; what is read is 1."""
    shapes = {"grad_cost": layer.geometry.cost_shape(shape), "fmap1": shape, "fmap2": shape}
    shapes |= dict.fromkeys((*GRADS, *(one.name for one in plan.workspaces)), shape)
    guarded = {name: host.Guarded(size, np.float16, offset=host.ALIGNED_OFFSET)
               for name, size in shapes.items()}  # fmt: skip
    for name in ("grad_cost", "fmap1", "fmap2"):
        guarded[name].array.fill(1)
    return guarded


@BOTH_LAYOUTS
@pytest.mark.parametrize("case", ["FlowNetC", "stride", "negative padding", SEVEN_PHASES], ids=str)
def test_every_result_is_written_once_and_never_read(case):
    shape, layer = with_channels(case, 24)
    plan = cuda_plan.plan(GRADS, layer, shape, "float16", SM_80, **LAYOUT)
    guarded = ones(shape, layer, plan)
    assert_written_once(plan, {name: whole.array for name, whole in guarded.items()})


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("case", ["FlowNetC", "odd patch"], ids=["two phases", "one phase"])
def test_lanes_read_the_band_from_different_banks(case, which):
    shape, layer = with_channels(case, 24)
    plan = cuda_plan.plan(
        (f"grad_fmap{which}",), layer, shape, "float16", SM_80, channels_last=True
    )
    (launch,) = plan.launches
    guarded = ones(shape, layer, plan)
    given = {name: guarded[name].array for name in launch.arrays}
    library = host.build(launch, "trace")
    accesses = host.run(library, launch, given, np.float32(1), log="all")
    storing = np.unique(accesses["round"][accesses["array"] == 2])
    found = accesses[(accesses["array"] == host.SHARED) & (accesses["bytes"] == 2)]
    found = found[(found["written"] == 0) & ~np.isin(found["round"], storing)]
    most = 0
    for number in np.unique(found["round"]):
        of_round = found[found["round"] == number]
        for warp in np.unique(of_round["thread"] // 32):
            lanes = [
                of_round["offset"][of_round["thread"] == 32 * warp + lane] // 4
                for lane in range(32)
            ]
            for words in np.stack(lanes, axis=1):  # that all lanes read at once
                _, count = np.unique(np.unique(words) % 32, return_counts=True)
                most = max(most, count.max())
    assert most == 1


@BOTH_LAYOUTS
@pytest.mark.parametrize("seed", range(8))
def test_tiles_taken_at_random_are_exact(seed, monkeypatch):
    chance, candidates = random.Random(seed), tensor_adjoint._tiles
    monkeypatch.setattr(
        tensor_adjoint, "_tile", lambda *of: chance.choice([*candidates(*of), None])
    )
    problems = [*MIXED, "stride 6, dilation_patch 4", ADVANCE, SEVEN_PHASES, *WIDTHS.values()]
    shape, layer = with_channels(chance.choice(problems), chance.choice((9, 40, 72)))
    how = {"order": "shuffled", "aligned": chance.random() < 0.8}
    assert not errors(once(**how), shape, layer, chance.choice(HALVES))


# ---- planted errors


def several(tile):
    """Prefer two tiles of two rows, and several warps that share their targets."""
    return tile["row_tiles"] == 2 and 8 * tile["tile_rows"] + tile["channel_groups"]


def in_steps(tile):
    return tile["at_once"] == 2 and several(tile)


class Bug(NamedTuple):
    """A change of the sources that a check must notice."""

    old: str
    new: str
    problem: tuple = PHASES
    special: bool = False
    """Whether values that are not finite are needed to see it."""
    tile: Callable[[dict], int] = several
    """What is largest of the tile."""


OFF_LATTICE = ((1, 24, 9, 11), Layer(Geometry(patch_size=5, padding=(-2, -1))))
TWO_PHASES = ((1, 40, 9, 22), Layer(Geometry(patch_size=5, dilation_patch=2)))
APART = ((1, 24, 9, 14), Layer(Geometry(patch_size=3, stride=2, padding=-1, dilation_patch=2)))
ODD = ((1, 19, 6, 24), PATCH)

BUGS = {
    "the band of another target": Bug("lane / 4 * across", "lane % 4 * across"),
    "a band that does not advance": Bug("- advance_x * pitch_g", "- pitch_g", ADVANCE),
    "columns in another order than G": Bug("slot / 2 + slot % 2 * apart", "slot", TWO_PHASES),
    "columns of the other half": Bug("(group + lane / 8 % 2)", "(group + lane / 16)"),
    "quarters of the band exchanged": Bug("k % 2 * lower +", "k / 2 * lower +"),
    "matrices that are not transposed": Bug("load_matrices<4, true>", "load_matrices<4, false>"),
    "no zeros beside the band": Bug("i < buffers * at_once", "i < 0"),
    "a row that a tile meets left out": Bug("* tile, meeting)", "* tile, patch_y)"),
    "rows of displacements that are none": Bug("inside(cost_p(row, e), patch_y) &&", ""),
    "displacements of map 2 not mirrored": Bug("patch_x - 1 - q", "q"),
    "rows beside the lattice": Bug("inside(u(row, e), s.lattice_height)", "true", OFF_LATTICE),
    "columns beside the lattice": Bug("row_exists && on_lattice[0]", "row_exists"),
    "columns that are met left out": Bug("- 1) + patch_x;", "- 1) + patch_x - 1;"),
    "pixels outside": Bug("&& inside(x, s.width) ? x", "? x"),
    "copies that begin too late": Bug("begin / moved + i % units", "begin / moved + 1 + i % units"),
    "the last odd channel left out": Bug("c + k + 1 < channels", "false", ODD),
    "channels of another warp": Bug("warp * 8 * channel_tiles", "0", CHANNELS),
    "a warp without channels that exist": Bug("bool owns =", "bool owns = lane < 0 &&"),
    "sums that stay not finite": Bug("if (!finite)", "if (false)", special=True),
    "terms that are none": Bug("!inside(x, s.width) || !inside(v", "!inside(v", special=True),
    "no zeros between targets": Bug("smaller(s.width, x + step_x)", "x + 1", APART),
    "no zeros before the first target": Bug("t_x == 0 ? 0 : x", "x", APART),
    "targets of another tile": Bug("row = tile * tile_rows + j", "row = j"),
    "the buffer of another step": Bug("(buffers - 1) * buffer_bytes - begin", "begin"),
    "rows on each other": Bug("begin + i * row_bytes", "begin", tile=in_steps),
    "a row twice": Bug("next(e + at_once)", "next(e + 1)", tile=in_steps),
    "no wait for copies": Bug("  host_wait_for_copies();", ""),
    "no barrier between copies and products": Bug(
        "wait_for_copies();\n    __syncthreads();", "wait_for_copies();"),
    "no barrier behind the offsets": Bug(
        " thread);\n    }\n  }\n  __syncthreads();", " thread);\n    }\n  }"),
    "no barrier between products and results": Bug(
        "++tile) {\n    __syncthreads();", "++tile) {"),
    "no barrier between results and stores": Bug(
        "__syncthreads();\n    // A thread has", "// A thread has"),
}  # fmt: skip
PAIRS = ((2, 40, 9, 32), Layer(Geometry(patch_size=(3, 6), dilation_patch=2)))
APART_BUGS = {
    "the wrong channel of a pair": Bug(
        "join_halves(word, other,", "join_halves(other, word,", PAIRS),
    "a neighbouring pixel": Bug("word, other, k % 2)", "word, other, !(k % 2))", PAIRS),
    "the last channels left out": Bug("first + k < channels", "first + 1 < channels", ODD),
    "the channels of another group": Bug("(group * lanes + thread", "(thread", PAIRS),
    "pixels outside": Bug("static_cast<unsigned>(x[n] + i * VECTOR) < end", "true", PAIRS),
    "slots without a lead": Bug("(j - LEAD - STEP * f)", "(j - STEP * f)", PAIRS),
    "the row before": Bug("fetch_runs(next + i)", "fetch_runs(e + i)", PAIRS),
    "the buffer in use": Bug("land_runs(other", "land_runs(begin", PAIRS),
    "no zeros behind the runs": Bug("f <= (channels_last ? 0 : phases)", "f <= 0", PAIRS),
    "results of the other channel": Bug("(both[n] >> 16)", "(both[n])", PAIRS),
    "results of one phase": Bug("* phases + phase) * columns", "* phases) * columns", PAIRS),
    "results of another row": Bug("2 * j * phases * columns", "0", PAIRS),
    "results of the wrong target": Bug("columns>(both, reinterpret_cast<const unsigned*>(from), k",
                                       "columns>(both, reinterpret_cast<const unsigned*>(from), 0",
                                       PAIRS),
    "the last odd result left out": Bug("c + pair >= s.channels", "c + 1 >= s.channels", ODD),
    "a result that is not there": Bug("if (c + pair >= s.channels) continue;", "", ODD),
    "another channel summed anew": Bug("channels_last ? i : i % 2", "channels_last ? i : 0", PAIRS,
                                       special=True),
    "another target summed anew": Bug("channels_last ? 0 : i / 2", "0", PAIRS, special=True),
    "sums that are not read again": Bug("        load();\n", "", PAIRS, special=True),
    "no barrier between runs and products": Bug(
        "wait_for_copies();\n    __syncthreads();", "wait_for_copies();", PAIRS),
}  # fmt: skip


def fails(bug, order):
    computed = (engine if bug.special else once)(order=order, patch=(bug.old, bug.new))
    tried = test_host.SPECIAL if bug.special else [((), verify.numpy_engine)]
    try:
        return any(
            errors(computed, *bug.problem, "float16", special=9 * special, oracle=oracle())
            for special, oracle in tried
        )
    except host.HostError:
        return True


def assert_caught(planted, force):
    shape, layer = planted.problem
    force(planted.tile)
    plan = cuda_plan.plan(GRADS, layer, shape, "float16", SM_80, **LAYOUT)
    launches = [one for one in plan.launches if one.kernel == "tensor_gradient"]
    assert launches
    for launch in launches:
        assert planted.old in host.translation_unit(launch)
        patch = (planted.old, planted.new)
        host.compiled(launch, patch=patch if planted.special else (*patch, *NOT_AGAIN))
    assert is_caught(partial(fails, planted))


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug, force):
    assert_caught(BUGS[bug], force)


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("bug", APART_BUGS)
def test_a_planted_bug_of_contiguous_maps_is_caught(bug, force):
    assert_caught(APART_BUGS[bug], force)


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.startswith("no barrier")])
def test_a_missing_barrier_is_a_race_in_any_order(bug, force):
    planted = BUGS[bug]
    shape, layer = planted.problem
    force(planted.tile)
    raced = engine(mode="trace", patch=(planted.old, planted.new))
    with pytest.raises(host.HostError, match="data race"):
        raced.grads(*arrays(shape, layer), layer, "float16")


@pytest.mark.slow
def test_sanitizers_find_nothing():
    script = "import test_tensor_gradients as t\n"
    for name in ("FlowNetC", "stride"):
        for channels in COPIES.values():
            shape, layer = with_channels(name, channels)
            plan = cuda_plan.plan(GRADS, layer, shape, "float16", SM_80, channels_last=True)
            for launch in plan.launches:
                host.compiled(launch, "sanitize")  # the compiler itself is not to run under them
            script += (
                f"shape, layer = t.with_channels({name!r}, {channels})\n"
                "given = t.arrays(shape, layer, (float('inf'),))\n"
                "t.engine(mode='sanitize').grads(*given, layer, 'float16')\n"
            )
    assert test_host.run_under_sanitizers(script) == (0, "")
