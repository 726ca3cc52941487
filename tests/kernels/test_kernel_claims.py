"""What the comments of the kernels claim about memory, counted from a record of every access."""

from functools import cache

import host
import numpy as np
import pytest
import test_host
from host import DEVICES, SHARED
from kernel_costs import used
from test_host import TILED

from cupycorr import Geometry
from cupycorr.cuda import plan as cuda_plan
from cupycorr.layer import Layer

pytestmark = test_host.pytestmark

SECTOR_BYTES = 32  # that global memory moves at least
CHANNELS = 48  # a multiple of every chunk: the channels of a partial one may be read again
TRACED = {
    **{case: TILED[case] for case in [*test_host.MIXED, "displacement beyond the map"]},
    "advance": ((1, 1, 21, 30), Layer(Geometry(patch_size=5, stride=2))),
    "blocks side by side": ((1, 1, 20, 70), Layer(Geometry(patch_size=(5, 9)))),
    "vectors": ((1, 1, 9, 40), Layer(Geometry(patch_size=(3, 9)))),
}
CASES = {case: ((n, CHANNELS, h, w), layer) for case, ((n, _, h, w), layer) in TRACED.items()}
EVERY_CASE = pytest.mark.parametrize("case", CASES)
EVERY_DEVICE = pytest.mark.parametrize("device", ["sm_75", "sm_80"])
EVERY_TILED = pytest.mark.parametrize("kernel", ["product_cost", "product_gradient"])
# spatial-correlation-sampler's defaults, as its benchmark runs them.
DEFAULT_LAYER = ((16, 64, 100, 100), Layer(Geometry(3, 3, 2, 1, 2, 2)))


@cache
def traces(case, device):
    """Return (launch, arrays, accesses) of every launch of a case."""
    launches = host.launches(*CASES[case], "float32", DEVICES[device])
    return [(launch, *trace(launch, *CASES[case])) for launch in launches]


def trace(launch, shape, layer, log="all"):
    """Run a launch on ones; return its arrays and the record of accesses."""
    shapes = {"fmap1": shape, "fmap2": shape, "grad_fmap1": shape, "grad_fmap2": shape}
    geometry = layer.geometry
    shapes["cost"] = shapes["grad_cost"] = geometry.cost_shape(shape)
    lattices = (axis.lattice_size(n) for axis, n in
                zip((geometry.y, geometry.x), shapes["cost"][3:], strict=True))  # fmt: skip
    shapes["volume"] = (*shapes["cost"][:3], *lattices)
    guarded = {name: host.Guarded(shapes[name], np.float32, offset=host.ALIGNED_OFFSET)
               for name in launch.arrays}  # fmt: skip
    arrays = {name: whole.array for name, whole in guarded.items()}
    for name in launch.arrays[:-1]:
        arrays[name].fill(1)
    library = host.build(launch, "trace")
    accesses = host.run(library, launch, arrays, np.float32(1), log=log)
    return [arrays[name] for name in launch.arrays], accesses


