"""The gradients of cost volumes on tensor cores, run on the processor by hostcuda.h."""

import random
from collections.abc import Callable
from functools import partial
from math import inf
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
    rounded_to_tf32,
    turn,
    with_channels,
)
from test_tensor import WIDTHS as PIXELS

from cupycorr import Geometry, verify
from cupycorr.cuda import plan as cuda_plan
from cupycorr.cuda import tensor_adjoint, turning
from cupycorr.cuda.launch import targets
from cupycorr.layer import DTYPES, Layer

pytestmark = test_host.pytestmark

GRADS = ("grad_fmap1", "grad_fmap2")
# Sums that are not finite stay so: then it shows where a finite one took what it must not take.
NOT_AGAIN = ("if (!finite)", "if (false)")
# Phases; advance, where only one gradient has sources on the lattice; targets that lie apart;
# upstream gradients in float32.
MIXED = ["even patch, dilated", "FlowNetC", "stride not dividing dilation_patch", "stride",
         "window"]  # fmt: skip
# What is multiplied: the dtype of the maps, and options of a plan.
KINDS = {"float16": ("float16", {}), "bfloat16": ("bfloat16", {}),
         "TF32": ("float32", {"tf32": True})}  # fmt: skip
EVERY_KIND = pytest.mark.parametrize(("dtype", "how"), KINDS.values(), ids=KINDS)
HALF_AND_TF32 = pytest.mark.parametrize(
    ("dtype", "how"), [KINDS["float16"], KINDS["TF32"]], ids=["float16", "TF32"]
)
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
    if case in SPARSE:
        return 0
    return 1 + (targets(axis, shape[3], 2).step == axis.lattice_step)


@BOTH_LAYOUTS
@HALF_AND_TF32
@pytest.mark.parametrize("case", FULL)
def test_every_case_is_exact(case, dtype, how):
    shape, layer = with_channels(case, 24)
    found = kernels(shape, layer, dtype, **how)
    assert found.count("tensor_gradient") == expected(case, shape, layer)
    assert not errors(once(order="shuffled", **how), shape, layer, dtype)


@BOTH_LAYOUTS
@HALF_AND_TF32
@pytest.mark.parametrize("case", [case for case in FULL if "channel" in case])
def test_few_and_odd_channels_are_exact(case, dtype, how):
    assert not errors(once(**how), *FULL[case], dtype)


@BOTH_LAYOUTS
@EVERY_KIND
@EVERY_WIDTH
@pytest.mark.parametrize("case", MIXED)
def test_every_copy_and_dtype_is_exact(case, channels, dtype, how):
    assert not errors(once(SM_90, **how), *with_channels(case, channels), dtype)


@BOTH_LAYOUTS
@pytest.mark.parametrize("kind", ["bfloat16", "TF32"])
@pytest.mark.parametrize("case", WIDTHS)
def test_every_copy_of_the_upstream_gradient_is_exact(case, kind):
    dtype, how = KINDS[kind]
    for aligned in (True, False):
        assert not errors(once(aligned=aligned, **how), *WIDTHS[case], dtype)


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
@HALF_AND_TF32
@EVERY_COPY
@pytest.mark.parametrize("case", MIXED)
def test_the_order_of_threads_changes_no_bit(case, channels, dtype, how):
    shape, layer = with_channels(case, channels)
    rng = np.random.default_rng(0)
    given = [rng.standard_normal(array.shape) for array in arrays(shape, layer)]
    first, *others = (engine(order=order, **how).grads(*given, layer, dtype) for order in ORDERS)
    for other in others:
        assert test_host.differences(first, other) == [None, None]


@BOTH_LAYOUTS
@HALF_AND_TF32
@EVERY_COPY
@pytest.mark.parametrize("case", MIXED)
def test_threads_share_no_word_without_a_barrier(case, channels, dtype, how):
    shape, layer = with_channels(case, channels)
    engine(mode="trace", **how).grads(*arrays(shape, layer), layer, dtype)


@BOTH_LAYOUTS
@EVERY_COPY
@pytest.mark.parametrize("case", [case for case in FULL if case not in SPARSE])
def test_what_is_not_finite_reaches_only_what_it_is_a_term_of(case, channels):
    shape, layer = with_channels(case, channels)
    for special, oracle in test_host.SPECIAL:
        how = {"special": 3 * special, "oracle": oracle()}
        assert not errors(engine(), shape, layer, "bfloat16", **how)


