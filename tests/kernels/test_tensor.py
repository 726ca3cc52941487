"""The cost volume on tensor cores, run on the processor by hostcuda.h."""

import faulthandler
import os
import random
import re
from collections import Counter
from functools import partial
from itertools import product
from math import inf, prod
from pathlib import Path
from typing import NamedTuple

import definition
import host
import kernel_costs
import numpy as np
import pytest
import test_host
from cases import CASES, l1
from devices import DEVICES, LAYERS
from host import ORDERS, SM_75, SM_80, SM_90

from cupycorr import Geometry, verify
from cupycorr.cuda import plan as cuda_plan
from cupycorr.cuda import tensor, tensor_adjoint, turning
from cupycorr.cuda.launch import volume_shape
from cupycorr.layer import DTYPES, Layer

pytestmark = test_host.pytestmark

HALVES = ("float16", "bfloat16")
# Most positions of these lattices belong to no tap: the plain kernels compute them.
SPARSE = {"stride above window", "lattice of gcd 2", "lattice with untouched rows"}
FULL = {case: value for case, value in CASES.items() if 0 not in value[0]}
MIXED = test_host.MIXED
COPIES = {"16 bytes": 24, "element by element": 19}  # ways to shared memory, by channels
NARROW = {"8 bytes": 20, "4 bytes": 22}
EVERY_COPY = pytest.mark.parametrize("channels", COPIES.values(), ids=COPIES)
EVERY_WIDTH = pytest.mark.parametrize("channels", (COPIES | NARROW).values(), ids=COPIES | NARROW)
BOTH_LAYOUTS = pytest.mark.usefixtures("layout")
# Of the maps, unless a test says otherwise; small ones are not left to the plain kernels.
LAYOUT = {"channels_last": True, "plain": False}


def read_as_they_lie(monkeypatch):
    """Let tensor cores read contiguous maps, also where something else is faster."""
    for module in (tensor, tensor_adjoint):
        monkeypatch.setattr(module, "turning_cycles", lambda *_: inf)
    monkeypatch.setattr(cuda_plan, "_cycles", lambda _: inf)
    monkeypatch.setitem(LAYOUT, "channels_last", False)


@pytest.fixture(params=["side by side", "apart"])
def layout(request, monkeypatch):
    """Run a test on maps whose channels lie side by side, and apart."""
    if request.param == "apart":
        read_as_they_lie(monkeypatch)


@pytest.fixture
def apart(monkeypatch):
    read_as_they_lie(monkeypatch)


def with_channels(case, channels):
    (samples, _, *size), layer = CASES[case] if isinstance(case, str) else case
    return (samples, channels, *size), layer


def integers(shape, special=(), seed=0):
    """Return two maps of small integers, and of some special values among them."""
    rng = np.random.default_rng(seed)
    maps = rng.integers(-2, 3, (2, *shape)).astype(np.float64)
    for fmap in maps:
        where = rng.choice(fmap.size, min(fmap.size, len(special)), replace=False)
        fmap.flat[where] = special[: len(where)]
    return maps


def engine(device=SM_80, **how):
    return host.host_engine(device, **{**LAYOUT, **how})


def error(computed, shape, layer, dtype, *, special=(), oracle=None, seed=0):
    """Compare a cost volume with that of an oracle, rounded once; describe a difference."""
    maps = integers(shape, special, seed)
    want = (oracle or verify.numpy_engine()).cost(*maps, layer, "float64")
    return verify.difference(computed.cost(*maps, layer, dtype), verify.round_to(want, dtype))


def kernels(shape, layer, dtype="float16", device=SM_80, **how):
    plan = cuda_plan.plan(("cost",), layer, shape, dtype, device, **{**LAYOUT, **how})
    return [launch.kernel for launch in plan.launches]


@BOTH_LAYOUTS
@pytest.mark.parametrize("case", FULL)
def test_every_case_is_exact(case):
    shape, layer = with_channels(case, 24)
    assert ("tensor_cost" in kernels(shape, layer)) == (case not in SPARSE)
    assert error(engine(order="shuffled"), shape, layer, "float16") is None


@BOTH_LAYOUTS
@pytest.mark.parametrize("case", [case for case in FULL if "channel" in case])
def test_few_and_odd_channels_are_exact(case):
    assert error(engine(), *FULL[case], "float16") is None


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", HALVES)
@EVERY_WIDTH
@pytest.mark.parametrize("case", MIXED)
def test_every_copy_and_dtype_is_exact(case, channels, dtype):
    assert error(engine(SM_90), *with_channels(case, channels), dtype) is None


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_are_rounded_once_to_nearest_even(dtype):
    assert test_host.rounding(engine(), dtype) is None


