"""The CUDA kernels, run on the processor by hostcuda.h: what can be known without a GPU."""

import os
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import definition
import host
import numpy as np
import pytest
from cases import CASES, l1
from host import DEVICES, ORDERS, SM_75, SM_80, SM_90

from cupycorr import Geometry, verify
from cupycorr.cuda import tiles as cuda_tiles
from cupycorr.layer import DTYPES, Layer

pytestmark = pytest.mark.skipif(host.unavailable() is not None, reason=str(host.unavailable()))

# No block's threads share so few channels: then gradients would fall back to plain kernels.
TILED = {
    case: ((n, c if "channel" in case else c + 20, h, w), layer)
    for case, ((n, c, h, w), layer) in CASES.items()
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)
BOTH_COPIES = pytest.mark.parametrize("device", ["sm_75", "sm_80"])
# Phases; taps; neighbouring columns, which are moved together; and everything at once.
MIXED = [
    "even patch, dilated",
    "spatial-correlation-sampler's defaults",
    "FlowNetC",
    "everything differs per axis",
]
EVERY_MIX = pytest.mark.parametrize("case", MIXED)
# Every case on one GPU; where copies pass registers, those that reach all of the kernels.
EVERY_TILED = pytest.mark.parametrize(
    ("case", "device"), [*((case, "sm_80") for case in CASES), *((case, "sm_75") for case in MIXED)]
)
# With infinities it matters that engines add upstream gradients before they multiply them.
SPECIAL = (((np.nan,), definition.engine), ((np.inf, -np.inf), verify.numpy_engine))
LAYERS = {
    "FlowNetC": ((1, 256, 48, 64), Layer(Geometry(patch_size=21, dilation_patch=2))),
    "PWC-Net, level 6": ((8, 196, 8, 14), Layer(Geometry(patch_size=9))),
    "PWC-Net, level 5": ((8, 128, 16, 28), Layer(Geometry(patch_size=9))),
    "PWC-Net, level 4": ((1, 96, 32, 56), Layer(Geometry(patch_size=9))),
    "DispNet": ((1, 128, 24, 192), Layer(Geometry(patch_size=(1, 41)))),
}


def requested(request, of=lambda case: case):
    """Return what the selected tests of a module will compile."""
    requests = []
    for item in request.session.items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if item.module is request.module and {"case", "device"} <= values.keys():
            launches = host.launches(
                *of((TILED | LAYERS)[values["case"]]),
                values.get("dtype", "float32"),
                DEVICES[values["device"]],
                aligned="misaligned" not in item.name,
            )
            requests += [(launch, values.get("mode", "run"), None) for launch in launches]
    return requests


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead(request):
    """Compile in the background what the selected tests will need."""
    with host.compiling_ahead(requested(request)):
        yield


def errors(engine, shape, layer, dtype="float32"):
    return [check for check in verify.check(engine, shape, layer, dtype) if check.error]


def results(engine, shape, layer, dtype="float32", *, special=(), seed=0):
    """Return cost and gradients of small integers, and of some special values among them."""
    rng = np.random.default_rng(seed)
    shapes = layer.geometry.cost_shape(shape), shape, shape
    arrays = [rng.integers(-2, 3, shape).astype(np.float64) for shape in shapes]
    for array in arrays:
        where = rng.choice(array.size, min(array.size, len(special)), replace=False)
        array.flat[where] = special[: len(where)]
    grad, fmap1, fmap2 = arrays
    cost = engine.cost(fmap1, fmap2, layer, dtype)
    return (cost, *engine.grads(grad, fmap1, fmap2, layer, dtype))


