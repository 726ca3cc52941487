"""The vocabularies of other systems against their formulas, written out, and the way back."""

from math import ceil

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import geometries, pairs

import cupycorr
from cupycorr import Geometry, verify
from cupycorr.compat import vocabularies
from cupycorr.compat.vocabularies import VOCABULARIES, Inexpressible, Setting

flownets = {
    "pad_size": st.integers(0, 12),
    "kernel_size": st.integers(0, 3).map(lambda n: 2 * n + 1),
    "max_displacement": st.integers(0, 12),
    "stride1": st.integers(1, 4),
    "stride2": st.integers(1, 5),
}


def flownet_size(size, pad, layer, reach=None):
    reach = layer["max_displacement"] if reach is None else reach
    border = reach + (layer["kernel_size"] - 1) // 2
    return ceil((size + 2 * pad - 2 * border) / layer["stride1"])


@given(st.fixed_dictionaries(flownets), st.integers(1, 30), st.integers(1, 30))
def test_from_flownet_has_flownets_output_size(layer, height, width):
    sizes = [flownet_size(n, layer["pad_size"], layer) for n in (height, width)]
    assume(min(sizes) >= 1)
    assert Geometry.from_flownet(**layer).output_size(height, width) == tuple(sizes)


@given(st.fixed_dictionaries(flownets), st.integers(0, 20), st.integers(0, 6))
def test_from_flownet_reads_where_flownet_reads(layer, h, u):
    axis = Geometry.from_flownet(**layer).y
    ours = h * axis.stride - axis.padding + u * axis.dilation
    assert ours == h * layer["stride1"] + layer["max_displacement"] - layer["pad_size"] + u


@given(st.fixed_dictionaries(flownets))
def test_from_flownet_has_flownets_displacements(layer):
    radius = layer["max_displacement"] // layer["stride2"]
    literal = [p * layer["stride2"] for p in range(-radius, radius + 1)]
    assert [list(d) for d in Geometry.from_flownet(**layer).displacements] == [literal] * 2


@given(st.fixed_dictionaries(flownets))
def test_from_flownet_compares_kernel_size_taps(layer):
    assert Geometry.from_flownet(**layer).kernel_size == (layer["kernel_size"],) * 2


def test_from_flownet_reproduces_flownetc():
    nvidia = Geometry.from_flownet(20, 1, 20, 1, 2)
    assert nvidia == Geometry(patch_size=21, dilation_patch=2)


stereos = {
    "pad": flownets["pad_size"],
    **{name: flownets[name] for name in list(flownets)[1:]},
    "single_direction": st.sampled_from((-1, 0, 1)),
}


@given(st.fixed_dictionaries(stereos), st.integers(1, 30), st.integers(1, 30))
def test_from_correlation1d_has_its_output_size(layer, height, width):
    sizes = (
        flownet_size(height, 0, layer, reach=0),
        flownet_size(width, layer["pad"], layer),
    )
    assume(min(sizes) >= 1)
    assert Geometry.from_correlation1d(**layer).output_size(height, width) == sizes


@given(st.fixed_dictionaries(stereos))
def test_from_correlation1d_has_its_displacements(layer):
    radius = layer["max_displacement"] // layer["stride2"]
    literal = {
        -1: range(-radius, 1),
        0: range(-radius, radius + 1),
        1: range(radius + 1),
    }[layer["single_direction"]]
    vertical, horizontal = Geometry.from_correlation1d(**layer).displacements
    assert (list(vertical), list(horizontal)) == ([0], [p * layer["stride2"] for p in literal])


@given(st.fixed_dictionaries(stereos), st.integers(0, 20), st.integers(0, 6))
def test_from_correlation1d_pads_and_displaces_horizontally_only(layer, n, u):
    stride, start = layer["stride1"], layer["max_displacement"] - layer["pad"]
    geometry = Geometry.from_correlation1d(**layer)
    y, x = (n * a.stride - a.padding + u * a.dilation for a in (geometry.y, geometry.x))
    assert (y, x) == (n * stride + u, n * stride + start + u)


@given(st.integers(0, 30), st.integers(1, 9))
def test_from_taichi_starts_at_minus_max_disp(max_disp, dila_patch):
    patch = max_disp * 2 // dila_patch + 1
    literal = [-max_disp + p * dila_patch for p in range(patch)]
    geometry = Geometry.from_taichi(max_disp, dila_patch)
    assert [list(d) for d in geometry.displacements] == [literal] * 2


def test_from_taichi_compares_every_position():
    assert Geometry.from_taichi(4, 2).output_size(11, 13) == (11, 13)


@given(st.integers(0, 9), pairs(1, 4), pairs(-3, 6))
def test_from_mmcv_has_its_displacements_and_leaves_the_rest(radius, spacing, padding):
    geometry = Geometry.from_mmcv(3, radius, 2, padding, 1, spacing)
    literal = [[p * step for p in range(-radius, radius + 1)] for step in spacing]
    assert [list(d) for d in geometry.displacements] == literal
    others = geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation
    assert others == ((3, 3), (2, 2), padding, (1, 1))