@BOTH_LAYOUTS
@EVERY_COPY
@pytest.mark.parametrize("case", MIXED)
def test_the_order_of_threads_changes_no_bit(case, channels):
    shape, layer = with_channels(case, channels)
    maps = np.random.default_rng(0).standard_normal((2, *shape))
    first, *others = (engine(order=order).cost(*maps, layer, "float16") for order in ORDERS)
    assert [verify.difference(first, other) for other in others] == [None, None]


@BOTH_LAYOUTS
@EVERY_COPY
@pytest.mark.parametrize("case", MIXED)
def test_threads_share_no_word_without_a_barrier(case, channels):
    shape, layer = with_channels(case, channels)
    engine(mode="trace").cost(*integers(shape), layer, "float16")


@BOTH_LAYOUTS
@EVERY_COPY
@pytest.mark.parametrize("case", [case for case in FULL if case not in SPARSE])
def test_what_is_not_finite_reaches_only_what_it_is_a_term_of(case, channels):
    shape, layer = with_channels(case, channels)
    for special, oracle in test_host.SPECIAL:
        options = {"special": 3 * special, "oracle": oracle()}
        assert error(engine(), shape, layer, "bfloat16", **options) is None


@BOTH_LAYOUTS
@EVERY_COPY
@pytest.mark.parametrize("case", ["FlowNetC", "spatial-correlation-sampler's defaults"])
def test_misaligned_arrays_are_exact(case, channels):
    assert error(engine(aligned=False), *with_channels(case, channels), "float16") is None


# ---- maps whose channels lie apart, and layers for other kernels


# How many pixels of contiguous maps are loaded at a time, by width.
WIDTHS = {"16 bytes": 48, "8 bytes": 44, "4 bytes": 42, "element by element": 41}
# Leads, phases, pixels of no phase, positions that advance.
ROWS = {
    "one phase": Geometry(patch_size=(3, 9)),
    "padding": Geometry(patch_size=(3, 9), padding=(1, 3)),
    "two phases": Geometry(patch_size=(3, 6), dilation_patch=2),
    "two phases, padding": Geometry(patch_size=(3, 6), dilation_patch=2, padding=1),
    "three phases": Geometry(patch_size=(2, 5), dilation_patch=(1, 3)),
    "four phases, padding": Geometry(patch_size=(2, 4), dilation_patch=(1, 4), padding=(0, 2)),
    "every second pixel": Geometry(patch_size=(3, 5), stride=2, dilation_patch=2, padding=1),
    "two of four pixels": Geometry(patch_size=(2, 5), stride=(1, 2), dilation_patch=(1, 4)),
    "advance": Geometry(patch_size=(3, 5), stride=(1, 2)),
}


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_contiguous_maps_are_exact_by_every_load(width, rows):
    shape, layer = (2, 21, 6, WIDTHS[width]), Layer(ROWS[rows])
    assert kernels(shape, layer) == ["tensor_cost"]
    assert error(engine(order="shuffled"), shape, layer, "bfloat16") is None


def turn(monkeypatch):
    for module in (tensor, tensor_adjoint):
        monkeypatch.setattr(module, "turning_cycles", lambda *_: -inf)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("shape", [(2, 24, 12, 16), (1, 67, 13, 9)], ids=str)
def test_contiguous_maps_may_be_turned_first(shape, aligned, monkeypatch):
    turn(monkeypatch)
    layer = CASES["FlowNetC"][1]
    how = {"channels_last": False, "aligned": aligned}
    assert kernels(shape, layer, **how) == ["transpose", "transpose", "tensor_cost"]
    for mode in ("run", "trace"):
        assert error(engine(mode=mode, **how), shape, layer, "bfloat16") is None


def test_a_window_of_turned_maps_needs_all_workspaces(monkeypatch):
    turn(monkeypatch)
    case = CASES["everything differs per axis"]
    found = kernels(*case, channels_last=False)
    assert found == ["transpose", "transpose", "tensor_cost", "taps_sum"]
    assert error(engine(channels_last=False), *case, "float16") is None


def cycles(shape, layer, **how):
    """Return the cycles of tensor cores on contiguous maps, as planned."""
    return tensor.cost(layer, shape, "float16", SM_80, **how).cycles


@pytest.mark.parametrize("name", ["FlowNetC", "PWC-Net 2", "PWC-Net 4", "DispNetC"])
def test_contiguous_maps_are_turned_where_it_pays(name, monkeypatch):
    shape, layer = LAYERS[name][0], Layer(LAYERS[name][1])
    turned = cycles(shape, layer, channels_last=True)
    turned += turning.turning_cycles(shape, "float16", SM_80)
    native = cycles(shape, layer, turn=False)
    found = kernels(shape, layer, channels_last=False)
    assert found == [*2 * ["transpose"] * (turned < native), "tensor_cost"]
    monkeypatch.setattr(cuda_plan, "_cycles", lambda _: min(turned, native))
    assert kernels(shape, layer, channels_last=False) == ["product_cost"]