def rounding(engine, dtype):
    """Compare products of numbers of all magnitudes with their rounding; describe a difference."""
    rng, count = np.random.default_rng(0), 1 << 14
    storage = host.storage(dtype)
    bits = rng.integers(0, 1 << 16, (2, count)).astype(np.uint16)
    with np.errstate(all="ignore"):
        one, two = bits.view(storage).astype(np.float32)
        # 1.5 * (1 + k * unit) lies between two numbers where k is odd.
        ties = count // 2
        one[:ties] = 1.5 * 2.0 ** rng.integers(-10, 10, ties)
        two[:ties] = 1 + rng.integers(0, 128, ties) * DTYPES[dtype].rounding * 2
        want = (one * two).astype(storage).astype(np.float64)
    shape = (1, 1, 64, count // 64)
    got = engine.cost(one.reshape(shape), two.reshape(shape), Layer(Geometry()), dtype)
    return verify.difference(got, want.reshape(got.shape))


def differences(got, want):
    return [verify.difference(*pair) for pair in zip(got, want, strict=True)]


@BOTH_COPIES
def test_the_table_reaches_every_kernel(device):
    kernels = {
        launch.kernel
        for shape, layer in TILED.values()
        for launch in host.launches(shape, layer, "float32", DEVICES[device])
    }
    assert kernels == {
        "product_cost", "product_gradient", "taps_sum", "taps_spread",
        "plain_cost", "plain_grad_fmap1", "plain_grad_fmap2",
    }  # fmt: skip


@EVERY_TILED
def test_tiled_kernels_are_correct(case, device):
    assert not errors(host.host_engine(DEVICES[device]), *TILED[case])


@EVERY_CASE
def test_plain_kernels_are_correct(case):
    assert not errors(host.host_engine(SM_75, plain=True), *CASES[case])


@pytest.mark.parametrize("device", ["sm_80"])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@EVERY_MIX
def test_other_dtypes_are_correct(case, dtype, device):
    assert not errors(host.host_engine(DEVICES[device]), *TILED[case], dtype)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_results_are_rounded_once_to_nearest_even(dtype, plain):
    assert rounding(host.host_engine(SM_75, plain=plain), dtype) is None


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_plain_kernels_are_correct_in_other_dtypes(dtype):
    engine = host.host_engine(SM_75, plain=True)
    assert not errors(engine, *CASES["everything differs per axis"], dtype)


@pytest.mark.parametrize(
    ("case", "device"),
    [
        ("FlowNetC", "sm_80"),
        *((case, device) for case in [*LAYERS][1:] for device in ("sm_75", "sm_90")),
    ],
)
def test_layers_of_networks_are_exact(case, device):
    shape, layer = LAYERS[case]
    checks = verify.check(host.host_engine(DEVICES[device]), shape, layer, "float32")
    assert not [check for check in islice(checks, 4) if check.error]


def differences_of_orders(device, shape, layer):
    """Compare what the orders of threads make of maps whose sums have to be rounded."""
    rng = np.random.default_rng(0)
    shapes = layer.geometry.cost_shape(shape), shape, shape
    grad, *maps = (rng.standard_normal(size).astype(np.float32) for size in shapes)
    got = []
    for order in ORDERS:
        engine = host.host_engine(device, order=order)
        cost = engine.cost(*maps, layer, "float32")
        got.append((cost, *engine.grads(grad, *maps, layer, "float32")))
    return differences(got[0], got[1]) + differences(got[0], got[2])


@BOTH_COPIES
@EVERY_MIX
def test_the_order_of_threads_changes_no_bit(case, device):
    assert not any(differences_of_orders(DEVICES[device], *TILED[case]))


@pytest.mark.parametrize("mode", ["trace"])
@BOTH_COPIES
@EVERY_MIX
def test_threads_share_no_word_without_a_barrier(case, device, mode):
    results(host.host_engine(DEVICES[device], mode=mode), *TILED[case])


@EVERY_TILED
def test_what_is_not_finite_reaches_only_what_it_is_a_term_of(case, device):
    shape, layer = TILED[case]
    for special, oracle in SPECIAL:
        got = results(host.host_engine(DEVICES[device]), shape, layer, special=special)
        want = results(oracle(), shape, layer, special=special)
        assert differences(got, want) == [None, None, None]


@EVERY_CASE
def test_what_is_not_finite_reaches_only_what_it_is_a_term_of_in_plain_kernels(case):
    shape, layer = CASES[case]
    engine = host.host_engine(SM_75, plain=True)
    for special, oracle in SPECIAL:
        got = results(engine, shape, layer, special=special)
        want = results(oracle(), shape, layer, special=special)
        assert differences(got, want) == [None, None, None]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@BOTH_COPIES
@pytest.mark.parametrize("case", ["FlowNetC", "spatial-correlation-sampler's defaults"])
def test_misaligned_arrays_are_correct(case, device, dtype):
    assert not errors(host.host_engine(DEVICES[device], aligned=False), *TILED[case], dtype)


def test_aligned_plans_need_aligned_arrays(monkeypatch):
    # The other side: the plans differ, and the wrong one is noticed.
    case = TILED["FlowNetC"]
    monkeypatch.setattr(host, "ALIGNED_OFFSET", 4)
    with pytest.raises(host.HostError, match="not aligned"):
        results(host.host_engine(SM_75), *case)


# ---- tiles that the model would not choose for problems that run in a moment

PHASES = ((1, 20, 9, 22), Layer(Geometry(patch_size=(5, 7), dilation_patch=(1, 2))))
STRIDE = ((1, 20, 13, 29), Layer(Geometry(patch_size=(5, 7), stride=(1, 2))))
VECTORS = ((1, 6, 9, 16), Layer(Geometry(patch_size=(3, 9))))
COLUMN = ((1, 20, 17, 16), Layer(Geometry(patch_size=(9, 1))))
WIDE_PATCH = ((1, 5, 5, 34), Layer(Geometry(patch_size=(2, 29))))
LOW_MAP = ((2, 5, 4, 9), Layer(Geometry(patch_size=(7, 3))))
STEEP = (
    (1, 5, 23, 9),
    Layer(Geometry(patch_size=(6, 3), stride=(2, 1), padding=(-1, 1), dilation_patch=(3, 1))),
)


def in_slices(tile, values, lines):
    """Whether results of a thread do not fit into shared memory at once."""
    words = tile["channel_groups"] * lines * (tile["groups"] * tile["positions"] + 4)
    return tile["shared_words"] // words < values


#   id: (device, problem, what is largest, or true, of the tile)
PRODUCT_TILES = {
    "channels shared": (SM_80, PHASES, lambda t: t["channel_groups"]),
    "channels shared, partial chunk": (
        SM_75, PHASES, lambda t: t["channel_groups"] == 2 and t["chunk"] == 8),
    "one strip": (SM_80, PHASES, lambda t: -t["strips"]),
    "strips of one row": (SM_75, PHASES, lambda t: t["rows1"] == 1 and t["strips"] == 5),
    "strips across rows": (SM_80, PHASES, lambda t: t["strips"] % 5 == 3 and t["rows1"] > 3),
    "strips of whole rows": (SM_75, PHASES, lambda t: t["strips"] == 15),
    "several groups": (SM_80, PHASES, lambda t: t["groups"]),
    "channel by channel": (SM_75, PHASES, lambda t: t["chunk"] == 1 and t["threads"] >= 192),
    "not ahead": (SM_75, STRIDE, lambda t: not t["ahead"]),
    "advance, several groups": (SM_80, STRIDE, lambda t: t["groups"] == 2 and t["strips"] == 7),
    "vectors": (SM_80, VECTORS, lambda t: t["vector"] == 4 and t["strips"] == 4),
    "vectors through registers": (SM_75, VECTORS, lambda t: t["vector"] == 4 and t["chunk"]),
    "results in slices": (
        SM_75, PHASES, lambda t: in_slices(t, 7, t["strips"])),
    "groups of displacements": (SM_75, WIDE_PATCH, lambda t: t["strips"] == 3),
    "groups of displacements, one row": (SM_80, WIDE_PATCH, lambda t: t["strips"] == 2),
    "strips left out": (SM_80, PHASES, lambda t: t["least"] == 3 and t["strips"] == 7),
    "strips left out, a few per block": (
        SM_75, PHASES, lambda t: t["least"] == 3 and t["strips"] == 2),
    "strips left out, many per block": (SM_80, PHASES, lambda t: (t["least"] == 3) * t["strips"]),
    "strips left out, low map": (SM_75, LOW_MAP, lambda t: t["least"] == 4 and t["strips"] == 5),
    "strips left out, advance": (SM_80, STEEP, lambda t: t["least"] == 3 and t["strips"] == 11),
    "strips left out, groups of displacements": (
        SM_80, WIDE_PATCH, lambda t: t["least"] == 1 and t["strips"] == 3),
    "strips left out, vectors": (
        SM_80, VECTORS, lambda t: t["least"] == 2 and t["strips"] == 4),
}  # fmt: skip
GRADIENT_TILES = {
    "one row": (SM_80, PHASES, lambda t: t["rows"] == 1),
    "many rows": (SM_75, PHASES, lambda t: t["rows"]),
    "several groups": (SM_80, PHASES, lambda t: t["groups"]),
    "a partial last group": (SM_75, PHASES, lambda t: t["groups"] == 2),
    "many channels": (SM_80, PHASES, lambda t: t["channels"]),
    "channel by channel": (SM_75, PHASES, lambda t: -t["channels"]),
    "channels shared": (SM_75, PHASES, lambda t: t["channel_groups"]),
    "advance, two rows": (SM_80, STRIDE, lambda t: t["rows"] == 2 and t["groups"] > 1),
    "advance, many channels": (SM_75, STRIDE, lambda t: t["channels"]),
    "not ahead": (SM_75, WIDE_PATCH, lambda t: not t["ahead"]),
    "vectors": (SM_80, VECTORS, lambda t: t["vector"] == 4 and t["rows"] == 2),
    "vectors through registers": (SM_75, VECTORS, lambda t: t["vector"] == 4 and t["groups"]),
    "results in slices": (SM_80, COLUMN, lambda t: in_slices(t, t["channels"], t["rows"])),
    "groups of displacements": (SM_75, WIDE_PATCH, lambda t: t["rows"] == 2),
    "groups of displacements, one row": (SM_80, WIDE_PATCH, lambda t: t["rows"] == 1),
}


@pytest.fixture
def force(monkeypatch):
    """Return a function that lets the tiles of plans be chosen from all that fit."""

    def force(product=None, gradient=None):
        for kind, choose in (("product", product), ("gradient", gradient)):
            if choose is not None:
                candidates = getattr(cuda_tiles, f"_{kind}_tiles")
                monkeypatch.setattr(
                    cuda_tiles,
                    f"{kind}_tile",
                    lambda problem, device, rank, choose=choose, candidates=candidates: (
                        0.0,
                        choose([tile for _, tile in candidates(problem, device)]),
                    ),
                )

    return force


def most(value):
    def choose(tiles):
        best = max(tiles, key=lambda tile: value(dict(tile.constants)))
        assert value(dict(best.constants)), "no tile is like that"
        return best

    return choose


def compare_with_the_definition(device, shape, layer):
    got = results(host.host_engine(device, order="shuffled"), shape, layer)
    want = results(verify.definition(), shape, layer)
    assert differences(got, want) == [None, None, None]


@pytest.mark.parametrize("tile", PRODUCT_TILES)
def test_products_in_unusual_tiles_are_exact(tile, force):
    device, (shape, layer), value = PRODUCT_TILES[tile]
    force(product=most(value))
    one, two = np.random.default_rng(0).integers(-2, 3, (2, *shape)).astype(np.float64)
    got, want = (
        engine.cost(one, two, layer, "float32")
        for engine in (host.host_engine(device, order="shuffled"), verify.definition())
    )
    assert verify.difference(got, want) is None


@pytest.mark.parametrize("tile", GRADIENT_TILES)
def test_gradients_in_unusual_tiles_are_exact(tile, force):
    device, (shape, layer), value = GRADIENT_TILES[tile]
    force(gradient=most(value))
    rng = np.random.default_rng(0)
    shapes = layer.geometry.cost_shape(shape), shape, shape
    arrays = [rng.integers(-2, 3, size).astype(np.float64) for size in shapes]
    got, want = (
        engine.grads(*arrays, layer, "float32")
        for engine in (host.host_engine(device, order="shuffled"), verify.definition())
    )
    assert differences(got, want) == [None, None]


@pytest.mark.parametrize("seed", range(6))
def test_tiles_taken_at_random_are_exact(seed, force):
    choose = random.Random(seed).choice
    force(*2 * [lambda tiles: choose(tiles) if tiles else None])
    case = TILED[choose([*MIXED, "window at the border", "stride 6, dilation_patch 4"])]
    compare_with_the_definition(choose([SM_75, SM_80, SM_90]), *case)


# ---- sanitizers

UNDER_SANITIZERS = """
import sys
import host, test_host
for case, device, dtype, plain, similarity in {runs}:
    engine = host.host_engine(host.DEVICES[device], mode="sanitize", plain=plain)
    test_host.results(engine, *test_host.summing(similarity, case), dtype)
"""


def summing(similarity, case):
    """Return a tiled case that sums products or absolute differences."""
    return l1(TILED[case]) if similarity == "l1" else TILED[case]


SANITIZED = [
    ("even patch, dilated", "sm_80", "float32", False, "product"),
    ("everything differs per axis", "sm_75", "float16", False, "product"),
    ("everything differs per axis", "sm_80", "float32", True, "product"),
    ("displacement beyond the map", "sm_80", "float32", False, "l1"),
    ("everything differs per axis", "sm_80", "float32", True, "l1"),
]


def run_under_sanitizers(script):
    """Run a Python script whose kernels are compiled for AddressSanitizer; return what it says."""
    library = subprocess.run(
        [host.COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("needs the compiler's libasan.so")
    here = str(Path(__file__).parent)
    environment = {
        **os.environ,
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": os.pathsep.join([here, str(host.HERE)]),
        "PYTHONMALLOC": "malloc",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stderr


@pytest.mark.slow
def test_sanitizers_find_nothing():
    for case, device, dtype, plain, similarity in SANITIZED:
        case = summing(similarity, case)
        for launch in host.launches(*case, dtype, DEVICES[device], plain=plain):
            host.compiled(launch, "sanitize")  # the compiler itself is not to run under them
    assert run_under_sanitizers(UNDER_SANITIZERS.format(runs=SANITIZED)) == (0, "")
