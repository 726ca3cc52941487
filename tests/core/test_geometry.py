"""The geometry against its definition, written out over the raw fields."""

import copy
import pickle
from dataclasses import FrozenInstanceError
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import cases, geometries

from cupycorr import Geometry, correlation
from cupycorr.geometry import Axis

PARAMETERS = (
    "kernel_size",
    "patch_size",
    "stride",
    "padding",
    "dilation",
    "dilation_patch",
    "first_displacement",
)
AT_LEAST_ONE = ("kernel_size", "patch_size", "stride", "dilation")


# Sizes.


@given(cases())
def test_output_size_is_the_literal_formula(case):
    (_, _, h, w), g = case
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = g.kernel_size, g.stride, g.padding, g.dilation
    oh = (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    ow = (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    assert g.output_size(h, w) == (oh, ow)


@given(cases())
def test_cost_shape_is_samples_patch_and_output_size(case):
    shape, geometry = case
    outputs = geometry.output_size(*shape[2:])
    assert geometry.cost_shape(shape) == (shape[0], *geometry.patch_size, *outputs)


@given(cases())
def test_last_taps_fit_and_others_would_not(case):
    shape, geometry = case
    for axis, size in zip((geometry.y, geometry.x), shape[2:], strict=True):
        end = axis.output_size(size) * axis.stride - axis.stride + axis.taps_extent
        padded = size + 2 * axis.padding
        assert end <= padded < end + axis.stride


@pytest.mark.parametrize("stride", [1, 2, 7])
@pytest.mark.parametrize("size", [(4, 9), (9, 4), (0, 9)])
def test_taps_that_span_more_than_the_padded_image_are_refused(size, stride):
    geometry = Geometry(kernel_size=3, stride=stride, dilation=2)
    with pytest.raises(ValueError, match="taps must fit into the padded image") as error:
        geometry.output_size(*size)
    for shown in ("(5, 5)", "kernel_size (3, 3)", "dilation (2, 2)", f"image {size}", "(0, 0)"):
        assert shown in str(error.value)


def test_taps_that_span_the_padded_image_has_one_output():
    assert Geometry(3, dilation=2, padding=1, stride=5).output_size(3, 4) == (1, 1)


def test_padding_makes_an_empty_image_legal():
    assert Geometry(padding=1).output_size(0, 3) == (2, 5)


@given(geometries())
def test_taps_extent_reaches_from_the_first_to_the_last_tap(geometry):
    for extent, k, d in zip(
        geometry.taps_extent, geometry.kernel_size, geometry.dilation, strict=True
    ):
        taps = [u * d for u in range(k)]
        assert extent == max(taps) - min(taps) + 1


@given(geometries())
def test_taps_is_the_number_of_taps(geometry):
    kh, kw = geometry.kernel_size
    assert geometry.taps == len(list(product(range(kh), range(kw))))


@given(geometries())
def test_displacements_start_at_the_first_and_are_dilation_patch_apart(geometry):
    for number in (0, 1):
        first, step = geometry.first_displacement[number], geometry.dilation_patch[number]
        literal = [first + p * step for p in range(geometry.patch_size[number])]
        assert list(geometry.displacements[number]) == literal


@given(st.integers(1, 50), st.integers(1, 9))
def test_default_patch_starts_radius_steps_before_zero(patch_size, step):
    geometry = Geometry(patch_size=patch_size, dilation_patch=step)
    assert geometry.first_displacement == (-((patch_size - 1) // 2) * step,) * 2


@pytest.mark.parametrize(("number", "name"), [(0, "y"), (1, "x")])
def test_axis_holds_one_half_of_every_parameter(number, name):
    geometry = Geometry((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14))
    assert getattr(geometry, name) == Axis(*range(1 + number, 15, 2))


# The value object.


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("value", [4, np.int64(4), np.uint8(4), (4, 4), [4, 4], np.array(4)])
def test_integers_of_any_kind_widen_to_a_pair_of_ints(name, value):
    pair = getattr(Geometry(**{name: value}), name)
    assert [(number, type(number)) for number in pair] == [(4, int)] * 2


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize(
    "value",
    [True, (True, 1), 1.0, (1, 2.0), "1", "12", (1, 2, 3), (1,), (), [[1, 2]], (None, 1),
     {1, 2}, 1j, np.bool_(True), np.float32(1), np.array([1, 2])],
    ids=repr,
)  # fmt: skip
def test_parameter_that_is_not_an_int_or_a_pair_is_refused_by_name(name, value):
    with pytest.raises(TypeError) as error:
        Geometry(**{name: value})
    assert str(error.value) == f"{name} must be an int or a pair of ints, got {value!r}"


@pytest.mark.parametrize("name", [n for n in PARAMETERS if n != "first_displacement"])
def test_none_is_refused_by_name(name):
    with pytest.raises(TypeError) as error:
        Geometry(**{name: None})
    assert str(error.value) == f"{name} must be an int or a pair of ints, got None"


@pytest.mark.parametrize("name", AT_LEAST_ONE)
@pytest.mark.parametrize("value", [0, -1, (0, 1), (1, -3), [1, 0], np.int32(0)], ids=repr)
def test_parameter_below_one_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name) as error:
        Geometry(**{name: value})
    assert str(error.value) == f"{name} must be at least 1, got {value!r}"


@pytest.mark.parametrize("value", [0, (0, -1), [1, 0], np.int32(0)], ids=repr)
def test_displacements_must_differ(value):
    with pytest.raises(
        ValueError, match="dilation_patch must be at least 1 or at most -1"
    ) as error:
        Geometry(dilation_patch=value)
    assert str(error.value).endswith(f"got {value!r}")


def test_displacements_may_run_downwards():
    geometry = Geometry(patch_size=(3, 4), dilation_patch=(2, -3), first_displacement=(1, 2))
    assert geometry.displacements == (range(1, 7, 2), range(2, -10, -3))
    assert geometry.ascending.displacements == (range(1, 7, 2), range(-7, 5, 3))
    assert Geometry(patch_size=5, dilation_patch=-1).first_displacement == (2, 2)


@pytest.mark.parametrize("name", [n for n in PARAMETERS if n != "first_displacement"])
@pytest.mark.parametrize("value", [2**31, 2**62, (1, 2**62), 2**70, np.int64(2**62)], ids=repr)
def test_parameter_that_is_too_large_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name) as error:
        Geometry(**{name: value})
    assert str(error.value) == f"{name} must be at most 2147483647, got {value!r}"


@pytest.mark.parametrize("first", [2**62, -(2**62)])
def test_first_displacement_that_is_too_far_is_refused_by_name(first):
    with pytest.raises(ValueError, match=r"^first_displacement must be at (most|least) "):
        Geometry(first_displacement=first)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_largest_parameters_are_computed_with(library):
    xp = pytest.importorskip(library)
    geometry = Geometry(patch_size=9, dilation_patch=2**31 - 1)
    maps = xp.ones((1, 2, 3, 4), dtype=xp.float32)
    assert correlation(maps, maps, geometry).sum() == maps.sum()  # displacement 0 alone meets


@pytest.mark.parametrize("name", ["padding", "first_displacement"])
@pytest.mark.parametrize("value", [-7, (0, -1)])
def test_padding_and_first_displacement_may_be_negative(name, value):
    pair = value if isinstance(value, tuple) else (value, value)
    assert getattr(Geometry(**{name: value}), name) == pair


@given(geometries())
def test_repr_evaluates_to_an_equal_geometry(geometry):
    assert eval(repr(geometry)) == geometry


@pytest.mark.parametrize(
    ("geometry", "text"),
    [
        (Geometry(), "Geometry()"),
        (Geometry(3, (1, 9), padding=1), "Geometry(kernel_size=3, patch_size=(1, 9), padding=1)"),
        (Geometry(patch_size=3, first_displacement=-1), "Geometry(patch_size=3)"),
        (Geometry.from_taichi(4, 3), "Geometry(patch_size=3, dilation_patch=3, "
                                     "first_displacement=-4)"),
    ],
)  # fmt: skip
def test_repr_shows_what_differs_from_the_defaults(geometry, text):
    assert repr(geometry) == text


@given(geometries())
def test_equal_geometries_have_equal_hashes(geometry):
    twin = Geometry(*(getattr(geometry, name) for name in PARAMETERS))
    assert (twin, hash(twin)) == (geometry, hash(geometry))


@pytest.mark.parametrize("name", PARAMETERS)
def test_geometries_that_differ_in_one_parameter_are_unequal(name):
    assert Geometry(**{name: (2, 3)}) != Geometry(**{name: (3, 2)})


@pytest.mark.parametrize(
    "twin", [copy.copy, copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))]
)
def test_copies_are_equal_in_every_part(twin):
    geometry = Geometry((3, 2), (2, 5), (2, 1), (1, -1), (1, 2), (3, 1), (4, -7))
    other = twin(geometry)
    assert (other, other.y, other.x) == (geometry, geometry.y, geometry.x)


@pytest.mark.parametrize("name", [*PARAMETERS, "y", "x", "anything"])
def test_geometry_cannot_be_changed(name):
    with pytest.raises(FrozenInstanceError):
        setattr(Geometry(), name, (2, 2))
