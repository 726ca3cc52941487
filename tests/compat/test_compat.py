"""Other systems' layers against their own published formulas, as literal loops."""

import copy
import pickle
from itertools import product
from math import ceil

import numpy as np
import pytest

from cupycorr import compat, verify

torch = pytest.importorskip("torch")

from cupycorr.compat import caffe, mmcv, nvidia, sniklaus, taichi  # noqa: E402


def at(fmap, y, x):
    """Return a map's values at a position, (N, C); 0 outside."""
    inside = 0 <= y < fmap.shape[2] and 0 <= x < fmap.shape[3]
    return fmap[:, :, y, x] if inside else np.zeros(fmap.shape[:2])


def times(one, two):
    return (one * two).sum(1)


def apart(one, two):
    return np.abs(one - two).sum(1)


def flownet(one, two, pad, k, reach, stride1, stride2, compare=times):
    """FlowNet's Caffe layer, whose formula NVIDIA's has too."""
    samples, channels, height, width = one.shape
    radius = reach // stride2
    side = 2 * radius + 1
    oh = ceil((height + 2 * pad - 2 * (reach + (k - 1) // 2)) / stride1)
    ow = ceil((width + 2 * pad - 2 * (reach + (k - 1) // 2)) / stride1)
    out = np.zeros((samples, side * side, oh, ow))
    for c, h, w, v, u in product(*map(range, (side * side, oh, ow, k, k))):
        y, x = h * stride1 + reach - pad + v, w * stride1 + reach - pad + u
        dy, dx = (c // side - radius) * stride2, (c % side - radius) * stride2
        out[:, c, h, w] += compare(at(one, y, x), at(two, y + dy, x + dx))
    return out / (k * k * channels)


def flownet1d(one, two, pad, k, reach, stride1, stride2, direction, compare=times):
    """FlowNet2's stereo layer."""
    samples, channels, height, width = one.shape
    radius = reach // stride2
    first = {-1: -radius, 0: -radius, 1: 0}[direction]
    count = radius + 1 if direction else 2 * radius + 1
    oh = ceil((height - 2 * ((k - 1) // 2)) / stride1)
    ow = ceil((width + 2 * pad - 2 * (reach + (k - 1) // 2)) / stride1)
    out = np.zeros((samples, count, oh, ow))
    for c, h, w, v, u in product(*map(range, (count, oh, ow, k, k))):
        y, x = h * stride1 + v, w * stride1 + reach - pad + u
        out[:, c, h, w] += compare(at(one, y, x), at(two, y, x + (first + c) * stride2))
    return out / (k * k * channels)


def corr_taichi(one, two, max_disp, dila_patch):
    """The Taichi layer: displacements start at -max_disp and are never centred."""
    samples, _, height, width = one.shape
    side = max_disp * 2 // dila_patch + 1
    out = np.zeros((samples, side * side, height, width))
    for c, y, x in product(*map(range, (side * side, height, width))):
        dy, dx = (dila_patch * d - max_disp for d in divmod(c, side))
        out[:, c, y, x] = times(at(one, y, x), at(two, y + dy, x + dx))
    return out


def corr_mmcv(one, two, k, reach, stride, padding, dilation, dilation_patch):
    """mmcv's layer, of which every argument but the second may be a pair."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), (eh, ew) = (
        pair if isinstance(pair, tuple) else (pair, pair)
        for pair in (k, stride, padding, dilation, dilation_patch)
    )
    samples, _, height, width = one.shape
    oh = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    ow = (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    side = 2 * reach + 1
    out = np.zeros((samples, side, side, oh, ow))
    for p, q, h, w, v, u in product(*map(range, (side, side, oh, ow, kh, kw))):
        y, x = h * sh - ph + v * dh, w * sw - pw + u * dw
        other = at(two, y + (p - reach) * eh, x + (q - reach) * ew)
        out[:, p, q, h, w] += times(at(one, y, x), other)
    return out


def corr_sniklaus(one, two, side, stride):
    """The layers of pytorch-pwc (side 9, stride 1) and pytorch-liteflownet (side 7)."""
    samples, channels, height, width = one.shape
    oh, ow = ceil(height / stride), ceil(width / stride)
    out = np.zeros((samples, side * side, oh, ow))
    for c, h, w in product(*map(range, (side * side, oh, ow))):
        y, x = h * stride, w * stride
        dy, dx = ((d - side // 2) * stride for d in divmod(c, side))
        out[:, c, h, w] = times(at(one, y, x), at(two, y + dy, x + dx))
    return out / channels


FLOWNETS = {
    # pad, kernel_size, max_displacement, stride1, stride2
    "FlowNetC, small": (4, 1, 4, 1, 2),
    "PWC-Net": (2, 1, 2, 1, 1),
    "window": (3, 3, 2, 1, 1),
    "window of 5, strides": (4, 5, 2, 2, 2),
    "strides": (3, 1, 3, 2, 3),
    "stride 3, remainder": (2, 1, 2, 3, 1),
    "less padding than displacement": (1, 1, 2, 1, 1),
    "more padding than displacement": (5, 3, 2, 2, 1),
    "no padding": (0, 3, 1, 1, 1),
    "displacement no multiple of its step": (5, 1, 5, 1, 2),
    "the same, with a window": (4, 3, 5, 2, 3),
    "step beyond the displacement": (3, 1, 2, 1, 3),
    "nothing displaced": (0, 1, 0, 1, 2),
}
STEREOS = {
    f"{name}, {direction}": (*layer, direction)
    for name, layer in FLOWNETS.items()
    for direction in (-1, 0, 1)
}
EVEN = {
    "window of 2": (1, 2, 1, 1, 1),
    "window of 2, less padding": (0, 2, 1, 1, 1),
    "window of 4, strides": (3, 4, 2, 2, 2),
    "window of 4, stride 3": (2, 4, 1, 3, 1),
    "window of 2, no displacement": (0, 2, 0, 1, 1),
    "window of 2, displacement beyond the padding": (0, 2, 3, 2, 2),
}
TAICHIS = {"1": (1, 1), "2": (2, 1), "4 by 2": (4, 2), "3 by 2": (3, 2), "5 by 3": (5, 3),
           "2 by 5": (2, 5), "0": (0, 1), "20 by 2": (20, 2)}  # fmt: skip
MMCVS = {
    "defaults": (1, 1, 1, 0, 1, 1),
    "everything": (3, 2, 2, 1, 2, 2),
    "pairs": ((3, 2), 1, (2, 1), (1, 2), (1, 2), (2, 3)),
    "even window": (2, 2, 1, 1, 1, 1),
    "nothing displaced": (1, 0, 1, 0, 1, 1),
}


def arrays(shape=(2, 3, 9, 11), seeds=(0, 1)):
    """Return maps of small integers, of which sums are exact."""
    return [np.random.default_rng(s).integers(-4, 5, shape).astype(np.float64) for s in seeds]


def tensors(*args, **kwargs):
    return [torch.from_numpy(array) for array in arrays(*args, **kwargs)]


def assert_equal(got, want):
    assert verify.difference(got.numpy(), want) is None


@pytest.mark.parametrize("layer", FLOWNETS.values(), ids=FLOWNETS)
class TestFlowNet:
    def test_nvidias_module_computes_its_formula(self, layer):
        assert_equal(nvidia.Correlation(*layer)(*tensors()), flownet(*arrays(), *layer))

    def test_nvidias_function_is_called_in_either_form(self, layer):
        want = flownet(*arrays(), *layer)
        assert_equal(nvidia.CorrelationFunction(*layer, 1)(*tensors()), want)
        assert_equal(nvidia.CorrelationFunction.apply(*tensors(), *layer, 1), want)

    def test_caffes_layer_computes_the_same_by_its_names(self, layer):
        pad, k, reach, stride_1, stride_2 = layer
        named = caffe.Correlation(
            kernel_size=k, max_displacement=reach, pad=pad, stride_1=stride_1, stride_2=stride_2
        )
        ordered = caffe.Correlation(k, reach, pad, stride_1, stride_2, False, "multiply")
        want = flownet(*arrays(), *layer)
        assert_equal(named(*tensors()), want)
        assert_equal(ordered(*tensors()), want)

    @pytest.mark.parametrize("correlation_type", ["subtract", "SUBTRACT", 1])
    def test_caffes_layer_computes_mean_differences(self, layer, correlation_type):
        pad, k, reach, *strides = layer
        module = caffe.Correlation(k, reach, pad, *strides, correlation_type=correlation_type)
        assert_equal(module(*tensors()), flownet(*arrays(), *layer, compare=apart))


@pytest.mark.parametrize("layer", EVEN.values(), ids=EVEN)
def test_an_even_window_has_the_size_and_the_values_of_nvidias_formula(layer):
    assert_equal(nvidia.Correlation(*layer)(*tensors()), flownet(*arrays(), *layer))


@pytest.mark.parametrize("layer", STEREOS.values(), ids=STEREOS)
def test_correlation1d_computes_its_formula(layer):
    pad, k, reach, stride_1, stride_2, direction = layer
    module = caffe.Correlation1D(k, reach, pad, stride_1, stride_2, single_direction=direction)
    assert_equal(module(*tensors()), flownet1d(*arrays(), *layer))


@pytest.mark.parametrize("layer", STEREOS.values(), ids=STEREOS)
def test_correlation1d_computes_mean_differences(layer):
    pad, k, reach, *strides, direction = layer
    module = caffe.Correlation1D(k, reach, pad, *strides, False, "subtract", direction)
    assert_equal(module(*tensors()), flownet1d(*arrays(), *layer, compare=apart))


@pytest.mark.parametrize("layer", TAICHIS.values(), ids=TAICHIS)
def test_taichis_layer_computes_its_formula(layer):
    module = taichi.CorrTaichi(*layer)
    want = corr_taichi(*arrays(), *layer)
    assert_equal(module(*tensors()), want)
    assert module.out_channels == module.patch_size**2 == want.shape[1]


@pytest.mark.parametrize("layer", MMCVS.values(), ids=MMCVS)
def test_mmcvs_layer_computes_its_formula(layer):
    assert_equal(mmcv.Correlation(*layer)(*tensors()), corr_mmcv(*arrays(), *layer))


def test_mmcvs_layer_has_its_defaults():
    assert_equal(mmcv.Correlation()(*tensors()), corr_mmcv(*arrays(), *MMCVS["defaults"]))


class TestSniklaus:
    SPELLINGS = (("tenOne", "tenTwo"), ("tenFirst", "tenSecond"), ("tensorFirst", "tensorSecond"))

    @pytest.mark.parametrize(
        "correlate",
        [sniklaus.FunctionCorrelation, sniklaus.ModuleCorrelation()],
        ids=["function", "module"],
    )
    @pytest.mark.parametrize("stride", [None, 1, 2, 3])
    def test_it_computes_both_formulas_by_any_of_their_names(self, correlate, stride):
        want = corr_sniklaus(*arrays(), 7 if stride else 9, stride or 1)
        more = {"intStride": stride} if stride else {}
        assert_equal(correlate(*tensors(), **more), want)
        assert_equal(correlate(*tensors(), *more.values()), want)
        for names in self.SPELLINGS:
            assert_equal(correlate(**dict(zip(names, tensors(), strict=True)), **more), want)

    @pytest.mark.parametrize(
        "named", [{}, {"first": 1}, {"tenOne": 1, "tenFirst": 1}, {"stride": 2}]
    )
    def test_other_arguments_are_refused(self, named):
        with pytest.raises(TypeError, match=r"tenTwo|argument"):
            sniklaus.FunctionCorrelation(tensors()[0], **named)


class TestByHand:
    """One row, two displacements to either side at most, one channel."""

    ONE, TWO = [[[[1.0, 2.0, 3.0]]]], [[[[4.0, 5.0, 6.0]]]]

    def maps(self):
        return torch.tensor(self.ONE), torch.tensor(self.TWO)

    def test_nvidias_channels_run_through_the_rows_of_displacements(self):
        volume = nvidia.Correlation(1, 1, 1, 1, 1)(*self.maps())
        assert volume.shape == (1, 9, 1, 3)
        # Displacements (0, -1), (0, 0), (0, 1): 2*4 and 3*5; 1*4, 2*5, 3*6; 1*5 and 2*6.
        assert volume[0, 3:6, 0].tolist() == [[0, 8, 15], [4, 10, 18], [5, 12, 0]]
        assert not volume[0, :3].any()
        assert not volume[0, 6:].any()

    def test_taichis_patch_is_off_centre_if_the_step_does_not_divide(self):
        volume = taichi.CorrTaichi(1, 3)(*self.maps())
        assert volume.tolist() == [[[[0, 0, 0]]]]  # its one displacement is (-1, -1)

    def test_caffes_differences_count_zeros_outside(self):
        volume = caffe.Correlation1D(1, 1, 1, correlation_type="subtract")(*self.maps())
        # Displacements -1, 0, 1: |1-0|, |2-4|, |3-5|; |1-4|, |2-5|, |3-6|; |1-5|, |2-6|, |3-0|.
        assert volume[0, :, 0].tolist() == [[1, 2, 2], [3, 3, 3], [4, 4, 3]]

    def test_correlation1d_divides_by_window_and_channels(self):
        one = torch.ones(1, 2, 3, 3)
        volume = caffe.Correlation1D(3, 0)(one, 6 * one)
        assert volume.tolist() == [[[[6.0]]]]  # 9 taps and 2 channels of 6, divided by 18


LAYERS = {
    "nvidia": nvidia.Correlation(2, 3, 2, 2, 1),
    "nvidia, even window": nvidia.Correlation(2, 2, 2, 1, 2),
    "caffe": caffe.Correlation(3, 2, 1, 1, 2),
    "caffe, stereo": caffe.Correlation1D(1, 2, 2, 1, 1, single_direction=-1),
    "caffe, differences": caffe.Correlation(3, 1, 2, 1, 1, correlation_type="subtract"),
    "mmcv": mmcv.Correlation(2, 1, 1, 1, 2, 2),
    "sniklaus": sniklaus.ModuleCorrelation(),
}
PLAIN = {
    "taichi": taichi.CorrTaichi(3, 2),
    "nvidia, old form": nvidia.CorrelationFunction(2, 1, 2, 2, 1),
    "sniklaus, stride": lambda one, two: sniklaus.FunctionCorrelation(one, two, intStride=2),
}


@pytest.mark.parametrize("layer", (LAYERS | PLAIN).values(), ids=LAYERS | PLAIN)
def test_torch_agrees_with_the_gradients(layer):
    # Nowhere equal, so that absolute differences have gradients everywhere.
    maps = torch.randn(2, 1, 2, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    assert torch.autograd.gradcheck(layer, [fmap.requires_grad_() for fmap in maps])


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
class TestModules:
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(
        pickle.dumps(module))], ids=["deepcopy", "pickle"])  # fmt: skip
    def test_a_copy_computes_the_same(self, layer, duplicate):
        other = duplicate(layer)
        assert repr(other) == repr(layer)
        assert_equal(other(*tensors()), layer(*tensors()).numpy())

    def test_it_compiles_into_one_graph(self, layer):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_equal(compiled(*tensors()), layer(*tensors()).numpy())

    def test_it_has_nothing_to_learn_or_to_load(self, layer):
        assert not layer.state_dict()


@pytest.mark.gpu
@pytest.mark.parametrize("layer", (LAYERS | PLAIN).values(), ids=LAYERS | PLAIN)
def test_cuda_tensors_have_the_results_of_the_cpu(layer):
    if not torch.cuda.is_available():
        pytest.skip("needs a torch with CUDA, and a CUDA device")
    got = layer(*(fmap.cuda() for fmap in tensors()))
    assert_equal(got.cpu(), layer(*tensors()).numpy())


@pytest.mark.parametrize("correlate", [taichi.CorrTaichi(3, 2), sniklaus.FunctionCorrelation],
                         ids=["taichi", "sniklaus"])  # fmt: skip
def test_plain_functions_take_numpy_arrays(correlate):
    volume = correlate(*arrays())
    assert isinstance(volume, np.ndarray)
    assert_equal(torch.from_numpy(volume), correlate(*tensors()).numpy())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nvidia.Correlation(), ValueError, "kernel_size must be at least 1, got 0"),
        (lambda: nvidia.Correlation(4, 1, 4, 0), ValueError, "stride1 must be at least 1, got 0"),
        (lambda: nvidia.Correlation(4, 1, 4, 1, 1, 0), ValueError, "corr_multiply must be 1"),
        (lambda: nvidia.Correlation(4, (1, 1), 4), TypeError, "kernel_size must be an int"),
        (lambda: caffe.Correlation(2, 4), ValueError, "kernel_size must be odd, got 2"),
        (lambda: caffe.Correlation1D(4, 4), ValueError, "kernel_size must be odd, got 4"),
        (lambda: caffe.Correlation(1, 4, do_abs=True), ValueError, "do_abs must be False"),
        (lambda: caffe.Correlation(1, 4, correlation_type="add"), ValueError,
         "correlation_type must be 'multiply' or 'subtract', got 'add'"),
        (lambda: caffe.Correlation1D(1, 4, single_direction=2), ValueError,
         "single_direction must be -1, 0 or 1, got 2"),
        (lambda: taichi.CorrTaichi(-1), ValueError, "max_disp must be at least 0"),
        (lambda: mmcv.Correlation(max_displacement=-1), ValueError,
         "max_displacement must be at least 0, got -1"),
        (lambda: mmcv.Correlation(max_displacement=(1, 2)), TypeError,
         "max_displacement must be an int"),
        (lambda: sniklaus.FunctionCorrelation(*tensors(), 0), ValueError, "must be at least 1"),
    ],
)  # fmt: skip
def test_what_a_system_cannot_mean_is_refused_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("layer", (LAYERS | PLAIN).values(), ids=LAYERS | PLAIN)
def test_unequal_maps_are_refused(layer):
    one, two = torch.ones(1, 2, 9, 9), torch.ones(1, 2, 9, 8)
    with pytest.raises(ValueError, match="must have equal shapes"):
        layer(one, two)


@pytest.mark.parametrize("name", compat.__all__)
def test_the_package_offers_what_it_names(name):
    assert name in dir(compat)
    assert getattr(compat, name).__name__.rpartition(".")[2] == name


def test_the_package_offers_nothing_else():
    with pytest.raises(AttributeError, match="no attribute 'opencv'"):
        _ = compat.opencv