@pytest.mark.parametrize(
    ("make", "name", "value", "kind"),
    [
        (Geometry.from_flownet, "pad_size", 1.0, TypeError),
        (Geometry.from_flownet, "kernel_size", 0, ValueError),
        (Geometry.from_flownet, "kernel_size", (3, 3), TypeError),
        (Geometry.from_flownet, "max_displacement", -1, ValueError),
        (Geometry.from_flownet, "stride1", 0, ValueError),
        (Geometry.from_flownet, "stride2", 0, ValueError),
        (Geometry.from_flownet, "stride2", True, TypeError),
        (Geometry.from_correlation1d, "pad", None, TypeError),
        (Geometry.from_correlation1d, "stride2", "2", TypeError),
        (Geometry.from_correlation1d, "single_direction", 2, ValueError),
        (Geometry.from_correlation1d, "single_direction", 1.0, TypeError),
        (Geometry.from_taichi, "max_disp", -4, ValueError),
        (Geometry.from_taichi, "dila_patch", 0, ValueError),
        (Geometry.from_mmcv, "max_displacement", -1, ValueError),
        (Geometry.from_mmcv, "max_displacement", (1, 1), TypeError),
        (Geometry.from_mmcv, "dilation_patch", 0, ValueError),
    ],
)
def test_parameters_of_other_vocabularies_are_refused_by_their_own_name(make, name, value, kind):
    needed = {"max_disp": 4} if make == Geometry.from_taichi else {}
    with pytest.raises(kind) as error:
        make(**{**needed, name: value})
    message = str(error.value)
    assert message.startswith(f"{name} must be ")
    assert message.endswith(f"got {value!r}")


# Parameters of every system, drawn; those that a flag of `convert` would not take are left out.
MANY = {
    "kernel_size": pairs(1, 4),
    "stride": pairs(1, 4),
    "padding": pairs(-3, 6),
    "dilation": pairs(1, 4),
    "dilation_patch": pairs(1, 4),
}
CAFFES = {
    "pad": flownets["pad_size"],
    "kernel_size": flownets["kernel_size"],
    "max_displacement": flownets["max_displacement"],
    "stride_1": flownets["stride1"],
    "stride_2": flownets["stride2"],
    "correlation_type": st.sampled_from(("multiply", "subtract")),
}
PARAMETERS = {
    "cupycorr": {
        **MANY,
        "patch_size": pairs(1, 5),
        "first_displacement": st.none() | pairs(-6, 6),
        "normalize": st.booleans(),
        "similarity": st.sampled_from(("product", "l1")),
    },
    "spatial-correlation-sampler": {**MANY, "patch_size": pairs(1, 5)},
    "nvidia": flownets,
    "caffe": CAFFES,
    "caffe-1d": {**CAFFES, "single_direction": st.sampled_from((-1, 0, 1))},
    "taichi": {"max_disp": st.integers(0, 9), "dila_patch": st.integers(1, 9)},
    "mmcv": {**MANY, "max_displacement": st.integers(0, 3)},
    "pytorch-pwc": {},
    "pytorch-liteflownet": {"intStride": st.integers(1, 4)},
}


def meaning(setting):
    """Return what of a setting is not a matter of words."""
    return setting._replace(geometry=vocabularies.canonical(setting.geometry))


@st.composite
def settings(draw, system=None):
    """Draw a setting in a system's words, or in those of any."""
    system = draw(st.sampled_from(list(VOCABULARIES))) if system is None else system
    return vocabularies.read(system, draw(st.fixed_dictionaries(PARAMETERS[system])))


def test_every_vocabulary_has_parameters_to_draw():
    assert {name: set(v.defaults) for name, v in VOCABULARIES.items()} == {
        name: set(drawn) for name, drawn in PARAMETERS.items()
    }


@pytest.mark.parametrize("system", VOCABULARIES)
class TestTheWayBack:
    @given(data=st.data())
    def test_a_system_finds_its_own_parameters_again(self, system, data):
        setting = data.draw(settings(system))
        assert meaning(vocabularies.read(system, vocabularies.write(system, setting))) == meaning(
            setting
        )

    @given(setting=settings())
    def test_what_it_writes_compares_the_same(self, system, setting):
        try:
            parameters = vocabularies.write(system, setting)
        except Inexpressible:
            return
        found = meaning(vocabularies.read(system, parameters))
        assert (found.geometry, found.similarity) == meaning(setting)[::2]

    @given(geometry=geometries())
    def test_it_writes_only_what_it_can_read(self, system, geometry):
        try:
            parameters = vocabularies.write(system, Setting(geometry))
        except Inexpressible:
            return
        found = vocabularies.read(system, parameters).geometry
        assert vocabularies.canonical(found) == vocabularies.canonical(geometry)

    @given(data=st.data())
    def test_its_python_has_the_values_and_the_shape_of_the_setting(self, system, data):
        torch = pytest.importorskip("torch")
        setting = data.draw(settings(system) | settings())
        maps = [np.random.default_rng(seed).standard_normal((1, 4, 22, 24)) for seed in (0, 1)]
        try:
            line = vocabularies.python(system, setting)
            want = computed(setting, *maps)
        except ValueError:  # the system cannot, or the window does not fit
            return
        got = eval(
            line, names() | dict(zip(("x1", "x2"), map(torch.from_numpy, maps), strict=True))
        )
        size = want if setting.similarity == "l1" else computed(setting, *map(np.abs, maps))
        terms = 4 * setting.geometry.taps
        assert verify.excess(got.numpy(), want, size, terms, "float64") is None