def test_maps_that_are_larger_than_the_workspace_are_not_turned(monkeypatch):
    turn(monkeypatch)
    flownetc = Layer(Geometry(patch_size=21, dilation_patch=2))
    found = [kernels((count, 256, 48, 64), flownetc, channels_last=False) for count in (85, 86)]
    assert found == [["transpose", "transpose", "tensor_cost"], ["tensor_cost"]]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_maps_with_channels_last_are_turned_for_other_kernels(dtype):
    shape, layer = with_channels("FlowNetC", 11)
    assert kernels(shape, layer, dtype) == ["transpose", "transpose", "product_cost"]
    assert not test_host.errors(engine(), shape, layer, dtype)


@pytest.mark.parametrize("plain", [True, False])
def test_gradients_of_maps_with_channels_last_are_correct(plain):
    shape, layer = with_channels("window", 20)
    assert not test_host.errors(engine(plain=plain), shape, layer, "float16")


def test_the_tangent_of_maps_with_channels_last_is_correct():
    shape, layer = l1(CASES["odd patch"])
    arrays = np.random.default_rng(0).integers(-2, 3, (4, *shape)).astype(np.float64)
    got = host.tangent(SM_80, *arrays, layer, "float32", channels_last=True)
    want = definition.differences_tangent(*arrays, layer.geometry)
    assert verify.difference(got, want) is None


@pytest.mark.parametrize(
    ("device", "dtype", "case"),
    [(SM_75, "float16", CASES["FlowNetC"]), (SM_80, "float32", CASES["FlowNetC"]),
     (SM_80, "float16", l1(CASES["FlowNetC"]))],
    ids=["an old GPU", "float32", "absolute differences"],
)  # fmt: skip
def test_tensor_cores_are_left_alone(device, dtype, case):
    shape, layer = case
    assert tensor.cost(layer, shape, dtype, device, channels_last=True) is None


# ---- tiles that the model would not choose for problems that run in a moment

PHASES = ((1, 40, 9, 22), Layer(Geometry(patch_size=(5, 7), dilation_patch=(1, 2))))
STRIDE = ((1, 40, 13, 29), Layer(Geometry(patch_size=(5, 7), stride=(1, 2))))
ADVANCE = ((1, 24, 21, 64), Layer(Geometry(patch_size=(3, 4), stride=(2, 3))))
ONE_ROW = ((1, 24, 3, 72), Layer(Geometry(patch_size=(1, 9))))
LEADS = ((2, 40, 9, 32), Layer(Geometry(patch_size=(5, 6), dilation_patch=2, padding=1)))
WIDE = ((1, 16, 3, 34), Layer(Geometry(patch_size=(2, 140))))
MANY_PHASES = ((1, 16, 5, 24), Layer(Geometry(patch_size=(2, 3), dilation_patch=(3, 6))))
SEVEN_PHASES = ((1, 16, 5, 24), Layer(Geometry(patch_size=(2, 3), dilation_patch=(3, 7))))


def in_slices(tile):
    strips = tile["row_tiles"] * tile["tile_rows"] * tile["row_groups"]
    line = tile["phases"] * tile["x_groups"] * tile["x_tiles"] * 16 // tile["tile_rows"] + 4
    return tile["shared_words"] // (strips * line) < tile["displacements"]


#   id: (problem, what is true, or largest, of the tile)
TILES = {
    "two rows": (PHASES, lambda t: t["tile_rows"] == 2 and t["x_tiles"]),
    "one row": (PHASES, lambda t: t["tile_rows"] == 1 and t["warp_rows"]),
    "tiles below each other": (PHASES, lambda t: t["row_tiles"]),
    "warps side by side": (STRIDE, lambda t: t["x_groups"] == 2 and t["x_tiles"]),
    "rows shared": (PHASES, lambda t: t["row_groups"]),
    "rows of a warp": (STRIDE, lambda t: t["warp_rows"] == 3 and t["tile_rows"] == 2),
    "rows in equal shares": (
        PHASES, lambda t: (t["tile_rows"], t["row_groups"], t["warp_rows"]) == (2, 2, 2)
        and t["row_tiles"]),
    "one chunk": (PHASES, lambda t: t["buffers"] == 1),
    "small chunks": (PHASES, lambda t: t["chunk"] == 16),
    "chunks of 32": (PHASES, lambda t: t["chunk"] == 32),
    "advance, two rows": (ADVANCE, lambda t: t["tile_rows"] == 2 and t["row_tiles"]),
    "advance, one row": (ADVANCE, lambda t: t["tile_rows"] == 1 and t["x_tiles"] == 2),
    "four tiles": (ONE_ROW, lambda t: t["x_tiles"] == 4 and t["tile_rows"] == 1),
    "results in slices": (WIDE, in_slices),
    "groups of displacements": (WIDE, lambda t: t["displacements"] < 140),
    "groups of phases": (MANY_PHASES, lambda t: t["phases"] < 6),
    "a partial group of phases": (SEVEN_PHASES, lambda t: 7 % t["phases"]),
    "in pieces": (LEADS, lambda t: t["pieces"] < 3 and t["vector"] * t["pieces"] + t["tile_rows"]),
}  # fmt: skip