def words(accesses):
    """Return the block and the word of every word of 4 bytes that is accessed."""
    count = -(-accesses["bytes"] // 4)
    first = np.repeat(accesses["offset"] // 4 - np.cumsum(count) + count, count)
    return np.repeat(accesses["block"], count), first + np.arange(len(first))


def together(block, unit):
    """Return one number for each pair."""
    return block.astype(np.int64) << 40 | unit


def tiles(case, device, kernel):
    found = [traced for traced in traces(case, device) if traced[0].kernel == kernel]
    if not found:
        pytest.skip(f"{case} is planned without {kernel}")
    return found


@EVERY_DEVICE
@EVERY_CASE
def test_every_output_is_written_once_and_never_read(case, device):
    for _, arrays, accesses in traces(case, device):
        last = accesses[accesses["array"] == len(arrays) - 1]
        assert last["written"].all()
        written = np.bincount(words(last)[1], minlength=arrays[-1].size)
        assert (written == 1).all()


@EVERY_DEVICE
@EVERY_CASE
@EVERY_TILED
def test_a_block_reads_every_word_of_global_memory_once_at_most(kernel, case, device):
    for launch, _, accesses in tiles(case, device, kernel):
        for array, name in enumerate(launch.arrays[:-1]):
            read = together(*words(accesses[accesses["array"] == array]))
            assert len(np.unique(read)) == len(read)
            assert (len(read) > 0) == (name in used(launch))


@EVERY_DEVICE
@EVERY_CASE
@EVERY_TILED
def test_words_that_do_not_exist_are_never_stored(kernel, case, device):
    # Between clearing and storing its results, a block stores as many words as it reads; those that
    # are read with their neighbours though they do not exist it then zeroes.
    for launch, arrays, accesses in tiles(case, device, kernel):
        writes = accesses[accesses["written"] == 1]
        start = first_round(accesses)
        results = first_round(leaving(accesses), len(start)) - 1
        stored = writes[writes["array"] == SHARED]
        block = stored["block"]
        stored = stored[(stored["round"] > start[block]) & (stored["round"] < results[block])]
        read = accesses[(accesses["array"] >= 0) & (accesses["written"] == 0)]
        counts = [np.bincount(words(some)[0], minlength=len(start)) for some in (stored, read)]
        zeroed = beside(launch, arrays, read, CASES[case][1].geometry)
        counts[1] += np.bincount(zeroed, minlength=len(start))
        writing = np.unique(writes["block"][writes["array"] >= 0])
        assert np.array_equal(counts[0][writing], counts[1][writing])


def beside(launch, arrays, read, geometry):
    """Return the block of each word of grad_cost that is read though its source is beside the map.

    Of gradients of the first map that read several words at a time.
    """
    if dict(launch.constants).get("upstream_vector", 1) == 1:
        return np.empty(0, int)
    costs, width = arrays[launch.arrays.index("grad_cost")].shape, arrays[-1].shape[3]
    block, word = words(read[read["array"] == launch.arrays.index("grad_cost")])
    _, _, q, _, v = np.unravel_index(word, costs)
    x = v * geometry.stride[1] - geometry.padding[1]
    source = x + geometry.first_displacement[1] + q * geometry.dilation_patch[1]
    return block[(source < 0) | (source >= width)]


@EVERY_DEVICE
@EVERY_CASE
def test_a_thread_of_the_product_reads_its_positions_and_its_columns_once_per_channel(case, device):
    for launch, _, accesses in tiles(case, device, "product_cost"):
        tile = dict(launch.constants)
        load = 4
        columns = tile["lead"] + tile["advance_x"] * (tile["positions"] - 1) + tile["displacements"]
        per_channel = tile["positions"] + -(-columns // load) * load
        (samples, channels, *_), layer = CASES[case]
        strips = launch.blocks * tile["strips"]
        if tile["least"] < tile["patch_y"]:  # those behind the last row read nothing
            phases = cuda_plan._displaced(layer.geometry, CASES[case][0], tile["least"])
            strips = sum(end - first for rows in phases for first, end in rows) * samples
            strips *= -(-tile["patch_x"] // tile["displacements"]) * dict(launch.sizes)["blocks_x"]
        expected = strips * tile["groups"] * tile["phases_x"] * channels * per_channel
        assert vectors_read(accesses)["bytes"].sum() == 4 * expected


@EVERY_DEVICE
@EVERY_CASE
def test_a_thread_of_the_gradient_reads_upstream_once_for_all_its_channels(case, device):
    for launch, _, accesses in tiles(case, device, "product_gradient"):
        tile = dict(launch.constants)
        passes = [
            (first, min(tile["displacements"], tile["patch_x"] - first))
            for first in range(0, tile["patch_x"], tile["displacements"])
        ]
        per_row = sum(
            count * tile["positions"]
            + tile["channels"] * 4 * -(-(tile["advance_x"] * (tile["positions"] - 1) + count) // 4)
            for _, count in passes
        )
        operands = vectors_read(accesses)
        read = np.bincount(operands["block"].astype(np.int64) * 1024 + operands["thread"],
                           weights=operands["bytes"] / 4)  # fmt: skip
        assert (read % per_row == 0).all()
        assert read.max() <= per_row * tile["patch_y"]


def vectors_read(accesses):
    """Return the reads of 16 bytes of shared memory in the main loop, before results leave."""
    results = first_round(leaving(accesses), accesses["block"].max() + 1)
    return accesses[
        (accesses["array"] == SHARED) & (accesses["written"] == 0) & (accesses["bytes"] == 16)
        & (accesses["round"] < results[accesses["block"]])
    ]  # fmt: skip


def leaving(accesses):
    """Return the writes of results. Zeros for strips that are left out are written before."""
    writes = accesses[(accesses["array"] >= 0) & (accesses["written"] == 1)]
    return writes[writes["round"] > first_round(accesses)[writes["block"]] + 1]


def first_round(accesses, blocks=None):
    """Return the first round of each block's accesses; rounds lie between barriers."""
    blocks = accesses["block"].max() + 1 if blocks is None else blocks
    first = np.full(blocks, np.iinfo(np.int32).max)
    np.minimum.at(first, accesses["block"], accesses["round"])
    return first


# ---- traffic


def sectors(accesses):
    """Return how many sectors the blocks touch, each block counted by itself."""
    first = accesses["offset"] + host.ALIGNED_OFFSET
    last = first + accesses["bytes"] - 1
    touched = [np.unique(together(accesses["block"], at // SECTOR_BYTES)) for at in (first, last)]
    return len(np.union1d(*touched))


def traffic(device):
    """Return, for each launch of the default layer, {array: (bytes moved, bytes of the array)}.

    Of one sample, in the tiles of the whole batch.
    """
    (samples, *image), layer = DEFAULT_LAYER
    found = []
    whole, single = (
        host.launches((count, *image), layer, "float32", DEVICES[device]) for count in (samples, 1)
    )
    for launch, alone in zip(whole, single, strict=True):
        if launch.source == "taps.cu":
            launch = alone
        else:
            launch = launch._replace(blocks=launch.blocks // samples)
        arrays, accesses = trace(launch, (1, *image), layer, "arrays")
        moved = {}
        for i, (name, array) in enumerate(zip(launch.arrays, arrays, strict=True)):
            if name in used(launch):
                moved[name] = SECTOR_BYTES * sectors(accesses[accesses["array"] == i]), array.nbytes
        found.append((launch.kernel, moved))
    return found


@pytest.mark.parametrize("device", ["sm_75", "sm_80"])
def test_the_default_layer_moves_little_more_than_its_tensors(device):
    for kernel, moved in traffic(device):
        bytes_moved, bytes_of_arrays = (sum(column) for column in zip(*moved.values(), strict=True))
        assert bytes_moved <= 1.3 * bytes_of_arrays, (kernel, moved)
