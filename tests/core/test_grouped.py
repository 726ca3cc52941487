"""Groups of channels, and maps whose pixels are scaled to length 1, against their definitions."""

import numpy as np
import pytest
from cases import GEOMETRIES

import cupycorr
from cupycorr import Geometry

SHAPE, GROUPS = (2, 12, 7, 9), 3
GEOMETRY = Geometry(kernel_size=(1, 3), patch_size=(3, 2), stride=2, padding=1)


def maps(shape=SHAPE, dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for _ in range(2)]


def of_group(fmap, group):
    size = fmap.shape[1] // GROUPS
    return fmap[:, group * size : (group + 1) * size]


def unit(fmap):
    return fmap / np.maximum(np.linalg.norm(fmap, axis=1, keepdims=True), 1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("similarity", ["product", "l1"])
def test_a_group_has_the_cost_volume_of_its_channels(similarity, normalize):
    how = {"similarity": similarity, "normalize": normalize}
    one, two = maps()
    cost = cupycorr.correlation(one, two, GEOMETRY, groups=GROUPS, **how)
    grad = np.random.default_rng(1).standard_normal(cost.shape)
    grads = cupycorr.correlation_vjp(grad, one, two, GEOMETRY, groups=GROUPS, **how)
    assert [g.shape for g in grads] == [SHAPE, SHAPE]
    for group in range(GROUPS):
        parts = of_group(one, group), of_group(two, group)
        want = cupycorr.correlation(*parts, GEOMETRY, **how)
        assert np.array_equal(cost[:, group], want)
        wanted = cupycorr.correlation_vjp(grad[:, group], *parts, GEOMETRY, **how)
        assert np.array_equal(of_group(grads[0], group), wanted[0])
        assert np.array_equal(of_group(grads[1], group), wanted[1])


def test_cosine_divides_by_lengths_of_groups():
    one, two = maps()
    one[0, :, 2, 3] = 0
    cost = cupycorr.correlation(one, two, GEOMETRY, groups=GROUPS, normalize="cosine")
    for group in range(GROUPS):
        parts = unit(of_group(one, group)), unit(of_group(two, group))
        want = cupycorr.correlation(*parts, GEOMETRY)
        np.testing.assert_allclose(cost[:, group], want, rtol=0, atol=1e-14)
    same = cupycorr.correlation(two, two, Geometry(), normalize="cosine")
    np.testing.assert_allclose(same, 1, rtol=0, atol=1e-14)


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_gradients_of_cosines_are_their_derivatives(groups):
    one, two = maps((1, 6, 4, 5))
    how = {"groups": groups, "normalize": "cosine"}
    cost = cupycorr.correlation(one, two, GEOMETRY, **how)
    grad = np.random.default_rng(1).standard_normal(cost.shape)
    grads = cupycorr.correlation_vjp(grad, one, two, GEOMETRY, **how)
    step = 1e-6
    for which, fmap in enumerate((one, two)):
        change = np.random.default_rng(2).standard_normal(fmap.shape)
        ends = []
        for sign in (-1, 1):
            moved = [one, two]
            moved[which] = fmap + sign * step * change
            ends.append((grad * cupycorr.correlation(*moved, GEOMETRY, **how)).sum())
        assert (grads[which] * change).sum() == pytest.approx(
            (ends[1] - ends[0]) / (2 * step), rel=1e-6
        )


def test_a_pixel_of_zeros_has_a_finite_gradient():
    one, two = np.zeros((1, 2, 3, 3)), np.ones((1, 2, 3, 3))
    cost = cupycorr.correlation(one, two, Geometry(), normalize="cosine")
    grads = cupycorr.correlation_vjp(cost + 1, one, two, Geometry(), normalize="cosine")
    assert all(np.isfinite(grad).all() for grad in grads)


def test_only_the_gradients_that_are_needed_are_computed():
    one, two = maps()
    cost = cupycorr.correlation(one, two, GEOMETRY, groups=GROUPS)
    how = {"groups": GROUPS, "normalize": "cosine"}
    both = cupycorr.correlation_vjp(cost, one, two, GEOMETRY, **how)
    none, second = cupycorr.correlation_vjp(cost, one, two, GEOMETRY, needs=(False, True), **how)
    assert none is None
    assert np.array_equal(second, both[1])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cosines_of_few_bits_are_scaled_in_float32_and_rounded_once(dtype):
    one, two = maps(dtype=dtype)
    scaled = [unit(fmap.astype("float32")).astype(dtype) for fmap in (one, two)]
    got = cupycorr.correlation(one * one.dtype.type(1000), two, GEOMETRY, normalize="cosine")
    assert got.dtype == dtype
    want = cupycorr.correlation(*scaled, GEOMETRY)
    np.testing.assert_allclose(got.astype("f8"), want.astype("f8"), rtol=0, atol=4e-3)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"groups": 5}, "groups must divide the maps' 12 channels, got 5"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"normalize": "sine"}, "normalize must be a bool or 'cosine', got 'sine'"),
        (
            {"normalize": "cosine", "similarity": "l1"},
            "normalize='cosine' must come with similarity 'product', got 'l1'",
        ),
    ],
)
def test_what_means_nothing_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        cupycorr.correlation(*maps(), GEOMETRY, **how)
    with pytest.raises(ValueError, match=message):
        cupycorr.correlation_vjp(np.zeros(1), *maps(), GEOMETRY, **how)