CHUNKS = {"one chunk", "chunks of 32"}  # of more channels than are multiplied at a time


@pytest.fixture
def force(monkeypatch):
    """Return a function that lets tiles be chosen from all that fit: the most of some value."""

    def force(value):
        def choose(problem, device):
            best = max(tensor._tiles(problem, device), key=lambda tile: value(dict(tile.constants)))
            assert value(dict(best.constants)), "no tile is like that"
            return best

        monkeypatch.setattr(tensor, "_tile", choose)

    return force


@BOTH_LAYOUTS
@pytest.mark.parametrize("tile", TILES)
def test_unusual_tiles_are_exact(tile, force):
    (shape, layer), value = TILES[tile]
    if tile in CHUNKS and not LAYOUT["channels_last"]:
        pytest.skip("contiguous maps are loaded 16 channels at a time")
    force(value)
    assert error(engine(order="shuffled"), shape, layer, "float16") is None


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("case", ["FlowNetC", "everything differs per axis", SEVEN_PHASES], ids=str)
def test_every_result_is_written_once_and_never_read(case, dtype):
    shape, layer = with_channels(case, 24)
    plan = cuda_plan.plan(("cost",), layer, shape, dtype, SM_80, **LAYOUT)
    assert_written_once(plan, ones(layer, shape, plan, dtype))


@BOTH_LAYOUTS
def test_rows_of_two_warps_are_written_once(force):
    (shape, layer), value = TILES["rows in equal shares"]
    force(value)
    plan = cuda_plan.plan(("cost",), layer, shape, "float16", SM_80, **LAYOUT)
    assert_written_once(plan, ones(layer, shape, plan))
    for planted in (
        ("|| is_others(group, r)", ""),
        ("smaller(row_group * warp_rows, block_rows - warp_rows)", "row_group * warp_rows"),
    ):
        with pytest.raises((AssertionError, host.HostError)):
            assert_written_once(plan, ones(layer, shape, plan), planted)


def ones(layer, shape, plan, dtype="float16"):
    """Return the arrays of a plan, between guards; the maps are 1."""
    shapes = {"fmap1": (shape, dtype), "fmap2": (shape, dtype),
              "cost": (layer.geometry.cost_shape(shape), dtype)}  # fmt: skip
    shapes |= {name: (size, kind) for name, size, kind in plan.workspaces}
    guarded = {name: host.Guarded(size, host.storage(kind), offset=host.ALIGNED_OFFSET)
               for name, (size, kind) in shapes.items()}  # fmt: skip
    arrays = {name: whole.array for name, whole in guarded.items()}
    arrays["fmap1"].fill(1)
    arrays["fmap2"].fill(1)
    return arrays


