"""What arrays the NumPy functions take, and what they leave alone: inputs, memory, threads."""

import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from cases import GEOMETRIES

import cupycorr
from cupycorr import Geometry, verify
from cupycorr.cpu import threads as parallel

MIB = 1 << 20
SCRATCH = 64 * MIB
"""What the engine may allocate beyond its results and one sample's two maps in float32."""


class Subclass(np.ndarray):
    """An array type that is not NumPy's own."""


def transposed(array):
    return np.ascontiguousarray(array.transpose(3, 1, 0, 2)).transpose(2, 1, 3, 0)


def reversed_in_memory(array):
    return np.ascontiguousarray(array[:, ::-1, ::-1, ::-1])[:, ::-1, ::-1, ::-1]


def every_other_element(array):
    wide = np.zeros((*array.shape[:-2], 2 * array.shape[-2], 3 * array.shape[-1]), array.dtype)
    wide[..., 1::2, 2::3] = array
    return wide[..., 1::2, 2::3]


def offset_by_one_byte(array):
    buffer = np.zeros(array.nbytes + 1, np.uint8)
    unaligned = buffer[1:].view(array.dtype).reshape(array.shape)
    unaligned[...] = array
    return unaligned


def read_only(array):
    array = array.copy()
    array.setflags(write=False)
    return array


def big_endian(array):
    return array.astype(array.dtype.newbyteorder(">"))


def subclass(array):
    return array.view(Subclass)


LAYOUTS = [transposed, np.asfortranarray, reversed_in_memory, every_other_element,
           offset_by_one_byte, read_only, big_endian, subclass]  # fmt: skip
LAID_OUT = {
    "window": GEOMETRIES["window"],
    "strides": GEOMETRIES["everything differs per axis"],
    "tiles": ((1, 40, 16, 30), Geometry(patch_size=(5, 9))),
    "one channel": GEOMETRIES["one channel"],
}


def integers(rng, shape, dtype="float32"):
    return rng.integers(-2, 3, shape).astype(dtype)


def maps(rng, shape, geometry, dtype="float32"):
    """Return (grad_cost, fmap1, fmap2) of small integers."""
    return [integers(rng, s, dtype) for s in (geometry.cost_shape(shape), shape, shape)]


def all_results(arrays, geometry):
    grad, fmap1, fmap2 = arrays
    cost = cupycorr.correlation(fmap1, fmap2, geometry)
    return (cost, *cupycorr.correlation_vjp(grad, fmap1, fmap2, geometry))


def first_difference(got, want):
    as_float64 = ([a.astype(np.float64) for a in results] for results in (got, want))
    found = (verify.difference(*both) for both in zip(*as_float64, strict=True))
    return next((error for error in found if error), None)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", LAID_OUT)
@pytest.mark.parametrize("lay_out", LAYOUTS)
def test_results_do_not_depend_on_the_layout_of_the_maps(lay_out, name, dtype, rng):
    shape, geometry = LAID_OUT[name]
    grad, fmap1, fmap2 = maps(rng, shape, geometry, dtype)
    got = all_results((grad, lay_out(fmap1), lay_out(fmap2)), geometry)
    assert not first_difference(got, all_results((grad, fmap1, fmap2), geometry))


@pytest.mark.parametrize("name", LAID_OUT)
@pytest.mark.parametrize(
    "lay_out", [np.asfortranarray, every_other_element, read_only, big_endian, subclass]
)
def test_gradients_do_not_depend_on_the_layout_of_the_upstream(lay_out, name, rng):
    shape, geometry = LAID_OUT[name]
    grad, fmap1, fmap2 = maps(rng, shape, geometry)
    got = cupycorr.correlation_vjp(lay_out(grad), fmap1, fmap2, geometry)
    assert not first_difference(got, cupycorr.correlation_vjp(grad, fmap1, fmap2, geometry))


@pytest.mark.parametrize("name", LAID_OUT)
def test_broadcast_maps_and_upstream_count_as_if_copied(name, rng):
    shape, geometry = LAID_OUT[name]
    arrays = [
        np.broadcast_to(integers(rng, (s[0], *(1 for _ in s[1:-1]), s[-1])), s)
        for s in (geometry.cost_shape(shape), shape, shape)
    ]
    want = all_results([np.array(a) for a in arrays], geometry)
    assert not first_difference(all_results(arrays, geometry), want)


def test_one_map_may_be_both(rng):
    shape, geometry = LAID_OUT["tiles"]
    fmap = integers(rng, shape)
    got = cupycorr.correlation(fmap, fmap, geometry)
    want = cupycorr.correlation(fmap, fmap.copy(), geometry)
    assert not first_difference([got], [want])


def test_maps_may_differ_in_byte_order(rng):
    shape, geometry = LAID_OUT["window"]
    _, fmap1, fmap2 = maps(rng, shape, geometry)
    got = cupycorr.correlation(big_endian(fmap1), fmap2, geometry)
    assert not first_difference([got], [cupycorr.correlation(fmap1, fmap2, geometry)])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ml_dtypes.bfloat16])