@BOTH_LAYOUTS
@HALF_AND_TF32
@EVERY_COPY
@pytest.mark.parametrize("case", MIXED)
def test_misaligned_arrays_are_exact(case, channels, dtype, how):
    assert not errors(once(aligned=False, **how), *with_channels(case, channels), dtype)


# ---- several taps: upstream gradients in float32, in parts of 16 bits

# The least that is left on tensor cores, by `parts_of`.
FEW_TAPS = Layer(Geometry(kernel_size=2, patch_size=(1, 2)))
TAPS = {case: with_channels(case, 24) for case in FULL if FULL[case][1].geometry.taps > 1}
TAPS |= {"few taps": ((1, 24, 6, 12), FEW_TAPS)}


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", HALVES)
def test_floats_are_split_into_parts_that_keep_their_digits(dtype):
    assert not split_errors(once(), dtype)


def split_errors(computed, dtype):
    """Compare gradients of two displacements whose large terms cancel, so that small ones show.

    Their sums over taps have 3 digits above the point and 20 below, which floats hold.
    """
    shape, layer = TAPS["few taps"]
    rng = np.random.default_rng(0)
    grad, *maps = (np.ones(array.shape) for array in arrays(shape, layer))
    small = rng.random(grad.shape[3:]) < 0.25
    grad[:] = np.where(small, 0, rng.choice([1, -1, 2.0**-10, -(2.0**-10)], small.shape))
    grad[:, 0, 0] += 2.0**-20 * small
    for fmap in maps:
        fmap[..., ::2] = -1
    given = grad, *maps
    assert kernels(shape, layer, dtype).count("tensor_gradient") == 2
    wanted = verify.numpy_engine().grads(*given, layer, "float64")
    found = zip(computed.grads(*given, layer, dtype), wanted, strict=True)
    return [
        error for got, want in found
        if (error := verify.difference(got, verify.round_to(want, dtype)))
    ]  # fmt: skip


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", [case for case in TAPS if case not in SPARSE])
def test_gradients_of_several_taps_keep_to_the_bound(case, dtype):
    shape, layer = TAPS[case]
    found = kernels(shape, layer, dtype).count("tensor_gradient")
    assert found == (tensor_adjoint.parts_of(layer, dtype) is not None) * expected(
        case, shape, layer
    )
    assert [one for one in verify.check(once(), shape, layer, dtype) if one.error] == []


def test_a_part_less_is_beyond_the_bound():
    shape, layer = TAPS["window"]
    lost = once(patch=("? 3 : 2", "? 2 : 1"))
    assert any(one.error for one in verify.check(lost, shape, layer, "float16"))


@pytest.mark.parametrize(
    ("kernel_size", "patch_size", "parts"),
    [((3, 3), 1, (None, 3)), ((1, 2), 9, (None, None)), ((1, 3), 1, (None, 3)),
     ((1, 3), 3, (2, 3)), ((2, 2), (1, 2), (2, 3)), ((3, 3), 21, (2, 3))],
)  # fmt: skip
def test_the_scalar_kernel_stays_where_parts_could_err_too_much(kernel_size, patch_size, parts):
    layer = Layer(Geometry(kernel_size, patch_size))
    for dtype, wanted in zip(HALVES, parts, strict=True):
        assert tensor_adjoint.parts_of(layer, dtype) == wanted
        found = kernels((1, 32, 16, 24), layer, dtype)
        assert found.count("tensor_gradient") == (0 if wanted is None else 2)


def test_sums_over_taps_that_are_too_large_for_float16_are_summed_anew():
    shape, layer = TAPS["window"]
    given = [array * scale for array, scale in
             zip(arrays(shape, layer), (30000, 2.0**-9, 2.0**-9), strict=True)]  # fmt: skip
    wanted = verify.numpy_engine().grads(*given, layer, "float64")
    for got, want in zip(engine().grads(*given, layer, "float16"), wanted, strict=True):
        assert verify.difference(got, verify.round_to(want, "float16")) is None
    for got in once().grads(*given, layer, "float16"):
        assert not np.isfinite(got).all()


# ---- float32, rounded to TF32


def test_nobody_gets_gradients_in_tf32_without_asking_for_them():
    for case in ("FlowNetC", "window"):
        shape, layer = with_channels(case, 24)
        for dtype, how in (("float32", {}), ("float64", {"tf32": True})):
            assert "tensor_gradient" not in kernels(shape, layer, dtype, **how)
        assert kernels(shape, layer, "float32", tf32=True).count("tensor_gradient") == 2
        assert "tensor_gradient" not in kernels(shape, layer, "float32", SM_75, tf32=True)