def computed(setting, fmap1, fmap2):
    """Return a setting's cost volume."""
    geometry, normalize, similarity, flat = setting
    cost = cupycorr.correlation(fmap1, fmap2, geometry, normalize=normalize, similarity=similarity)
    return cost.reshape(1, -1, *cost.shape[3:]) if flat else cost


def names():
    """Return what lines of Python name."""
    from cupycorr import compat

    own = {name: getattr(cupycorr, name) for name in cupycorr.__all__}
    return own | {name: getattr(compat, name) for name in compat.__all__}


def test_an_error_in_a_translation_is_caught(monkeypatch):
    right = vocabularies._flownet

    def wrong(axis, radius):
        pad, *others = right(axis, radius)
        return (pad + 1, *others)

    monkeypatch.setattr(vocabularies, "_flownet", wrong)
    setting = vocabularies.read("nvidia", {"max_displacement": 4, "pad_size": 4})
    assert meaning(vocabularies.read("nvidia", vocabularies.write("nvidia", setting))) != meaning(
        setting
    )


@pytest.mark.parametrize(
    ("system", "geometry", "reason"),
    [
        ("spatial-correlation-sampler", Geometry(first_displacement=1), "has centred patches only"),
        ("nvidia", Geometry(kernel_size=(3, 1)), "has one kernel_size for both axes"),
        ("nvidia", Geometry(patch_size=4), "has patches of odd size only"),
        ("nvidia", Geometry(patch_size=3, first_displacement=0), "has centred patches only"),
        ("nvidia", Geometry(kernel_size=2), "has one output position more for even windows"),
        ("nvidia", Geometry(kernel_size=3, dilation=2), "has dense windows only"),
        ("nvidia", Geometry(1, 3, padding=-2), "crops no more than its largest displacement"),
        ("caffe", Geometry(kernel_size=2), "has windows of odd size only"),
        ("caffe-1d", Geometry(patch_size=3), "displaces horizontally only"),
        ("caffe-1d", Geometry(padding=1), "pads horizontally only"),
        ("caffe-1d", Geometry(stride=(1, 2)), "has one stride for both axes"),
        ("caffe-1d", Geometry(patch_size=(1, 4)), "displaces to one side, or as far to both"),
        ("taichi", Geometry(stride=2), "has stride 1, not 2"),
        ("taichi", Geometry(patch_size=3, first_displacement=1), "has patch_size 1, not 3"),
        ("mmcv", Geometry(patch_size=(3, 5)), "has square patches of odd size only"),
        ("pytorch-pwc", Geometry(patch_size=7), "has patch_size 9, not 7"),
        ("pytorch-liteflownet", Geometry(patch_size=7, stride=2), "has dilation_patch 2, not 1"),
    ],
)  # fmt: skip
def test_what_a_system_cannot_express_it_says_why(system, geometry, reason):
    with pytest.raises(Inexpressible) as error:
        vocabularies.write(system, Setting(geometry))
    assert str(error.value) == reason


@pytest.mark.parametrize("system", ["nvidia", "taichi", "mmcv", "pytorch-pwc"])
def test_only_caffe_has_differences(system):
    with pytest.raises(Inexpressible, match="has products only"):
        vocabularies.write(system, Setting(Geometry(patch_size=9), similarity="l1"))


@pytest.mark.parametrize(
    ("system", "parameters", "message"),
    [
        ("nvidia", {}, "max_displacement must be given for nvidia, got no value"),
        ("nvidia", {"max_displacement": 4, "kernel_size": 2}, "kernel_size must be odd"),
        ("caffe", {"max_displacement": 4, "kernel_size": 2}, "kernel_size must be odd"),
        ("caffe", {"max_displacement": 4, "kernel_size": 1, "correlation_type": "add"},
         "correlation_type must be 'multiply' or 'subtract', got 'add'"),
        ("cupycorr", {"similarity": "add"}, "similarity must be 'product' or 'l1', got 'add'"),
        ("pytorch-liteflownet", {"intStride": 0}, "must be at least 1"),
    ],
)  # fmt: skip
def test_parameters_that_mean_nothing_are_refused(system, parameters, message):
    with pytest.raises(ValueError, match=message):
        vocabularies.read(system, parameters)


def test_the_shape_is_that_of_the_systems_own_result():
    setting = vocabularies.read("taichi", {"max_disp": 4, "dila_patch": 2})
    assert vocabularies.shape("taichi", setting, 2, 7, 9) == (2, 25, 7, 9)
    assert vocabularies.shape("mmcv", setting, 2, 7, 9) == (2, 5, 5, 7, 9)
