"""The vocabularies of other systems against their formulas, written out, and their layers."""

from math import ceil

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import pairs

import cupycorr
from cupycorr import Geometry, verify
from cupycorr.compat.systems import SYSTEMS

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


def test_every_system_has_parameters_to_draw():
    assert {name: set(system.defaults) for name, system in SYSTEMS.items()} == {
        name: set(drawn) for name, drawn in PARAMETERS.items()
    }


def difference(system, parameters):
    """Compare what parameters mean with what the system's layer in compat computes, if it fits."""
    torch = pytest.importorskip("torch")
    from cupycorr import compat

    layer = SYSTEMS[system].layer(**parameters)
    maps = [np.random.default_rng(seed).integers(-2, 3, (1, 4, 22, 24)).astype(float)
            for seed in (0, 1)]  # fmt: skip
    options = {"normalize": layer.normalize, "similarity": layer.similarity}
    try:
        want = cupycorr.correlation(*maps, layer.geometry, **options)
    except ValueError:  # the taps do not fit
        return None
    if SYSTEMS[system].flat:
        want = want.reshape(1, -1, *want.shape[3:])
    words = ", ".join(f"{name}={value!r}" for name, value in parameters.items())
    names = {name: getattr(compat, name) for name in compat.__all__}
    names["spatial_correlation_sample"] = cupycorr.spatial_correlation_sample
    names |= dict(zip(("x1", "x2"), map(torch.from_numpy, maps), strict=True))
    got = eval(SYSTEMS[system].call.format(words), names)
    return verify.difference(got.numpy(), want)


@pytest.mark.parametrize("system", [name for name in SYSTEMS if name != "cupycorr"])
@given(data=st.data())
def test_parameters_mean_what_the_systems_layer_computes(system, data):
    assert difference(system, data.draw(st.fixed_dictionaries(PARAMETERS[system]))) is None


def test_an_error_in_a_meaning_is_caught(monkeypatch):
    right = SYSTEMS["mmcv"]
    wrong = right._replace(layer=lambda padding, **words: right.layer(padding=padding + 1, **words))
    monkeypatch.setitem(SYSTEMS, "mmcv", wrong)
    assert difference("mmcv", right.defaults | {"max_displacement": 1}) is not None


@pytest.mark.parametrize(
    ("system", "parameters", "message"),
    [
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
        SYSTEMS[system].layer(**SYSTEMS[system].defaults | parameters)