@pytest.mark.parametrize("lay_out", LAYOUTS)
def test_results_are_plain_contiguous_native_arrays(lay_out, dtype, rng):
    shape, geometry = LAID_OUT["window"]
    grad, *both = maps(rng, shape, geometry, dtype)
    results = all_results([grad, *map(lay_out, both)], geometry)
    for result in results:
        assert type(result) is np.ndarray
        assert result.flags.c_contiguous
        assert result.dtype == np.dtype(dtype)


@pytest.mark.parametrize("name", LAID_OUT)
def test_inputs_are_never_written_to(name, rng):
    shape, geometry = LAID_OUT[name]
    arrays = maps(rng, shape, geometry)
    before = [array.copy() for array in arrays]
    all_results(arrays, geometry)
    assert not first_difference(arrays, before)


@pytest.mark.parametrize("name", LAID_OUT)
def test_results_share_no_memory_with_inputs(name, rng):
    shape, geometry = LAID_OUT[name]
    arrays = maps(rng, shape, geometry)
    results = all_results(arrays, geometry)
    assert not any(np.shares_memory(one, other) for one in results for other in arrays)


def test_calls_from_several_threads_do_not_disturb_each_other(rng):
    cases = [LAID_OUT["tiles"], ((1, 48, 40, 40), Geometry(3, 9, padding=1)), LAID_OUT["window"]]
    tasks = [(maps(rng, shape, geometry), geometry) for shape, geometry in cases * 2]
    want = [all_results(*task) for task in tasks]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda task: all_results(*task), tasks * 3))
    found = [first_difference(*both) for both in zip(got, want * 3, strict=True)]
    assert found == [None] * len(found)


FORK = """
import os, sys
import numpy as np
import cupycorr

geometry = cupycorr.Geometry(3, 9, padding=1)
fmap = np.random.default_rng(0).integers(-2, 3, (1, 48, 40, 40)).astype(np.float32)

def results():
    cost = cupycorr.correlation(fmap, fmap, geometry)
    return [a.tobytes() for a in (cost, *cupycorr.correlation_vjp(cost, fmap, fmap, geometry))]

want = results()
child = os.fork()
if child == 0:
    os._exit(0 if results() == want else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs os.fork")
def test_child_process_after_fork_computes_the_same():
    # The time limit only turns a deadlock into a failure.
    done = subprocess.run([sys.executable, "-c", FORK], timeout=60, check=False)
    assert done.returncode == 0


# Memory.

HEAVY = {
    "PWC-Net": ((8, 64, 64, 80), Geometry(patch_size=9)),
    "FlowNetC": ((8, 96, 40, 48), Geometry(patch_size=21, dilation_patch=2)),
    "dense window": ((8, 64, 48, 48), Geometry(3, 9, padding=1)),
    "windows far apart": ((8, 96, 80, 80), Geometry(2, 5, stride=8)),
}


def peak_beyond_results(function, *arguments):
    """Return how many bytes were allocated at once, less those of the results."""
    parallel.release_scratch()
    tracemalloc.start()
    try:
        results = function(*arguments)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    arrays = results if isinstance(results, tuple) else (results,)
    return peak - sum(array.nbytes for array in arrays)


def allowed(shape):
    _, channels, height, width = shape
    return 2 * channels * height * width * np.dtype(np.float32).itemsize + SCRATCH


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", HEAVY)
def test_scratch_memory_of_the_cost_volume_is_bounded_for_any_batch(name, dtype, batch, rng):
    (_, *rest), geometry = HEAVY[name]
    fmap = integers(rng, (batch, *rest), dtype)
    assert peak_beyond_results(cupycorr.correlation, fmap, fmap, geometry) < allowed(fmap.shape)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", HEAVY)
def test_scratch_memory_of_the_gradients_is_bounded_for_any_batch(name, dtype, batch, rng):
    (_, *rest), geometry = HEAVY[name]
    grad, fmap1, fmap2 = maps(rng, (batch, *rest), geometry, dtype)
    peak = peak_beyond_results(cupycorr.correlation_vjp, grad, fmap1, fmap2, geometry)
    assert peak < allowed(fmap1.shape)


def test_memory_kept_for_the_next_call_is_bounded(rng):
    parallel.release_scratch()
    (_, *rest), geometry = HEAVY["FlowNetC"]
    grad, fmap1, fmap2 = maps(rng, (1, *rest), geometry, "float32")
    tracemalloc.start()
    try:
        cupycorr.correlation_vjp(grad, fmap1, fmap2, geometry)
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 1.01 * parallel.RETAINED_BYTES


def test_memory_of_earlier_calls_does_not_show_in_later_ones(rng):
    shape, geometry = (2, 24, 17, 19), Geometry(patch_size=(5, 7))
    grad, fmap1, fmap2 = maps(rng, shape, geometry, "float32")

    def results():
        cost = cupycorr.correlation(fmap1, fmap2, geometry)
        return (cost, *cupycorr.correlation_vjp(grad, fmap1, fmap2, geometry))

    parallel.release_scratch()
    first = results()
    for other in (Geometry(patch_size=(5, 5)), Geometry(3, (7, 5), padding=1)):
        upstream, *others = maps(rng, shape, other, "float32")
        cupycorr.correlation_vjp(upstream, *others, other)
        for got, want in zip(results(), first, strict=True):
            assert verify.difference(got, want) is None
