"""The CUDA engine on real CuPy arrays, on whatever CUDA device is there."""

import math
import os
import subprocess
import sys
import types

import definition
import frames
import host
import numpy as np
import pytest
from cases import CASES, GEOMETRIES, l1

import cupycorr
from cupycorr import Geometry, verify
from cupycorr.layer import Layer

pytestmark = pytest.mark.gpu

# Pass through every kernel, with windows, strides and phases.
FEW = [
    "FlowNetC",
    "patch in one row",
    "stride not dividing dilation_patch",
    "everything differs per axis",
    "window at the border",
]
PATCH = Geometry(patch_size=3)


@pytest.fixture(scope="module", autouse=True)
def tiled():
    """Plan tiles for the small maps of these tests, too, for which plain kernels would be taken."""
    pytest.importorskip("cupy")
    from cupycorr.cuda import engine as cuda_engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cupycorr.cuda.plain.cycles", lambda *problem: float("inf"))
        cuda_engine._prepared.cache_clear()
        yield
    cuda_engine._prepared.cache_clear()


@pytest.fixture
def cp():
    return pytest.importorskip("cupy")


def assert_passes(engine, shape, layer, dtype):
    failures = {
        check.name: check.error
        for check in verify.check(engine, shape, layer, dtype)
        if check.error
    }
    assert not failures


def maps(rng, shape=(2, 3, 6, 8), dtype="float32"):
    return [rng.integers(-2, 3, shape).astype(dtype) for _ in range(2)]


def assert_same(got, want):
    assert verify.difference(got.get().astype(np.float64), want.astype(np.float64)) is None


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_computed_right(name):
    assert_passes(verify.cupy_engine(), *CASES[name], "float32")


@pytest.mark.parametrize("name", CASES)
def test_the_plain_kernels_compute_every_case_right(name):
    assert_passes(verify.cupy_engine(plain=True), *CASES[name], "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", FEW)
def test_every_dtype_is_computed_right(name, dtype):
    assert_passes(verify.cupy_engine(), *CASES[name], dtype)


def cost_of_channels_last(fmap1, fmap2, layer, dtype):
    """Return the cost volume of maps that lie in memory as (N, H, W, C); values are float64."""
    cp = pytest.importorskip("cupy")
    from cupycorr.cuda import engine as cuda_engine

    one, two = (
        cp.asarray(np.ascontiguousarray(fmap.transpose(0, 2, 3, 1)).astype(host.storage(dtype)))
        .transpose(0, 3, 1, 2) for fmap in (fmap1, fmap2)
    )  # fmt: skip
    cost = cp.empty(layer.geometry.cost_shape(one.shape), one.dtype)
    arrays = {"fmap1": one, "fmap2": two, "cost": cost}
    cuda_engine.run("cost", arrays, layer, channels_last=True)
    return cost.get().astype(np.float64)


def grads_of(grad, fmap1, fmap2, layer, dtype, *, apart=False, tf32=False):
    """Return the gradients of maps whose channels lie side by side, or ``apart``, as theirs do."""
    cp = pytest.importorskip("cupy")
    kind, axis = host.storage(dtype), 1 if apart else 3  # of channels in memory
    there = [
        cp.moveaxis(cp.asarray(np.moveaxis(fmap, 1, axis).astype(kind, order="C")), axis, 1)
        for fmap in (fmap1, fmap2)
    ]
    grads = cupycorr.correlation_vjp(
        cp.asarray(grad.astype(kind)), *there, layer.geometry, normalize=layer.normalize,
        allow_tf32=tf32,
    )  # fmt: skip
    assert all(cp.moveaxis(one, 1, axis).flags.c_contiguous for one in grads)
    return [one.get().astype(np.float64) for one in grads]


def assert_gradients_are_exact(shape, layer, dtype, special=(), **how):
    """Compare gradients of small integers, and of some special values, with an oracle's."""
    rng = np.random.default_rng(0)
    sizes = layer.geometry.cost_shape(shape), shape, shape
    given = [rng.integers(-2, 3, size).astype(np.float64) for size in sizes]
    for array in given:
        array.flat[rng.choice(array.size, len(special), replace=False)] = special
    wanted = verify.numpy_engine().grads(*given, layer, "float64")
    for got, want in zip(grads_of(*given, layer, dtype, **how), wanted, strict=True):
        assert verify.difference(got, verify.round_to(want, dtype)) is None


