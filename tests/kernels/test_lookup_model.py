"""What tiles of the flow-guided lookup do: counted as they run, and as kernels/README.md says."""

import ctypes
import re
from math import prod
from pathlib import Path

import host
import lookup_host
import numpy as np
import pytest
from devices import DEVICES
from host import SM_75, SM_80
from kernel_costs import FIGURES

from cupycorr.cuda import lookup_tiles
from cupycorr.layer import DTYPES
from cupycorr.lookup import Lookup

PAGE = (Path(__file__).resolve().parents[2] / "kernels" / "README.md").read_text(encoding="utf-8")
RAFT = Lookup(4, 4)
CHANNELS, ITERATIONS = 256, 12
SIZES = {"Sintel": (55, 128), "1080p": (135, 240)}
SHOWN = ("A100", "H100", "4090")
DRAM_SHARE = 0.85  # of its rate, at most

# A counter in the kernel: multiply-adds of all threads, of all steps that they take.
COUNTED = (
    "template <int count>\n__device__ __forceinline__ void multiply_chunk",
    'extern "C" __attribute__((visibility("default"))) long counted;\nlong counted;\n'
    "template <int count>\n__device__ __forceinline__ void multiply_chunk",
    "    multiply_chunk<count>(buffer",
    "    counted += count * 8 * units * unit_elements;\n    multiply_chunk<count>(buffer",
)


def model(size, dtype, gpu, lookup=RAFT):
    return lookup_tiles.tile(lookup, 1, CHANNELS, size, dtype, DEVICES[gpu])


def multiply_adds(lookup, tensor, size=(135, 240)):
    """Return the multiply-adds per channel, position and level, where flow is constant."""
    shape = lookup_tiles._shape(lookup, size, tensor)
    steps = [lookup_tiles._level_steps(lookup, shape, level) for level in range(lookup.levels)]
    return lookup_tiles.STEP_CELLS * sum(steps) / lookup.levels


@pytest.mark.skipif(host.unavailable() is not None, reason=str(host.unavailable()))
@pytest.mark.parametrize("tensor", [False, True], ids=["FMA units", "tensor cores"])
def test_tiles_multiply_as_often_as_the_model_says(tensor):
    lookup, channels = Lookup(4, 3), 32
    flows = np.indices((4, 4)).reshape(2, -1).T + 0.5  # every phase of the coarsest level
    y, x = np.mgrid[:8, :16] + 20.0
    coords = np.stack([x, y])[None] + flows[:, :, None, None]
    indices = {name: np.zeros(len(flows), np.int64) for name in ("index1", "index2")}
    fmap1 = np.ones((1, channels, 8, 16))
    levels = [np.ones((1, channels, 64 >> level, 64 >> level)) for level in range(3)]
    launched = []

    def planned(plan):
        launched.append(plan.launches[-1])
        return plan

    device, dtype = (SM_80, "float16") if tensor else (SM_75, "float32")
    lookup_host.cost(
        device, fmap1, levels, coords, lookup, 1.0, dtype, **indices, patch=COUNTED, planned=planned
    )
    library = host.build(launched[0], "run", COUNTED)
    counted = ctypes.c_long.in_dll(library, "counted").value
    got = counted / (len(flows) * 3 * fmap1.size)
    assert got == pytest.approx(multiply_adds(lookup, tensor), rel=1e-12)


def test_few_products_are_not_needed():
    assert multiply_adds(RAFT, tensor=False) <= 1.25 * 100
    assert multiply_adds(RAFT, tensor=True) <= 1.4 * 100
    # Interpolation before the sums takes a product for each output and four for each vector.
    assert 3 * multiply_adds(RAFT, tensor=False) < 5 * prod(RAFT.patch_size)


def moved(size, dtype):
    """Return the bytes of all arrays of a lookup, each once."""
    cells = sum(map(prod, RAFT.level_sizes(*size)))
    outputs = RAFT.levels * prod(RAFT.patch_size)
    return (prod(size) * (CHANNELS + outputs) + cells * CHANNELS) * DTYPES[
        dtype
    ].itemsize + 8 * prod(size)


def microseconds(size, dtype, gpu):
    """Return the predicted time of a lookup: of the model, but no less than what DRAM allows."""
    figures = FIGURES[gpu]
    computed = model(size, dtype, gpu).cycles / (figures.gigahertz * 1e3)
    return max(computed, moved(size, dtype) / (DRAM_SHARE * figures.dram * 1e3))


def volume_microseconds(size, gpu):
    """Return the least time to multiply and write the volume of all pairs, in float32."""
    figures, device, pairs = FIGURES[gpu], DEVICES[gpu], prod(size) ** 2
    rate = device.multiprocessors * device.multiply_adds * figures.gigahertz * 1e3
    return max(pairs * CHANNELS / rate, volume_bytes(size) / (figures.dram * 1e3))


def volume_bytes(size):
    return 4 * prod(size) * sum(map(prod, RAFT.level_sizes(*size)))


def rows(head):
    """Return a table of the page: the first cells of its rows to the others."""
    lines = PAGE[PAGE.index(head) :].splitlines()[2:]
    cells = [line.strip("| ").split(" | ") for line in lines[: lines.index("")]]
    return {tuple(row[: -len(SHOWN)]): tuple(row[-len(SHOWN) :]) for row in cells}


def test_the_page_shows_what_the_model_predicts():
    shown = rows("| lookup | maps | A100 | H100 | 4090 |")
    wanted = {
        (name, dtype): tuple(f"{microseconds(size, dtype, gpu):.0f}" for gpu in SHOWN)
        for name, size in SIZES.items()
        for dtype in ("float32", "float16")
    }
    assert shown == wanted


def test_the_page_compares_with_the_volume_of_all_pairs():
    shown = rows("| 1080p, float32, milliseconds | A100 | H100 | 4090 |")
    size, wanted = SIZES["1080p"], {}
    for name, function in (
        (f"{ITERATIONS} lookups", lambda gpu: ITERATIONS * microseconds(size, "float32", gpu)),
        ("the volume alone, at least", lambda gpu: volume_microseconds(size, gpu)),
    ):
        wanted[name,] = tuple(f"{function(gpu) / 1e3:.1f}" for gpu in SHOWN)
    assert shown == wanted
    assert f"{volume_bytes(size) / 1e9:.1f} GB" in PAGE


def test_twelve_lookups_of_a_large_image_are_faster_than_its_volume():
    for gpu in SHOWN:
        taken = ITERATIONS * microseconds(SIZES["1080p"], "float32", gpu)
        assert 1.5 * taken < volume_microseconds(SIZES["1080p"], gpu)


def test_the_page_counts_multiply_adds():
    for count in (multiply_adds(RAFT, tensor=False), multiply_adds(RAFT, tensor=True)):
        assert re.search(rf"\b{count:.0f}\b", PAGE)
    assert f"{5 * prod(RAFT.patch_size)}" in PAGE


def test_small_patches_of_many_edges_are_tiled_and_double_is_not():
    patches = lookup_tiles.tile(Lookup(3, 2), 2000, 128, (3, 3), "float32", SM_80)
    assert dict(patches.constants)["tile_y"] == 4
    assert lookup_tiles.tile(RAFT, 1, 128, (55, 128), "float64", SM_80) is None
    assert lookup_tiles.tile(Lookup(60), 1, 128, (55, 128), "float32", SM_80) is None