def test_groups_must_be_an_int_and_maps_must_be_maps():
    with pytest.raises(TypeError, match="groups must be an int, got True"):
        cupycorr.correlation(*maps(), GEOMETRY, groups=True)
    with pytest.raises(ValueError, match=r"fmap1 and fmap2 must have shape \(N, C, H, W\)"):
        cupycorr.correlation(*maps(SHAPE[1:]), GEOMETRY, groups=3)
    with pytest.raises(TypeError, match="must have dtype"):
        cupycorr.correlation(*maps(dtype="int32"), GEOMETRY, normalize="cosine")
    grad = np.zeros(GEOMETRY.cost_shape(SHAPE))
    with pytest.raises(ValueError, match=r"grad_cost must have the shape \(N, 3, PH, PW, OH, OW\)"):
        cupycorr.correlation_vjp(grad, *maps(), GEOMETRY, groups=3)


class TestTensors:
    @pytest.mark.parametrize("case", ["FlowNetC", "everything differs per axis"])
    @pytest.mark.parametrize("how", [{"groups": 3}, {"groups": 2, "normalize": "cosine"}], ids=str)
    def test_tensors_have_the_cost_volume_and_gradients_of_arrays(self, how, case):
        torch = pytest.importorskip("torch")
        (_, _, *size), geometry = GEOMETRIES[case]
        one, two = maps((1, 6, *size))
        want = cupycorr.correlation(one, two, geometry, **how)
        grad = np.random.default_rng(1).standard_normal(want.shape)
        wanted = cupycorr.correlation_vjp(grad, one, two, geometry, **how)
        tensors = [torch.tensor(fmap, requires_grad=True) for fmap in (one, two)]
        cost = cupycorr.correlation(*tensors, geometry, **how)
        np.testing.assert_allclose(cost.detach(), want, rtol=0, atol=1e-12)
        for got, expected in zip(
            torch.autograd.grad(cost, tensors, torch.from_numpy(grad)), wanted, strict=True
        ):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("how", [{"groups": 3}, {"normalize": "cosine"}], ids=str)
    def test_their_gradients_are_autograds(self, how):
        torch = pytest.importorskip("torch")
        tensors = [torch.from_numpy(fmap) for fmap in maps()]
        with pytest.raises(TypeError, match=r"got torch tensors; differentiate those with torch\."):
            cupycorr.correlation_vjp(tensors[0], *tensors, GEOMETRY, **how)

    def test_they_are_compiled_and_traced_in_one_graph(self):
        torch = pytest.importorskip("torch")

        def call(one, two):
            return cupycorr.correlation(one, two, GEOMETRY, groups=3, normalize="cosine")

        tensors = [torch.from_numpy(fmap) for fmap in maps()]
        want = call(*tensors)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*tensors), want)
        torch.testing.assert_close(torch.fx.symbolic_trace(call)(*tensors), want)


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{"groups": 3}, {"groups": 2, "normalize": "cosine"}], ids=str)
def test_arrays_of_a_device_are_grouped_alike(how):
    cupy = pytest.importorskip("cupy")
    one, two = maps(dtype="float32")
    want = cupycorr.correlation(one, two, GEOMETRY, **how)
    wanted = cupycorr.correlation_vjp(want, one, two, GEOMETRY, **how)
    there = cupy.asarray(one), cupy.asarray(two)
    got = cupycorr.correlation(*there, GEOMETRY, **how)
    np.testing.assert_allclose(got.get(), want, rtol=0, atol=1e-5)
    grads = cupycorr.correlation_vjp(cupy.asarray(want), *there, GEOMETRY, **how)
    for grad, expected in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(grad.get(), expected, rtol=0, atol=1e-4)