def most_in_a_bank(launch, arrays, patch=None):
    """Return how many words of a bank a warp stores at most at once, before it stores results."""
    library = host.build(launch, "trace", patch)
    accesses = host.run(library, launch, arrays, np.float32(1), log="all")
    last, most = accesses["array"] == len(launch.arrays) - 1, 0
    stored = accesses[(accesses["array"] == host.SHARED) & (accesses["written"] == 1)]
    for block in range(launch.blocks):
        first = accesses["round"][last & (accesses["block"] == block)].min()
        found = stored[(stored["block"] == block) & (stored["round"] < first - 1)]
        found = found[found["bytes"] == 4]
        for number, warp in product(np.unique(found["round"]), range(launch.threads // 32)):
            own = found[(found["round"] == number) & (found["thread"] // 32 == warp)]
            lanes = [own["offset"][own["thread"] % 32 == lane] // 4 for lane in range(32)]
            if len({*map(len, lanes)}) > 1:
                continue  # a warp of which some lanes have more to do
            for words in zip(*lanes, strict=True):
                most = max(most, *Counter(word % 32 for word in {*words}).values())
    return most


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize(("patch", "most"), [(None, 1), (("? 0 : 32", "? 0 : 0"), 4)])
@pytest.mark.parametrize("rows", ["one phase", "padding", "two phases, padding"])
def test_lanes_store_pairs_of_channels_in_different_banks(rows, patch, most):
    shape, layer = (1, 16, 12, 96), Layer(ROWS[rows])
    plan = cuda_plan.plan(("cost",), layer, shape, "float16", SM_80)
    (launch,) = plan.launches
    assert most_in_a_bank(launch, ones(layer, shape, plan), patch) == most


def assert_written_once(plan, arrays, patch=None):
    """Check that each launch writes every element of its result once, and reads none."""
    for launch in plan.launches:
        library = host.build(launch, "trace", patch)
        accesses = host.run(library, launch, arrays, np.float32(1), log="arrays")
        last = accesses[accesses["array"] == len(launch.arrays) - 1]
        assert last["written"].all()
        result = arrays[launch.arrays[-1]]
        count = last["bytes"] // result.itemsize
        first = np.repeat(last["offset"] // result.itemsize - np.cumsum(count) + count, count)
        written = np.bincount(first + np.arange(len(first)), minlength=result.size)
        assert (written == 1).all()


@BOTH_LAYOUTS
@pytest.mark.parametrize("seed", range(8))
def test_tiles_taken_at_random_are_exact(seed, monkeypatch):
    chance, candidates = random.Random(seed), tensor._tiles
    monkeypatch.setattr(tensor, "_tile", lambda *of: chance.choice(list(candidates(*of))))
    problems = [*MIXED, "stride", "stride 6, dilation_patch 4", ADVANCE, SEVEN_PHASES]
    shape, layer = with_channels(chance.choice(problems), chance.choice((9, 40, 72)))
    how = {"order": "shuffled", "aligned": chance.random() < 0.8}
    assert error(engine(**how), shape, layer, chance.choice(HALVES)) is None


# ---- what the model makes of them

# The most microseconds that a layer may take on an A100 and on an H100.
MOST = {
    ("FlowNetC", "forward"): (45, 24), ("FlowNetC", "gradients"): (82, 45),
    ("PWC-Net 2", "forward"): (65, 30), ("PWC-Net 2", "gradients"): (157, 78),
    ("PWC-Net 3", "forward"): (23, 10.5), ("PWC-Net 4", "forward"): (12, 7.5),
    ("DispNetC", "forward"): (52, 27),
}  # fmt: skip
MOST_APART = 1.6  # times that contiguous maps may take
README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"


# How many times as fast as without tensor cores layers must be: in TF32, and with several taps.
LEAST = {
    ("FlowNetC", "forward", "float32"): 1.9, ("FlowNetC", "gradients", "float32"): 2,
    ("PWC-Net 2", "gradients", "float32"): 1.1, ("PWC-Net 3", "gradients", "float32"): 1.5,
    ("FlowNetC 3 x 3", "gradients", "float16"): 2,
}  # fmt: skip
OF_PAGE = LAYERS | {
    "FlowNetC 3 x 3": ((4, 256, 48, 64), Geometry(3, 21, padding=1, dilation_patch=2))
}


def microseconds(layer, which, gpu, dtype="float16"):
    """Return the times on tensor cores, of maps with channels side by side and apart, and without.

    They are those of the model, or of the floor of DRAM, beside the bytes that go to the taps.
    """
    (shape, geometry), device = OF_PAGE[layer], DEVICES[gpu]
    results = {"forward": ("cost",), "gradients": ("grad_fmap1", "grad_fmap2")}[which]
    size, costs = DTYPES[dtype].itemsize, prod(geometry.cost_shape(shape))
    rate = kernel_costs.FIGURES[gpu].dram * kernel_costs.DRAM_SHARE
    floor = size * (2 * len(results) * prod(shape) + costs) / rate
    taps = (size * costs + 4 * prod(volume_shape(geometry, shape))) / rate
    times = []
    for channels_last, source in ((True, "tensor"), (False, "tensor"), (False, "product")):
        with pytest.MonkeyPatch.context() as patch:
            if source == "product":
                patch.setattr(tensor, "applies", lambda *_, **__: False)
                patch.setattr(tensor_adjoint, "applies", lambda *_, **__: False)
            plan = cuda_plan.plan(
                results, Layer(geometry), shape, dtype, device, channels_last=channels_last,
                tf32=True,
            )  # fmt: skip
        turned = [launch for launch in plan.launches if launch.kernel == "transpose"]
        computed = [launch for launch in plan.launches if launch.cycles is not None]
        assert all(launch.source.startswith(source) for launch in computed)
        cycles = sum(launch.cycles for launch in computed)
        cycles += len(turned) / 2 * turning.turning_cycles(shape, dtype, device)
        time = max(cycles / kernel_costs.FIGURES[gpu].gigahertz, floor)
        times.append((time + taps * (geometry.taps > 1)) / 1e3)
    return times


@pytest.mark.parametrize(("layer", "which"), MOST)
def test_layers_come_near_the_floors_of_tensor_cores(layer, which):
    (a100, a100_apart, _), (h100, h100_apart, _) = (
        microseconds(layer, which, gpu) for gpu in ("A100", "H100")
    )
    most = MOST[layer, which]
    assert a100 <= most[0]
    assert h100 <= most[1]
    assert a100_apart <= MOST_APART * a100
    assert h100_apart <= MOST_APART * h100


@pytest.mark.parametrize("case", LEAST, ids=" ".join)
def test_tf32_and_parts_of_floats_pay(case):
    layer, which, dtype = case
    for gpu in ("A100", "H100"):
        side_by_side, apart, without = microseconds(layer, which, gpu, dtype)
        assert LEAST[case] * side_by_side <= without
        assert apart <= without


@pytest.mark.parametrize(
    ("layer", "which", "dtype"),
    [
        *((*key, "float16") for key in MOST),
        *LEAST,
    ],
)
def test_the_page_shows_what_the_model_says_of_tensor_cores(layer, which, dtype):
    name = f"{layer} {which}" + " in TF32" * (dtype == "float32")
    row = re.search(rf"^\| {name} \| (.+) \|$", README.read_text("utf-8"), re.MULTILINE)
    shown = [float(cell) for cell in row[1].split(" | ")]
    want = [time for gpu in ("A100", "H100") for time in microseconds(layer, which, gpu, dtype)]
    assert shown == pytest.approx(want, abs=0.05001)


# ---- planted errors


class Bug(NamedTuple):
    """A change of the sources that a check must notice."""

    old: str
    new: str
    tile: str = "two rows"
    """One of TILES."""
    channels: int = 40
    special: bool = False
    """Whether values that are not finite are needed to see it."""


BUGS = {
    "a wrong shift of columns": Bug("- advance_x * column - slice", "- column - slice",
                                    "warps side by side"),
    "the other lanes' columns": Bug("lane / 16 * 8 + lane % 8;", "lane / 8 % 2 * 8 + lane % 8;"),
    "halves of a matrix exchanged": Bug(
        "at_slot(slot2) + lane / 8 % 2 * 16", "at_slot(slot2) + lane / 16 * 16"),
    "columns of the wrong tile": Bug("(i * span / 8 + t)", "(i + t)", "advance, one row"),
    "rows do not advance": Bug("p = e - advance_y * j", "p = e - j", "advance, two rows"),
    "a row of the wrong tile": Bug(
        "row2 = advance_y * tile_rows * row_tile +", "row2 = tile_rows * row_tile +",
        "advance, two rows"),
    "a row that no tile meets": Bug("!inside(p, patch_y) ||", ""),
    "the last rows left out": Bug("e_own + r < meeting &&", "e_own + r + 1 < meeting &&"),
    "rows of the wrong warp": Bug("rows_exist >> r & 1", "rows_exist & 1", "rows of a warp"),
    "results of a row beyond a share": Bug(
        "e0 + first_row(group) + r", "e0 + group * warp_rows + r", "rows in equal shares"),
    "phases of the wrong columns": Bug("phase * of_phase2", "x_group * of_phase2"),
    "the last channels left out": Bug(
        "end = smaller(chunk, s.channels - c)", "end = (s.channels - c) / 16 * 16", "one chunk"),
    "the last odd channel left out": Bug("c + k + 1 < channels", "false", channels=39),
    "channels behind the last": Bug(
        "in_map && offset >= 0", "offset >= 0", channels=24, special=True),
    "columns that are met left out": Bug("- 1) + displacements;", "- 1) + displacements - 1;",
                                          "four tiles"),
    "pixels outside": Bug("in_map && offset >= 0", "in_map"),
    "products with what is outside": Bug(
        "if (!finite) {", "if (false) {", special=True),
    "the buffer of another chunk": Bug("c / chunk % buffers", "c / 16 % buffers", "chunks of 32",
                                       channels=96),
    "no wait for copies": Bug("  host_wait_for_copies();", ""),
    "no barrier between copies and products": Bug(
        "wait_for_copies();\n    __syncthreads();", "wait_for_copies();", "small chunks"),
    "no barrier between products and results": Bug(
        "slice += slices) {\n      __syncthreads();", "slice += slices) {"),
    "no barrier between results and stores": Bug(
        "__syncthreads();\n      constexpr int units", "constexpr int units"),
    "no barrier behind the offsets": Bug(
        "s.channels : -1;\n    }\n    __syncthreads();", "s.channels : -1;\n    }"),
    "results of the wrong phase": Bug(
        "f * columns1 + (k0 + k) / phases", "f * columns1 + k0 / phases", "four tiles"),
    "neighbours exchanged": Bug("from[2 * k + of_word - 1]", "from[2 * k]", "four tiles"),
}  # fmt: skip


APART_BUGS = {
    "a neighbouring pixel": Bug("word, other, k % 2)", "word, other, !(k % 2))", "in pieces"),
    "the last channels left out": Bug("first + k < channels", "first + 1 < channels", channels=39),
    "channels behind the last": Bug("first + k < channels &&", "", channels=39),
    "the channels of another lane": Bug("thread % lanes) * of_word", "lanes - 1) * of_word"),
    "rows outside": Bug("CHANNELS && inside(y, height)", "CHANNELS", "in pieces"),
    "pixels outside": Bug("static_cast<unsigned>(x[n] + i * VECTOR) < end", "true", "in pieces"),
    "pixels before the map": Bug("static_cast<unsigned>(x[n] + i * VECTOR) < end",
                                 "x[n] + i * VECTOR < static_cast<int>(end)", "in pieces"),
    "pixels that are needed left out": Bug("smaller(width, first + columns)",
                                           "smaller(width, first + columns - 8)", "in pieces"),
    "loads that are not aligned": Bug("first - LEAD + run", "first + run", "in pieces"),
    "slots without a lead": Bug("(j - LEAD - STEP * f)", "(j - STEP * f)", "in pieces"),
    "all phases on each other": Bug("f * PHASE_BYTES", "0 * PHASE_BYTES"),
    "another row's runs": Bug("y = row(pop(rest, ROWS))", "y = row(rest % ROWS + 1)"),
    "runs of another unit": Bug("? unit : unit %", "? unit + 1 : unit %"),
    "the piece before": Bug("land(c + chunk, piece - 1)", "land(c + chunk, piece)", "in pieces"),
    "the last piece left out": Bug("land(c + chunk, pieces - 1)", "land(c + chunk, 0)",
                                   "in pieces"),
    "the channels of the chunk before": Bug("fetch(c + chunk, piece)", "fetch(c, piece)"),
    "the buffer in use": Bug("land(c + chunk, pieces - 1)", "land(c, pieces - 1)"),
    "no barrier between runs and products": Bug(
        "wait_for_copies();\n    __syncthreads();", "wait_for_copies();"),
}  # fmt: skip


def problem(bug):
    (samples, _, *size), layer = TILES[bug.tile][0]
    return (samples, bug.channels, *size), layer


def is_caught(fails):
    """Whether a run fails or is wrong in some order of the threads: in a process of its own."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        missed = True
        try:
            missed = not any(map(fails, ORDERS))
        finally:
            os._exit(missed)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 1


def fails(bug, order):
    computed = engine(order=order, patch=(bug.old, bug.new))
    tried = test_host.SPECIAL if bug.special else [((), verify.numpy_engine)]
    try:
        return any(
            error(computed, *problem(bug), "float16", special=9 * special, oracle=oracle())
            for special, oracle in tried
        )
    except host.HostError:
        return True


def assert_caught(planted, force):
    shape, layer = problem(planted)
    force(TILES[planted.tile][1])
    (launch,) = cuda_plan.plan(("cost",), layer, shape, "float16", SM_80, **LAYOUT).launches
    assert planted.old in host.translation_unit(launch)
    host.compiled(launch, patch=(planted.old, planted.new))
    assert is_caught(partial(fails, planted))


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug, force):
    assert_caught(BUGS[bug], force)


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("bug", APART_BUGS)
def test_a_planted_bug_of_contiguous_maps_is_caught(bug, force):
    assert_caught(APART_BUGS[bug], force)


@pytest.mark.usefixtures("apart")
def test_runs_that_land_without_a_barrier_are_a_race_in_any_order(force):
    planted = APART_BUGS["no barrier between runs and products"]
    shape, layer = problem(planted)
    force(TILES[planted.tile][1])
    raced = engine(mode="trace", patch=(planted.old, planted.new))
    with pytest.raises(host.HostError, match="data race"):
        raced.cost(*integers(shape), layer, "float16")


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.startswith("no barrier")])
def test_a_missing_barrier_is_a_race_in_any_order(bug, force):
    planted = BUGS[bug]
    shape, layer = problem(planted)
    force(TILES[planted.tile][1])
    raced = engine(mode="trace", patch=(planted.old, planted.new))
    with pytest.raises(host.HostError, match="data race"):
        raced.cost(*integers(shape), layer, "float16")


TURNING_BUGS = {
    "a second element that is not there": ("if (second) to[1] =", "to[1] ="),
    "axes not exchanged": ("tile[along * pitch + i]", "tile[i * pitch + along]"),
    "a row too many": ("a >= s.size_a || b >= s.size_b) continue;\n    const bool",
                       "b >= s.size_b) continue;\n    const bool"),
    "no barrier": ("  }\n  __syncthreads();\n", "  }\n"),
}  # fmt: skip


@pytest.mark.parametrize("bug", TURNING_BUGS)
def test_a_planted_bug_of_turning_is_caught(bug):
    shape, layer = (1, 67, 9, 13), Layer(Geometry(patch_size=3))
    old, new = TURNING_BUGS[bug]
    plan = cuda_plan.plan(("cost",), layer, shape, "float32", SM_80, channels_last=True)
    assert old in host.translation_unit(plan.launches[0])
    caught = False
    for order in ORDERS:
        try:
            caught |= bool(error(engine(order=order, patch=(old, new)), shape, layer, "float32"))
        except host.HostError:
            caught = True
    assert caught


@pytest.mark.slow
def test_sanitizers_find_nothing():
    names = ("even patch, dilated", "everything differs per axis", "displacement beyond the map")
    script = "import test_tensor as t\n"
    for name in names:
        for channels in COPIES.values():
            shape, layer = with_channels(name, channels)
            how = {"channels_last": True}
            for launch in cuda_plan.plan(("cost",), layer, shape, "float16", SM_80, **how).launches:
                host.compiled(launch, "sanitize")  # the compiler itself is not to run under them
            script += (
                f"shape, layer = t.with_channels({name!r}, {channels})\n"
                "t.engine(mode='sanitize').cost(*t.integers(shape), layer, 'float16')\n"
            )
    assert test_host.run_under_sanitizers(script) == (0, "")


MISTAKES = {
    "not all lanes of a warp reach": (
        "const int begin = buffer(c) + k",
        "if (lane == 3) continue;\n const int begin = buffer(c) + k"),
    "a row that is not aligned": ("at_slot(slot1) +", "at_slot(slot1) + 2 +"),
    "of shared memory": ("at_slot(slot1)", "at_slot(slot1 + (1 << 20))"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_a_warp_is_noticed(mistake):
    shape, layer = PHASES
    with pytest.raises(host.HostError, match=mistake):
        engine(patch=MISTAKES[mistake]).cost(*integers(shape), layer, "float16")


# ---- float32, rounded to TF32


def rounded_to_tf32(values):
    """Return float32 values with 11 binary digits, ties away from zero."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def test_nobody_gets_tf32_without_asking_for_it():
    layer = CASES["FlowNetC"][1]
    for dtype, tf32 in (("float32", False), ("float64", True)):
        assert "tensor_cost" not in kernels((1, 24, 12, 16), layer, dtype, tf32=tf32)
    assert kernels((1, 24, 12, 16), layer, "float32", tf32=True) == ["tensor_cost"]
    assert "tensor_cost" not in kernels((1, 24, 12, 16), layer, "float32", SM_75, tf32=True)


@BOTH_LAYOUTS
@pytest.mark.parametrize("channels", [20, 19])
@pytest.mark.parametrize("case", MIXED)
def test_tf32_is_exact_on_integers(case, channels):
    shape, layer = with_channels(case, channels)
    computed = engine(SM_90, tf32=True, order="shuffled")
    assert error(computed, shape, layer, "float32") is None


@BOTH_LAYOUTS
@pytest.mark.parametrize("channels", [20, 19])
def test_maps_are_rounded_to_tf32_and_sums_are_not(channels):
    shape, layer = with_channels("FlowNetC", channels)
    maps = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    got = engine(tf32=True).cost(*maps.astype(np.float64), layer, "float32")
    one, two = (rounded_to_tf32(fmap).astype(np.float64) for fmap in maps)
    want = verify.numpy_engine().cost(one, two, layer, "float64")
    size = verify.numpy_engine().cost(np.abs(one), np.abs(two), layer, "float64")
    assert (np.abs(got - want) <= channels * 2.0**-24 * size).all()
    exact = verify.numpy_engine().cost(*maps.astype(np.float64), layer, "float64")
    assert (np.abs(got - exact) > channels * 2.0**-24 * size).any()


@BOTH_LAYOUTS
def test_tf32_keeps_what_is_not_finite_to_its_terms():
    shape, layer = with_channels("FlowNetC", 20)
    for special, oracle in test_host.SPECIAL:
        options = {"special": 3 * special, "oracle": oracle()}
        assert error(engine(tf32=True), shape, layer, "float32", **options) is None


@BOTH_LAYOUTS
def test_threads_share_no_word_of_tf32_without_a_barrier():
    shape, layer = with_channels("FlowNetC", 20)
    engine(mode="trace", tf32=True).cost(*integers(shape), layer, "float32")
