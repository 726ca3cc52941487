"""The public functions refuse bad inputs before any work, and say what is wrong with them."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import cupycorr
from cupycorr import Geometry, api, verify
from cupycorr.cpu import engine as numpy_engine
from cupycorr.layer import DTYPES

torch = pytest.importorskip("torch")

SHAPE = (1, 2, 5, 6)
GEOMETRY = Geometry(patch_size=3)


class CupyArray:
    """What an array of CuPy looks like from outside."""

    dtype = np.dtype("float32")
    shape = SHAPE


CupyArray.__module__ = "cupy"


class Named:
    """An array of a library that is not supported."""

    dtype = np.dtype("float32")
    shape = SHAPE


def fmap(dtype="float32", shape=SHAPE):
    return np.ones(shape, dtype)


def tensor(dtype="float32", shape=SHAPE, device="cpu"):
    return torch.ones(shape, dtype=getattr(torch, dtype), device=device)


@pytest.fixture(autouse=True)
def _no_work(monkeypatch):
    """Make any work that bad inputs reach fail, in another way than a refusal does."""

    def work(*arguments, **options):
        raise AssertionError("the engine was reached")

    monkeypatch.setattr(numpy_engine, "run", work)


def refusal(function, *arguments, **options):
    """Return the exception that a call raises, as 'Kind: message'."""
    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        function(*arguments, **options)
    return f"{type(error.value).__name__}: {error.value}"


ALLOWED = "float16, bfloat16, float32 or float64"
NOT_FLOATING = ["int8", "int64", "uint16", "bool", "complex64"]


@pytest.mark.parametrize(
    "dtype", [*NOT_FLOATING, "complex128", "longdouble", "object", "datetime64[s]"]
)
def test_numpy_maps_that_are_not_floating_are_refused(dtype):
    name = np.dtype(dtype).type.__name__
    assert refusal(cupycorr.correlation, fmap(dtype), fmap(dtype), GEOMETRY) == (
        f"TypeError: fmap1 and fmap2 must have dtype {ALLOWED}, got {name}"
    )


@pytest.mark.parametrize("dtype", [*NOT_FLOATING, "float8_e4m3fn"])
def test_torch_maps_that_are_not_floating_are_refused(dtype):
    maps = (
        torch.zeros(SHAPE).to(getattr(torch, dtype)),
        torch.zeros(SHAPE).to(getattr(torch, dtype)),
    )
    assert refusal(cupycorr.correlation, *maps, GEOMETRY) == (
        f"TypeError: fmap1 and fmap2 must have dtype {ALLOWED}, got {dtype}"
    )


def test_structured_maps_are_refused():
    record = np.zeros(SHAPE, [("a", "f4")])
    assert "must have dtype" in refusal(cupycorr.correlation, record, record, GEOMETRY)


def test_float8_numpy_maps_are_refused():
    eight = fmap(ml_dtypes.float8_e4m3fn)
    message = refusal(cupycorr.correlation, eight, eight, GEOMETRY)
    assert message.endswith(f"must have dtype {ALLOWED}, got float8_e4m3fn")


@pytest.mark.parametrize("make", [fmap, tensor])
@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float16", "float32"),
                                    ("float32", "int32")])  # fmt: skip
def test_maps_of_different_dtypes_are_refused(make, dtypes):
    assert refusal(cupycorr.correlation, *map(make, dtypes), GEOMETRY) == (
        f"TypeError: fmap1 and fmap2 must have equal dtypes, got {dtypes[0]} and {dtypes[1]}"
    )


def test_16_bit_maps_of_different_formats_are_refused():
    maps = fmap("float16"), fmap(ml_dtypes.bfloat16)
    message = refusal(cupycorr.correlation, *maps, GEOMETRY)
    assert message.endswith("must have equal dtypes, got float16 and bfloat16")


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        (fmap, tensor, "numpy and torch"),
        (tensor, fmap, "torch and numpy"),
        (CupyArray, fmap, "cupy and numpy"),
    ],
)
def test_maps_of_different_libraries_are_refused(one, other, found):
    assert refusal(cupycorr.correlation, one(), other(), GEOMETRY) == (
        f"TypeError: fmap1 and fmap2 must be arrays of one library, got {found}"
    )


@pytest.mark.parametrize(
    "thing",
    [[[[[1.0]]]], None, 3, "maps", {}, object(), Named(), np.float32, np.dtype("f4"), fmap,
     memoryview(b"12")],
    ids=lambda thing: type(thing).__name__,
)  # fmt: skip
@pytest.mark.parametrize("position", [0, 1])
def test_what_is_no_array_is_refused(thing, position):
    maps = [fmap(), fmap()]
    maps[position] = thing
    assert refusal(cupycorr.correlation, *maps, GEOMETRY) == (
        f"TypeError: fmap{position + 1} must be a NumPy or CuPy array or a torch tensor, "
        f"got {type(thing).__name__}"
    )


def test_numpy_scalars_are_refused():
    assert "got float32" in refusal(cupycorr.correlation, np.float32(1), np.float32(1), GEOMETRY)


@pytest.mark.parametrize("position", [0, 1])
def test_masked_maps_are_refused_with_the_remedy(position):
    maps = [fmap(), fmap()]
    maps[position] = np.ma.masked_greater(fmap(), 2)
    message = refusal(cupycorr.correlation, *maps, GEOMETRY)
    assert message.startswith(f"TypeError: fmap{position + 1} must not be masked")
    assert message.endswith("fill it with numpy.ma.filled")


def test_cupy_maps_are_checked_before_cupy_is_imported():
    other = CupyArray()
    other.shape = (1, 3, 5, 6)
    assert refusal(cupycorr.correlation, CupyArray(), other, GEOMETRY) == (
        "ValueError: fmap1 and fmap2 must have equal shapes, got (1, 2, 5, 6) and (1, 3, 5, 6)"
    )


@pytest.mark.parametrize("make", [fmap, tensor])
@pytest.mark.parametrize("shape", [(), (5,), (5, 6), (2, 5, 6), (1, 1, 2, 5, 6)])
def test_maps_that_are_not_four_dimensional_are_refused(make, shape):
    maps = make(shape=shape), make(shape=shape)
    assert refusal(cupycorr.correlation, *maps, GEOMETRY) == (
        f"ValueError: fmap1 and fmap2 must have shape (N, C, H, W), got {shape}"
    )


@pytest.mark.parametrize("make", [fmap, tensor])
@pytest.mark.parametrize(
    "other", [(2, 2, 5, 6), (1, 3, 5, 6), (1, 2, 4, 6), (1, 2, 5, 7), (2, 5, 6)]
)
def test_maps_of_different_shapes_are_refused(make, other):
    assert refusal(cupycorr.correlation, make(), make(shape=other), GEOMETRY) == (
        f"ValueError: fmap1 and fmap2 must have equal shapes, got {SHAPE} and {other}"
    )


@pytest.mark.parametrize(("devices", "found"), [(("cpu", "meta"), "cpu and meta"),
                                                (("meta", "cpu"), "meta and cpu")])  # fmt: skip
def test_tensors_on_different_devices_are_refused(devices, found):
    maps = (tensor(device=device) for device in devices)
    assert refusal(cupycorr.correlation, *maps, GEOMETRY) == (
        f"ValueError: fmap1 and fmap2 must be on one device, got {found}"
    )


@pytest.mark.parametrize("make", [fmap, tensor])
@pytest.mark.parametrize("stride", [1, 2, 9])
def test_taps_that_do_not_fit_are_refused_at_any_stride(make, stride):
    message = refusal(cupycorr.correlation, make(), make(), Geometry(6, stride=stride))
    assert message.startswith("ValueError: the taps must fit into the padded image")


@pytest.mark.parametrize("thing", [None, 3, {"patch_size": 3}, (1, 3)])
@pytest.mark.parametrize("make", [fmap, tensor])
def test_what_is_no_geometry_is_refused(make, thing):
    assert refusal(cupycorr.correlation, make(), make(), thing) == (
        f"TypeError: geometry must be a Geometry, got {type(thing).__name__}"
    )


def test_normalize_cannot_be_given_by_position():
    assert refusal(cupycorr.correlation, fmap(), fmap(), GEOMETRY, True).startswith("TypeError")


# The interface of spatial-correlation-sampler.


@pytest.mark.parametrize("make", [fmap, tensor])
def test_sample_names_its_own_arguments(make):
    assert refusal(cupycorr.spatial_correlation_sample, make(), make(shape=(1, 2, 5, 7))) == (
        "ValueError: input1 and input2 must have equal shapes, got (1, 2, 5, 6) and (1, 2, 5, 7)"
    )


@pytest.mark.parametrize("make", [fmap, tensor])
@pytest.mark.parametrize("name", ["kernel_size", "patch_size", "stride", "dilation"])
def test_sample_refuses_parameters_below_one(make, name):
    message = refusal(cupycorr.spatial_correlation_sample, make(), make(), **{name: 0})
    assert message == f"ValueError: {name} must be at least 1, got 0"


@pytest.mark.parametrize("name", ["kernel_size", "patch_size", "stride", "padding", "dilation",
                                  "dilation_patch"])  # fmt: skip
@pytest.mark.parametrize("value", [1.5, True, None, "3", (1, 2, 3)])
def test_sample_refuses_parameters_that_are_not_integers(name, value):
    message = refusal(cupycorr.spatial_correlation_sample, fmap(), fmap(), **{name: value})
    assert message == f"TypeError: {name} must be an int or a pair of ints, got {value!r}"


def test_sample_takes_the_parameters_in_the_order_of_the_original(monkeypatch):
    seen = []
    monkeypatch.setattr(numpy_engine, "run", lambda *a, **k: seen.append(a[2].geometry))
    cupycorr.spatial_correlation_sample(fmap(), fmap(), 1, 2, 3, 4, 5, 6)
    assert seen == [Geometry(kernel_size=1, patch_size=2, stride=3, padding=4, dilation=5,
                             dilation_patch=6)]  # fmt: skip


# Gradients.


def upstream(dtype="float32", shape=SHAPE):
    return fmap(dtype, GEOMETRY.cost_shape(shape))


@pytest.mark.parametrize("shape", [SHAPE, (1, 3, 3, 5, 7), (1, 9, 5, 6), (2, 3, 3, 5, 6), ()])
def test_upstream_of_another_shape_than_the_cost_volume_is_refused(shape):
    arrays = fmap(shape=shape), fmap(), fmap()
    assert refusal(cupycorr.correlation_vjp, *arrays, GEOMETRY) == (
        f"ValueError: grad_cost must have the cost volume's shape (1, 3, 3, 5, 6), got {shape}"
    )


def test_upstream_of_another_dtype_is_refused():
    message = refusal(cupycorr.correlation_vjp, upstream("float64"), fmap(), fmap(), GEOMETRY)
    assert message == (
        "TypeError: fmap1, fmap2 and grad_cost must have equal dtypes, got float32, float32 and "
        "float64"
    )


@pytest.mark.parametrize("position", [0, 1, 2])
def test_vjp_refuses_what_is_no_array(position):
    arrays = [upstream(), fmap(), fmap()]
    arrays[position] = [1.0]
    name = ("grad_cost", "fmap1", "fmap2")[position]
    assert refusal(cupycorr.correlation_vjp, *arrays, GEOMETRY) == (
        f"TypeError: {name} must be a NumPy or CuPy array or a torch tensor, got list"
    )


def test_vjp_of_tensors_points_to_autograd():
    arrays = tensor(shape=(1, 3, 3, 5, 6)), tensor(), tensor()
    message = refusal(cupycorr.correlation_vjp, *arrays, GEOMETRY)
    assert message.startswith("TypeError: fmap1, fmap2 and grad_cost must be NumPy or CuPy arrays")
    assert message.endswith("torch.autograd")


def test_vjp_refuses_arrays_of_different_libraries():
    message = refusal(cupycorr.correlation_vjp, upstream(), tensor(), fmap(), GEOMETRY)
    assert message.endswith("must be arrays of one library, got torch, numpy and numpy")


@pytest.mark.parametrize("needs", [True, None, (True,), (True, False, True), 3])
def test_needs_that_is_no_pair_is_refused(needs):
    message = refusal(cupycorr.correlation_vjp, upstream(), fmap(), fmap(), GEOMETRY, needs=needs)
    assert message == f"TypeError: needs must be a pair of bools, got {needs!r}"


def test_vjp_refuses_what_is_no_geometry():
    message = refusal(cupycorr.correlation_vjp, upstream(), fmap(), fmap(), None)
    assert message == "TypeError: geometry must be a Geometry, got NoneType"


# Dispatch.


class TestOnGoodInputs:
    @pytest.fixture(autouse=True)
    def _work(self, _no_work, monkeypatch):
        monkeypatch.undo()

    def test_numpy_maps_give_a_numpy_array(self):
        assert type(cupycorr.correlation(fmap(), fmap(), GEOMETRY)) is np.ndarray

    def test_tensors_give_a_tensor(self):
        assert type(cupycorr.correlation(tensor(), tensor(), GEOMETRY)) is torch.Tensor

    def test_parameters_give_a_tensor(self):
        parameter = torch.nn.Parameter(tensor())
        assert type(cupycorr.correlation(parameter, tensor(), GEOMETRY)) is torch.Tensor

    def test_tensors_have_the_values_of_arrays(self, rng):
        maps = rng.integers(-2, 3, (2, *SHAPE)).astype(np.float32)
        got = cupycorr.correlation(*map(torch.from_numpy, maps), GEOMETRY, normalize=True)
        want = cupycorr.correlation(*maps, GEOMETRY, normalize=True)
        assert not verify.difference(got.numpy(), want)

    def test_sample_is_correlation_with_a_geometry(self, rng):
        maps = rng.integers(-2, 3, (2, *SHAPE)).astype(np.float32)
        parameters = 2, (3, 2), 2, (1, 2), (1, 3), 2
        got = cupycorr.spatial_correlation_sample(*maps, *parameters)
        assert not verify.difference(got, cupycorr.correlation(*maps, Geometry(*parameters)))

    def test_normalizing_divides_by_the_terms_of_all_taps(self):
        cost = cupycorr.correlation(fmap(), fmap(), Geometry((2, 3)), normalize=True)
        assert not verify.difference(cost, np.ones((1, 1, 1, 4, 4)))

    def test_normalizing_divides_the_gradients_alike(self, rng):
        geometry = Geometry((2, 4))  # 2 channels x 8 taps, a power of two: the division is exact
        shape = geometry.cost_shape(SHAPE)
        arrays = [rng.integers(-2, 3, s).astype(np.float32) for s in (shape, SHAPE, SHAPE)]
        got = cupycorr.correlation_vjp(*arrays, geometry, normalize=True)
        want = cupycorr.correlation_vjp(*arrays, geometry)
        assert not verify.difference(got[0], want[0] / 16)
        assert not verify.difference(got[1], want[1] / 16)

    @pytest.mark.parametrize("second", ["float32", "bfloat16", "float16"])
    def test_autocast_takes_tensors_of_different_dtypes(self, second):
        with torch.autocast("cpu", torch.bfloat16):
            cost = cupycorr.correlation(tensor("float32"), tensor(second), GEOMETRY)
        assert cost.dtype == torch.bfloat16


def test_dtype_names_agree_between_the_libraries():
    names = [api.dtype_name(getattr(torch, name)) for name in DTYPES]
    assert names == list(DTYPES)


def test_allow_tf32_is_refused_for_tensors():
    message = "allow_tf32 must be left out for torch tensors, got True; they follow"
    with pytest.raises(TypeError, match=message):
        cupycorr.correlation(torch.ones(SHAPE), torch.ones(SHAPE), GEOMETRY, allow_tf32=True)


@pytest.mark.parametrize("heavy", ["torch", "cupy", "ml_dtypes", "click", "rich"])
def test_importing_and_using_numpy_loads_nothing_heavier(heavy):
    code = (
        "import sys, numpy, cupycorr\n"
        "a = numpy.ones((1, 2, 5, 6), 'f4')\n"
        "cupycorr.spatial_correlation_sample(a, a, 3, 3)\n"
        f"sys.exit({heavy!r} in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