@BOTH_LAYOUTS
@pytest.mark.parametrize("case", ["FlowNetC", "window"])
def test_factors_are_rounded_to_tf32_and_sums_are_not(case):
    shape, layer = with_channels(case, 20)
    taps, patch = layer.geometry.taps, np.prod(layer.geometry.patch_size)
    rng = np.random.default_rng(0)
    given = [rng.standard_normal(a.shape).astype(np.float32) for a in arrays(shape, layer)]
    exact, sizes = (
        verify.numpy_engine().grads(*map(np.float64, of), layer, "float64")
        for of in (given, map(np.abs, given))
    )
    unit = 2.0**-24
    for got, want, size in zip(
        engine(tf32=True).grads(*given, layer, "float32"), exact, sizes, strict=True
    ):
        # Two factors, each rounded to 11 digits; and what `verify` allows.
        beyond = np.abs(got - want) - (patch * taps + 2) * unit * size
        assert (beyond <= 2.0**-10 * size).all()
        assert (beyond > 2.0**-14 * size).any()
    if taps == 1:
        rounded = [rounded_to_tf32(array).astype(np.float64) for array in given]
        wanted = verify.numpy_engine().grads(*rounded, layer, "float64")
        found = engine(tf32=True).grads(*given, layer, "float32")
        for got, want, size in zip(found, wanted, sizes, strict=True):
            assert verify.excess(got, want, size, patch, "float32") is None


@BOTH_LAYOUTS
@pytest.mark.parametrize("case", ["FlowNetC", "stride", "window"])
def test_tf32_keeps_what_is_not_finite_to_its_terms(case):
    shape, layer = with_channels(case, 20)
    for special, oracle in test_host.SPECIAL:
        how = {"special": 3 * special, "oracle": oracle()}
        assert not errors(engine(tf32=True), shape, layer, "float32", **how)