def assert_integers_are_exact(cost_of, shape, layer, dtype, special=()):
    """Compare a cost volume of small integers, and of some special values, with an oracle's."""
    rng = np.random.default_rng(0)
    fmap1, fmap2 = rng.integers(-2, 3, (2, *shape)).astype(np.float64)
    for fmap in (fmap1, fmap2):
        fmap.flat[rng.choice(fmap.size, len(special), replace=False)] = special
    want = verify.numpy_engine().cost(fmap1, fmap2, layer, "float64")
    got = cost_of(fmap1, fmap2, layer, dtype)
    assert verify.difference(got, verify.round_to(want, dtype)) is None


@pytest.mark.parametrize("channels", [None, 24], ids=["few channels", "24 channels"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_maps_with_channels_last_are_computed_right(name, dtype, channels):
    (samples, given, *size), layer = CASES[name]
    shape = (samples, given if channels is None else channels, *size)
    assert_integers_are_exact(cost_of_channels_last, shape, layer, dtype)


@pytest.mark.parametrize("channels", [None, 24], ids=["few channels", "24 channels"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in CASES if 0 not in CASES[name][0]])
def test_gradients_of_maps_with_channels_last_are_computed_right(name, dtype, channels):
    (samples, given, *size), layer = CASES[name]
    shape = (samples, given if channels is None else channels, *size)
    assert_gradients_are_exact(shape, layer, dtype)


@pytest.fixture(params=["turned first", "as they lie"])
def contiguous(request, monkeypatch):
    """Compute contiguous maps on tensor cores, turned or not, whatever the model says."""
    from cupycorr.cuda import engine as cuda_engine
    from cupycorr.cuda import plan, tensor, tensor_adjoint

    cycles = -math.inf if request.param == "turned first" else math.inf
    for module in (tensor, tensor_adjoint):
        monkeypatch.setattr(module, "turning_cycles", lambda *_: cycles)
    monkeypatch.setattr(plan, "_cycles", lambda _: math.inf)
    cuda_engine._prepared.cache_clear()
    yield
    cuda_engine._prepared.cache_clear()


@pytest.mark.usefixtures("contiguous")
@pytest.mark.parametrize("shape", [(2, 32, 16, 24), (1, 67, 9, 13), (1, 40, 9, 28)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_contiguous_maps_are_computed_right_on_tensor_cores(dtype, shape):
    for name in ("FlowNetC", "window at the border", "stride", "even patch, dilated"):
        assert_integers_are_exact(verify.cupy_engine().cost, shape, CASES[name][1], dtype)
        assert_gradients_are_exact(shape, CASES[name][1], dtype, apart=True)


@pytest.mark.usefixtures("contiguous")
@pytest.mark.parametrize("shape", [(2, 32, 16, 24), (1, 67, 9, 13)], ids=str)
def test_gradients_of_contiguous_maps_in_tf32_are_computed_right(shape):
    for name in ("FlowNetC", "window at the border", "stride", "even patch, dilated"):
        assert_gradients_are_exact(shape, CASES[name][1], "float32", apart=True, tf32=True)


@pytest.mark.parametrize("channels", [24, 19])
@pytest.mark.parametrize("name", FEW)
def test_gradients_in_tf32_are_computed_right(name, channels):
    (samples, _, *size), layer = CASES[name]
    special = np.nan, np.inf, -np.inf, np.nan, np.inf
    for values in ((), special):
        assert_gradients_are_exact((samples, channels, *size), layer, "float32", values, tf32=True)


@pytest.mark.usefixtures("contiguous")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["window", "window at the border"])
def test_gradients_of_several_taps_keep_to_the_bound_on_tensor_cores(name, dtype):
    (samples, _, *size), layer = CASES[name]
    assert_passes(verify.cupy_engine(), (samples, 24, *size), layer, dtype)


@pytest.mark.usefixtures("contiguous")
@pytest.mark.parametrize("name", ["FlowNetC", "negative padding", "stride"])
def test_what_is_not_finite_in_contiguous_maps_reaches_no_other_output(name):
    (samples, _, *size), layer = CASES[name]
    special = np.nan, np.inf, -np.inf, np.nan, np.inf
    shape = samples, 19, *size
    assert_integers_are_exact(verify.cupy_engine().cost, shape, layer, "float16", special)
    assert_gradients_are_exact(shape, layer, "float16", special, apart=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_dtypes_with_channels_last_are_computed_right(dtype):
    assert_integers_are_exact(cost_of_channels_last, *CASES["FlowNetC"], dtype)
    assert_gradients_are_exact(*CASES["FlowNetC"], dtype)


@pytest.mark.parametrize("name", ["FlowNetC", "window", "negative padding", "stride"])
def test_what_is_not_finite_reaches_no_other_output_on_tensor_cores(name):
    (samples, _, *size), layer = CASES[name]
    special = np.nan, np.inf, -np.inf, np.nan, np.inf
    for channels in (24, 19):
        shape = samples, channels, *size
        assert_integers_are_exact(cost_of_channels_last, shape, layer, "float16", special)
        assert_gradients_are_exact(shape, layer, "float16", special)


@pytest.mark.parametrize(("allow_tf32", "product"), [(False, 1 + 2.0**-12), (True, 1)])
def test_maps_are_rounded_to_tf32_where_that_is_allowed(cp, allow_tf32, product):
    pixels = cp.full((1, 6, 20, 8), 1 + 2.0**-12, cp.float32)
    one, two = (fmap.transpose(0, 3, 1, 2) for fmap in (pixels, cp.ones_like(pixels)))
    cost = cupycorr.correlation(one, two, Geometry(), allow_tf32=allow_tf32)
    assert (cost.get() == 8 * product).all()


@pytest.mark.parametrize(("allow_tf32", "product"), [(False, 1 + 2.0**-12), (True, 1)])
def test_gradients_are_rounded_to_tf32_where_that_is_allowed(allow_tf32, product):
    shape, cost_shape = (1, 8, 6, 20), (1, 1, 1, 6, 20)
    fine = 1 + 2.0**-12
    for factors, wanted in (
        ((fine, 1, 1), (product, product)),
        ((1, fine, 1), (1, product)),  # a gradient does not depend on its own map
        ((1, 1, fine), (product, 1)),
    ):
        sizes = cost_shape, shape, shape
        given = [np.full(size, factor) for size, factor in zip(sizes, factors, strict=True)]
        found = grads_of(*given, Layer(Geometry()), "float32", tf32=allow_tf32)
        for got, want in zip(found, wanted, strict=True):
            assert (got == want).all()


@pytest.mark.usefixtures("contiguous")
@pytest.mark.parametrize(("allow_tf32", "product"), [(False, 1 + 2.0**-12), (True, 1)])
def test_gradients_of_groups_are_rounded_to_tf32_where_that_is_allowed(cp, allow_tf32, product):
    fmap = cp.ones((1, 16, 6, 20), cp.float32)
    grad = cp.full((1, 2, 1, 1, 6, 20), 1 + 2.0**-12, cp.float32)
    for got in cupycorr.correlation_vjp(
        grad, fmap, fmap, Geometry(), groups=2, allow_tf32=allow_tf32
    ):
        assert (got.get() == product).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_plain_kernels_compute_every_dtype_right(dtype):
    assert_passes(verify.cupy_engine(plain=True), *CASES[FEW[-1]], dtype)


@pytest.mark.parametrize("name", ["FlowNetC", FEW[-1], "displacement beyond the map"])
def test_absolute_differences_are_computed_right(name):
    assert_passes(verify.cupy_engine(), *l1(CASES[name]), "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_absolute_differences_are_computed_right_in_every_dtype(dtype):
    assert_passes(verify.cupy_engine(), *l1(CASES[FEW[-2]]), dtype)


def test_the_plain_kernels_compute_absolute_differences_right():
    assert_passes(verify.cupy_engine(plain=True), *l1(CASES[FEW[-2]]), "float32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_the_tangent_of_absolute_differences_is_computed_right(cp, rng, dtype):
    from cupycorr.cuda import engine as cuda_engine

    shape, geometry = GEOMETRIES[FEW[-2]]
    arrays = rng.integers(-2, 3, (4, *shape)).astype(dtype)
    tangent = cp.empty(geometry.cost_shape(shape), dtype)
    names = "fmap1", "fmap2", "tangent1", "tangent2"
    given = dict(zip(names, map(cp.asarray, arrays), strict=True))
    cuda_engine.run("tangent", given | {"cost": tangent}, Layer(geometry, "l1"))
    assert_same(tangent, definition.differences_tangent(*arrays.astype(float), geometry))


def test_the_tangent_of_no_channels_is_zero(cp):
    from cupycorr.cuda import engine as cuda_engine

    one = cp.empty((2, 0, 5, 6), cp.float32)
    tangent = cp.ones(PATCH.cost_shape(one.shape), cp.float32)
    given = dict.fromkeys(("fmap1", "fmap2", "tangent1", "tangent2"), one)
    cuda_engine.run("tangent", given | {"cost": tangent}, Layer(PATCH, "l1"))
    assert not tangent.get().any()


def test_warming_up_compiles_what_absolute_differences_need(cp, rng, monkeypatch):
    from cupycorr.cuda import engine as cuda_engine

    one, two = map(cp.asarray, maps(rng))
    geometry = Geometry(patch_size=(3, 2))
    assert cuda_engine.warm_up(Layer(geometry, "l1"), one.shape, "float32")
    monkeypatch.setattr(cuda_engine, "_compile", lambda launch: pytest.fail(launch.kernel))
    cost = cupycorr.correlation(one, two, geometry, similarity="l1")
    cupycorr.correlation_vjp(cost, one, two, geometry, similarity="l1")


def test_results_are_contiguous_cupy_arrays_of_the_maps_dtype_and_device(cp, rng):
    one, two = map(cp.asarray, maps(rng, dtype="float16"))
    cost = cupycorr.spatial_correlation_sample(one, two, patch_size=3)
    grads = cupycorr.correlation_vjp(cost, one, two, PATCH)
    for array, shape in ((cost, (2, 3, 3, 6, 8)), (grads[0], one.shape), (grads[1], one.shape)):
        assert isinstance(array, cp.ndarray)
        assert (array.shape, array.dtype, array.device) == (shape, one.dtype, one.device)
        assert array.flags.c_contiguous


def test_arrays_of_any_strides_are_accepted(cp, rng):
    one, two = maps(rng)
    want = cupycorr.correlation(one, two, PATCH)
    grad = np.float32(2)
    strided = cp.asarray(one.transpose(3, 2, 1, 0).copy()).transpose(3, 2, 1, 0)
    reversed_twice = cp.asarray(two[:, :, ::-1].copy())[:, :, ::-1]
    assert_same(cupycorr.correlation(strided, reversed_twice, PATCH), want)
    expanded = cp.broadcast_to(cp.asarray(grad), want.shape)
    got = cupycorr.correlation_vjp(expanded, strided, reversed_twice, PATCH)
    wanted = cupycorr.correlation_vjp(np.full(want.shape, grad), one, two, PATCH)
    for a, b in zip(got, wanted, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_storage_may_begin_anywhere(cp, rng, dtype):
    one, two = maps(rng, (2, 4, 8, 16), dtype)
    shifted = []
    for array in (one, two):
        storage = cp.zeros(array.size + 1, dtype)
        storage[1:] = cp.asarray(array).ravel()
        shifted.append(storage[1:].reshape(array.shape))
    assert shifted[0].data.ptr % 16 == shifted[0].itemsize
    want = cupycorr.correlation(one, two, PATCH)
    assert_same(cupycorr.correlation(*shifted, PATCH), want)
    grads = cupycorr.correlation_vjp(cp.asarray(want), *shifted, PATCH)
    for a, b in zip(grads, cupycorr.correlation_vjp(want, one, two, PATCH), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_needed_are_computed(cp, rng, needs):
    one, two = map(cp.asarray, maps(rng))
    cost = cupycorr.correlation(one, two, PATCH)
    grads = cupycorr.correlation_vjp(cost, one, two, PATCH, needs=needs)
    assert tuple(grad is not None for grad in grads) == needs


def test_needs_may_be_an_iterator_of_two(cp, rng):
    one, two = map(cp.asarray, maps(rng))
    cost = cupycorr.correlation(one, two, PATCH)
    grads = cupycorr.correlation_vjp(cost, one, two, PATCH, needs=iter((True, False)))
    assert [grad is None for grad in grads] == [False, True]


@pytest.mark.parametrize("shape", [(0, 3, 6, 8), (2, 0, 6, 8)], ids=["no samples", "no channels"])
def test_empty_maps_give_zeros(cp, shape):
    one = cp.zeros(shape, cp.float32)
    geometry = Geometry(3, 3, padding=1)
    cost = cupycorr.correlation(one, one, geometry)
    assert cost.shape == geometry.cost_shape(shape)
    assert not cost.get().any()
    assert cupycorr.correlation_vjp(cost, one, one, geometry)[0].shape == shape


def test_a_batch_may_exceed_every_limit_of_a_grid_but_the_first(cp, rng):
    one, two = maps(rng, (65537, 1, 2, 2))
    assert_same(cupycorr.correlation(cp.asarray(one), cp.asarray(two), PATCH),
                cupycorr.correlation(one, two, PATCH))  # fmt: skip


def test_more_than_2_to_the_31_elements_are_indexed_right(cp):
    if cp.cuda.runtime.memGetInfo()[0] < 8e9:
        pytest.skip("needs 8 GB of free memory on the device")
    from cupycorr.cuda import engine as cuda_engine

    shape, step = (3, 1, 27000, 27000), 5000
    fmap = cp.zeros(shape, cp.float16)
    n, y, x = np.ogrid[:3, :6, :6]
    values = n + y + x
    fmap[:, 0, ::step, ::step] = cp.asarray(values, cp.float16)
    geometry = Geometry(stride=step)
    cost = cp.empty(geometry.cost_shape(shape), fmap.dtype)
    for plain in (True, False):
        cost.fill(0)
        arrays = {"fmap1": fmap, "fmap2": fmap, "cost": cost}
        cuda_engine.run("cost", arrays, Layer(geometry), plain=plain)
        assert_same(cost[:, 0, 0], values**2.0)


def test_work_is_queued_on_the_current_stream_of_the_arrays_device(cp, rng, monkeypatch):
    from cupycorr.cuda import engine as cuda_engine

    one, two = map(cp.asarray, maps(rng))
    streams = []
    prepared = cuda_engine._prepared

    def spy(*arguments):
        streams.append(cp.cuda.get_current_stream().ptr)
        return prepared(*arguments)

    monkeypatch.setattr(cuda_engine, "_prepared", spy)
    with cp.cuda.Stream(non_blocking=True) as stream:
        cost = cupycorr.correlation(one, two, PATCH)
        stream.synchronize()
    assert streams == [stream.ptr]
    assert_same(cost, cupycorr.correlation(one.get(), two.get(), PATCH))


def test_arrays_on_another_device_are_computed_there(cp, rng):
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two devices")
    one, two = maps(rng)
    with cp.cuda.Device(1):
        there = cp.asarray(one), cp.asarray(two)
    with cp.cuda.Device(0):
        cost = cupycorr.correlation(*there, PATCH)
        grads = cupycorr.correlation_vjp(cost, *there, PATCH)
        assert cp.cuda.runtime.getDevice() == 0
    assert {array.device.id for array in (cost, *grads)} == {1}
    assert_same(cost, cupycorr.correlation(one, two, PATCH))


def test_maps_on_two_devices_are_refused(cp, rng):
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two devices")
    one, two = maps(rng)
    with cp.cuda.Device(1):
        there = cp.asarray(two)
    with pytest.raises(ValueError, match="fmap1 and fmap2 must be on one device"):
        cupycorr.correlation(cp.asarray(one), there, PATCH)


def test_the_window_volume_is_computed_in_parts_of_the_batch(cp, rng, monkeypatch):
    from cupycorr.cuda import plan as cuda_plan

    geometry = Geometry(3, 3, padding=1)
    one, two = maps(rng, (5, 2, 6, 7))
    monkeypatch.setattr(cuda_plan, "WORKSPACE_BYTES", 2 * 9 * 8 * 9 * 4)
    assert cuda_plan.samples_at_once(geometry, one.shape, "float32") == 2
    want = cupycorr.correlation(one, two, geometry)
    there = cp.asarray(one), cp.asarray(two)
    assert_same(cupycorr.correlation(*there, geometry), want)
    grads = cupycorr.correlation_vjp(cp.asarray(want), *there, geometry)
    for a, b in zip(grads, cupycorr.correlation_vjp(want, one, two, geometry), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("geometry", [
    Geometry(patch_size=5), Geometry(patch_size=5, dilation_patch=2),
    Geometry(3, 3, 2, 1, 2, 2), Geometry(patch_size=3, stride=3, padding=-2),
], ids=repr)  # fmt: skip
def test_what_is_not_finite_reaches_no_output_that_does_not_touch_it(cp, rng, geometry, value):
    one, two = maps(rng, (1, 2, 11, 12))
    one[0, 0, 0, 0] = one[0, 1, 6, 10] = two[0, 1, 10, 11] = two[0, 0, 4, 4] = value
    with np.errstate(invalid="ignore"):
        want = cupycorr.correlation(one, two, geometry)
        grad = rng.integers(-2, 3, want.shape).astype(np.float32)
        grad.flat[:: want.size // 7] = value
        wanted = cupycorr.correlation_vjp(grad, one, two, geometry)
    there = cp.asarray(one), cp.asarray(two)
    got = cupycorr.correlation(*there, geometry)
    grads = cupycorr.correlation_vjp(cp.asarray(grad), *there, geometry)
    for a, b in ((got, want), (grads[0], wanted[0]), (grads[1], wanted[1])):
        assert verify.difference(*(np.isfinite(x).astype(float) for x in (a.get(), b))) is None


def test_an_image_of_about_the_same_size_compiles_nothing(cp, monkeypatch):
    from cupycorr.cuda import engine as cuda_engine

    def arrays(height):
        return (cp.ones((1, 8, height, 64), cp.float32) for _ in range(2))

    cupycorr.correlation(*arrays(58), PATCH)
    monkeypatch.setattr(cuda_engine, "_compile", lambda launch: pytest.fail(launch.kernel))
    cupycorr.correlation(*arrays(60), PATCH)


def test_a_source_that_does_not_compile_is_the_compilers_error(cp, monkeypatch):
    from cupycorr.cuda import engine as cuda_engine

    one = cp.ones((1, 1, 4, 4), cp.float32)
    text = '#line 7 "product.cu"\nthis is not CUDA C'
    monkeypatch.setattr(cuda_engine, "source", lambda launch: text)
    monkeypatch.setattr(cuda_engine, "_functions", {})
    cuda_engine._prepared.cache_clear()
    with pytest.raises(cp.cuda.compiler.CompileException, match=r"product\.cu.*7"):
        cupycorr.correlation(one, one, PATCH)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_cache_that_cannot_be_written_costs_one_warning(tmp_path, in_memory):
    cache = tmp_path / "cache"
    program = (
        "import os\n"
        "import cupy, numpy\n"
        "import cupycorr\n"
        f"os.rmdir({str(cache)!r})\n"
        f"open({str(cache)!r}, 'w').close()\n"
        "one = cupy.asarray(numpy.ones((1, 2, 3, 4), 'f'))\n"
        "print(cupycorr.spatial_correlation_sample(one, one).get().sum())"
    )
    changes = {"CUPY_CACHE_DIR": str(cache), "CUPY_CACHE_IN_MEMORY": str(int(in_memory))}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | changes
    )
    assert (done.returncode, done.stdout.strip()) == (0, "24.0"), done.stderr
    said = done.stderr.count("set CUPY_CACHE_DIR to a folder that can be written")
    assert said == (0 if in_memory else 1), done.stderr


def test_threads_may_call_at_once(cp, rng):
    from concurrent.futures import ThreadPoolExecutor

    one, two = maps(rng)
    geometries = [Geometry(patch_size=p) for p in (1, 2, 1, 2)] * 3

    def call(geometry):
        return cupycorr.correlation(cp.asarray(one), cp.asarray(two), geometry).get()

    with ThreadPoolExecutor(4) as pool:
        for geometry, got in zip(geometries, pool.map(call, geometries), strict=True):
            want = cupycorr.correlation(one, two, geometry)
            assert verify.difference(got.astype(float), want.astype(float)) is None


@pytest.mark.parametrize("similarity", ["product", "l1"])
def test_few_functions_lie_between_a_call_and_its_launches(cp, rng, monkeypatch, similarity):
    from cupycorr.cuda import engine as cuda_engine

    stacks, load = [], cuda_engine.kernel_of

    def spied(launch):
        def function(*arguments, **options):
            stacks.append(frames.stack())
            load(launch).kernel(*arguments, **options)

        return types.SimpleNamespace(kernel=function)

    monkeypatch.setattr(cuda_engine, "kernel_of", spied)
    cuda_engine._prepared.cache_clear()
    one, two = map(cp.asarray, maps(rng))
    cost = cupycorr.correlation(one, two, PATCH, similarity=similarity)
    cupycorr.correlation_vjp(cost, one, two, PATCH, similarity=similarity)
    cuda_engine._prepared.cache_clear()
    assert len(stacks) == 3
    for names in stacks:
        assert len(names) <= 6, names
        assert len(set(names)) == len(names), names


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_channels_last_maps_are_read_where_they_lie(cp, rng, monkeypatch, dtype):
    from cupycorr.cuda import engine as cuda_engine

    given, launch = [], cuda_engine.launch

    def spy(what, shape, addresses, *arguments, **options):
        given.append((addresses["fmap1"], options["channels_last"]))
        launch(what, shape, addresses, *arguments, **options)

    monkeypatch.setattr(cuda_engine, "launch", spy)
    one, two = (np.moveaxis(fmap.astype(dtype), 1, 3).copy() for fmap in maps(rng))
    there = [cp.moveaxis(cp.asarray(fmap), 3, 1) for fmap in (one, two)]
    cost = cupycorr.correlation(*there, PATCH)
    grads = cupycorr.correlation_vjp(cost, *there, PATCH)
    assert given == [(there[0].data.ptr, True)] * 2
    maps_here = [fmap.get() for fmap in there]
    assert_same(cost, cupycorr.correlation(*maps_here, PATCH))
    wanted = cupycorr.correlation_vjp(cost.get(), *maps_here, PATCH)
    for got, want in zip(grads, wanted, strict=True):
        assert_same(got, want)
        assert cp.moveaxis(got, 1, 3).flags.c_contiguous


STARTED_TOGETHER = """
import pathlib, sys, time
import cupy
from cupy.cuda import compiler
import cupycorr
compile, folder = compiler._compile_using_nvrtc_no_warning, pathlib.Path(sys.argv[1])
def counted(source, *arguments, **options):
    if "product_cost" in source or "plain_cost" in source:
        with (folder / "compiled").open("a") as file:
            file.write(f"{sys.argv[2]}\\n")
        time.sleep(1)
    return compile(source, *arguments, **options)
compiler._compile_using_nvrtc_no_warning = counted
(folder / f"ready{sys.argv[2]}").touch()
while len(list(folder.glob("ready*"))) < 3:
    time.sleep(0.01)
fmap = cupy.ones((1, 2, 6, 8), "float32")
print(cupycorr.correlation(fmap, fmap, cupycorr.Geometry(patch_size=3)).sum())
"""


def test_processes_that_start_together_compile_once(cp, tmp_path):
    environment = os.environ | {"CUPY_CACHE_DIR": str(tmp_path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", STARTED_TOGETHER, str(tmp_path), str(number)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for number in range(3)
    ]  # fmt: skip
    said = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(said) == 1
    assert len((tmp_path / "compiled").read_text().split()) == 1