# ---- the order of the maps' axes in memory


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("kind", ["bfloat16", "TF32"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", PIXELS)
def test_gradients_of_contiguous_maps_are_exact_by_every_load(width, rows, kind):
    shape, layer = (2, 21, 6, PIXELS[width]), Layer(ROWS[rows])
    dtype, how = KINDS[kind]
    assert "tensor_gradient" in kernels(shape, layer, dtype, **how)
    assert not errors(once(order="shuffled", **how), shape, layer, dtype)


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
     (SM_80, "float16", l1(CASES["FlowNetC"]))],
    ids=["an old GPU", "float32", "absolute differences"],
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
        monkeypatch.setattr(cuda_plan, "_cycles", lambda _: inf)

    return force


@BOTH_LAYOUTS
@HALF_AND_TF32
@pytest.mark.parametrize("tile", TILES)
def test_unusual_tiles_are_exact(tile, dtype, how, force):
    (shape, layer), value = TILES[tile]
    force(value)
    assert "tensor_gradient" in kernels(shape, layer, dtype, **how)
    assert not errors(once(order="shuffled", **how), shape, layer, dtype)


def ones(shape, layer, plan, dtype="float16"):
    """Return the arrays of a plan between guards; what is read is 1."""
    shapes = {"grad_cost": layer.geometry.cost_shape(shape), "fmap1": shape, "fmap2": shape}
    shapes |= dict.fromkeys((*GRADS, *(one.name for one in plan.workspaces)), shape)
    guarded = {name: host.Guarded(size, dtype, offset=host.ALIGNED_OFFSET)
               for name, size in shapes.items()}  # fmt: skip
    for name in ("grad_cost", "fmap1", "fmap2"):
        guarded[name].array.fill(1)
    return guarded


@BOTH_LAYOUTS
@HALF_AND_TF32
@pytest.mark.parametrize("case", ["FlowNetC", "stride", "negative padding", SEVEN_PHASES], ids=str)
def test_every_result_is_written_once_and_never_read(case, dtype, how):
    shape, layer = with_channels(case, 24)
    plan = cuda_plan.plan(GRADS, layer, shape, dtype, SM_80, **LAYOUT, **how)
    guarded = ones(shape, layer, plan, dtype)
    assert_written_once(plan, {name: whole.array for name, whole in guarded.items()})


@HALF_AND_TF32
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize(
    "case",
    ["FlowNetC", "odd patch", WIDTHS["16 bytes"]],
    ids=["two phases", "one phase", "one phase, four at a time"],
)
def test_lanes_read_the_band_from_different_banks(case, which, dtype, how):
    shape, layer = with_channels(case, 24)
    plan = cuda_plan.plan(
        (f"grad_fmap{which}",), layer, shape, dtype, SM_80, channels_last=True, **how
    )
    (launch,) = plan.launches
    guarded = ones(shape, layer, plan, dtype)
    given = {name: guarded[name].array for name in launch.arrays}
    library = host.build(launch, "trace")
    accesses = host.run(library, launch, given, np.float32(1), log="all")
    storing = np.unique(accesses["round"][accesses["array"] == 2])
    found = accesses[accesses["array"] == host.SHARED]
    found = found[(found["written"] == 0) & ~np.isin(found["round"], storing)]
    tile, size = dict(launch.constants), DTYPES[dtype].itemsize
    # Floats of two phases lie between each other; rows of the second map's gradient shift.
    shifts = which == 2 and tile["unit"] > 1
    most = max(tile["phases"], 1 + shifts) if size == 4 else 1
    assert most_of_a_bank(found[found["bytes"] == size]) == most
    if size == 4:  # eight lanes at a time read all banks
        pixels = found[found["bytes"] == 4 * min(4, tile["channel_tiles"])]
        assert len(pixels)
        assert all(
            most_of_a_bank(pixels[pixels["thread"] // 8 % 4 == part], 4) == 1 for part in range(4)
        )


def most_of_a_bank(found, words=1):
    """Return how many different words lanes ask of a bank at once, at most."""
    most = 0
    for number in np.unique(found["round"]):
        of_round = found[found["round"] == number]
        for warp in np.unique(of_round["thread"] // 32):
            of_warp = of_round[of_round["thread"] // 32 == warp]
            lanes = [
                of_warp["offset"][of_warp["thread"] == thread] // 4
                for thread in np.unique(of_warp["thread"])
            ]
            for read in np.stack(lanes, axis=1):  # by all lanes at once
                asked = np.unique(read[:, None] + np.arange(words))
                _, count = np.unique(asked % 32, return_counts=True)
                most = max(most, count.max())
    return most


@BOTH_LAYOUTS
@pytest.mark.parametrize("seed", range(12))
def test_tiles_taken_at_random_are_exact(seed, monkeypatch):
    chance, candidates = random.Random(seed), tensor_adjoint._tiles
    monkeypatch.setattr(
        tensor_adjoint, "_tile", lambda *of: chance.choice([*candidates(*of), None])
    )
    monkeypatch.setattr(cuda_plan, "_cycles", lambda _: inf)
    problems = [*MIXED, "stride 6, dilation_patch 4", ADVANCE, SEVEN_PHASES, *WIDTHS.values()]
    shape, layer = with_channels(chance.choice(problems), chance.choice((9, 40, 72)))
    dtype, how = chance.choice([*KINDS.values()])
    aligned = chance.random() < 0.8
    assert not errors(once(order="shuffled", aligned=aligned, **how), shape, layer, dtype)


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
    kind: str = "float16"


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
# Of floats.
TF32_BUGS = {
    "columns of the other half": Bug("k * apart * slot_bytes", "0"),
    "the band of the other half": Bug("k / 2 * (depth / 2)", "0"),
    "floats of another lane": Bug("lane / 4 * wide", "lane / 4"),
    "floats of another product": Bug("two[n + i][k] = pack.values[i]",
                                     "two[n + i][k] = pack.values[0]"),
    "results of the other column": Bug("halves ? k : n % 2", "halves ? k : 0"),
    "results of another product": Bug("n / 2 * wide + k;", "n / 2 * wide;"),
    "channels of another lane": Bug("n / 2 * 8 * wide + n % 2 * wide",
                                    "n / 2 * 8 * wide", CHANNELS),
    "rows that do not shift": Bug("shifts ? column - begin / moved * moved : column", "column",
                                  ODD),
    "elements before the first target's": Bug("(lead + phases * q0) & (moved - 1)", "0", ODD),
    "rows that overlap": Bug("depth * depths;  // from", "patch_x;  // from"),
    "sums that stay not finite": Bug("if (!finite)", "if (false)", special=True),
}  # fmt: skip
TF32_APART_BUGS = {
    "results of the wrong target": Bug("columns>(both, reinterpret_cast<const unsigned*>(from), k",
                                       "columns>(both, reinterpret_cast<const unsigned*>(from), 0"),
    "another target summed anew": Bug("channels_last ? 0 : i / pairs", "0", special=True),
    "the last channels left out": Bug("first + k < channels", "first + 1 < channels", ODD),
    "results of another row": Bug("j * phases * columns + (", "("),
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
    "results of the other channel": Bug("both[n] >> 16)", "both[n])", PAIRS),
    "results of one phase": Bug("* phases + phase) * columns", "* phases) * columns", PAIRS),
    "results of another row": Bug("j * phases * columns + (", "(", PAIRS),
    "results of the wrong target": Bug("columns>(both, reinterpret_cast<const unsigned*>(from), k",
                                       "columns>(both, reinterpret_cast<const unsigned*>(from), 0",
                                       PAIRS),
    "the last odd result left out": Bug("c + pair >= s.channels", "c + 1 >= s.channels", ODD),
    "a result that is not there": Bug("if (c + pair >= s.channels) continue;", "", ODD),
    "another channel summed anew": Bug("channels_last ? i : i % pairs", "channels_last ? i : 0",
                                       PAIRS, special=True),
    "another target summed anew": Bug("channels_last ? 0 : i / pairs", "0", PAIRS, special=True),
    "sums that are not read again": Bug("        load();\n", "", PAIRS, special=True),
    "no barrier between runs and products": Bug(
        "wait_for_copies();\n    __syncthreads();", "wait_for_copies();", PAIRS),
}  # fmt: skip


def fails(bug, order):
    dtype, how = KINDS[bug.kind]
    computed = (engine if bug.special else once)(order=order, patch=(bug.old, bug.new), **how)
    tried = test_host.SPECIAL if bug.special else [((), verify.numpy_engine)]
    try:
        return any(
            errors(computed, *bug.problem, dtype, special=9 * special, oracle=oracle())
            for special, oracle in tried
        )
    except host.HostError:
        return True


def assert_caught(planted, force):
    shape, layer = planted.problem
    force(planted.tile)
    dtype, how = KINDS[planted.kind]
    plan = cuda_plan.plan(GRADS, layer, shape, dtype, SM_80, **LAYOUT, **how)
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


@pytest.mark.parametrize("bug", TF32_BUGS)
def test_a_planted_bug_of_tf32_is_caught(bug, force):
    assert_caught(TF32_BUGS[bug]._replace(kind="TF32"), force)


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("bug", TF32_APART_BUGS)
def test_a_planted_bug_of_contiguous_maps_in_tf32_is_caught(bug, force):
    assert_caught(TF32_APART_BUGS[bug]._replace(kind="TF32"), force)


# Splitting shows on values whose parts matter (`split_errors`).
SPLIT_BUGS = {
    "the same part twice": ("first -= widen", "0 * widen"),
    "the other value's rest": ("second -= widen(Element{static_cast<unsigned short>(word >> 16)})",
                               "second -= widen(Element{static_cast<unsigned short>(word)})"),
    "a part less": ("? 3 : 2", "? 2 : 1"),
    "one part for all": ("one[part], two[n]", "one[0], two[n]"),
    "the band of the other half": ("from[apart * along])", "from[0])"),
}  # fmt: skip


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bug", SPLIT_BUGS)
def test_a_planted_bug_of_splitting_is_caught(bug, dtype):
    shape, layer = TAPS["few taps"]
    old, _ = SPLIT_BUGS[bug]
    plan = cuda_plan.plan(GRADS, layer, shape, dtype, SM_80, **LAYOUT)
    assert all(old in host.translation_unit(one) for one in plan.launches[1:])
    assert split_errors(once(patch=SPLIT_BUGS[bug]), dtype)


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
    for name in ("FlowNetC", "stride", "window"):
        for channels in COPIES.values():
            shape, layer = with_channels(name, channels)
            for dtype, how in (KINDS["float16"], KINDS["TF32"]):
                plan = cuda_plan.plan(GRADS, layer, shape, dtype, SM_80, channels_last=True, **how)
                for launch in plan.launches:
                    host.compiled(
                        launch, "sanitize"
                    )  # the compiler itself is not to run under them
                script += (
                    f"shape, layer = t.with_channels({name!r}, {channels})\n"
                    "given = t.arrays(shape, layer, (float('inf'),))\n"
                    f"t.engine(mode='sanitize', **{how}).grads(*given, layer, {dtype!r})\n"
                )
    assert test_host.run_under_sanitizers(script) == (0, "")
