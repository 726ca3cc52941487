"""One setting of a correlation layer in the words of every system that has such a layer.

`Geometry`'s constructors read other systems' parameters. Here is the way back: the parameters by
which a system gets to a geometry, or why none do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from cupycorr.geometry import Axis, Geometry
from cupycorr.layer import Layer

Parameters = dict[str, Any]
REQUIRED = object()
"""Stands where a parameter has no default."""


class Inexpressible(ValueError):
    """A system has no parameters for a setting; the message says in a few words why."""


class Setting(NamedTuple):
    """What a layer computes from two maps, and how it lays that out."""

    layer: Layer
    flat: bool = False
    """Whether displacements are one axis, (N, PH * PW, OH, OW), and not two."""


class Vocabulary(NamedTuple):
    """How one system describes its layer."""

    defaults: Mapping[str, Any]
    """Of each parameter; REQUIRED also where a system has a default that is of no use."""
    read: Callable[..., Setting]
    """From all parameters; raises TypeError or ValueError."""
    write: Callable[[Setting], Parameters]
    """The parameters to give, for a `canonical` geometry; raises Inexpressible."""
    call: Callable[[Parameters], str]
    """Python for the layer's result on x1 and x2, with the names of cupycorr and its compat."""
    flat: bool = True
    normalize: bool | None = True
    """Whether it divides; None where a parameter says that."""
    similarities: tuple[str, ...] = ("product",)


def read(name: str, parameters: Mapping[str, Any]) -> Setting:
    """Read a system's parameters; missing ones have their defaults.

    Raises
    ------
    TypeError, ValueError
        If parameters are not valid, or a required one is missing.
    """
    values = {**VOCABULARIES[name].defaults, **parameters}
    for parameter, value in values.items():
        if value is REQUIRED:
            raise ValueError(f"{parameter} must be given for {name}, got no value")
    return VOCABULARIES[name].read(**values)


def write(name: str, setting: Setting) -> Parameters:
    """Return the parameters by which a system compares the same positions in the same order.

    It may divide and lay out its result otherwise, which `python` makes up for.

    Raises
    ------
    Inexpressible
        If there are none.
    """
    vocabulary = VOCABULARIES[name]
    _demand(setting.layer.similarity in vocabulary.similarities, "has products only")
    return vocabulary.write(
        setting._replace(layer=replace(setting.layer, geometry=canonical(setting.layer.geometry)))
    )


def python(name: str, setting: Setting) -> str:
    """Return Python for a setting: a system's layer on torch tensors x1 and x2.

    Values and shape are those of the setting, whatever the system.

    Raises
    ------
    Inexpressible
        If the system cannot express the setting.
    """
    vocabulary, geometry = VOCABULARIES[name], setting.layer.geometry
    line = vocabulary.call(write(name, setting))
    if setting.flat and not vocabulary.flat:
        line += ".flatten(1, 2)"
    if vocabulary.flat and not setting.flat:
        line += f".unflatten(1, {geometry.patch_size})"
    if vocabulary.normalize not in (None, setting.layer.normalize):
        sign, taps = "/" if setting.layer.normalize else "*", geometry.taps
        line += f" {sign} x1.shape[1]" if taps == 1 else f" {sign} ({taps} * x1.shape[1])"
    return line


def shape(name: str, setting: Setting, batch: int, height: int, width: int) -> tuple[int, ...]:
    """Return the shape of a system's own result for maps of a size.

    Raises
    ------
    ValueError
        If the window does not fit into the padded image.
    """
    rows, columns = setting.layer.geometry.patch_size
    patch = (rows * columns,) if VOCABULARIES[name].flat else (rows, columns)
    return (batch, *patch, *setting.layer.geometry.output_size(height, width))


def canonical(geometry: Geometry) -> Geometry:
    """Return the geometry with spacing 1 where there is one tap, or one displacement, to space."""
    dilation, dilation_patch = (
        (spacing[0] if count[0] > 1 else 1, spacing[1] if count[1] > 1 else 1)
        for count, spacing in (
            (geometry.kernel_size, geometry.dilation),
            (geometry.patch_size, geometry.dilation_patch),
        )
    )
    return Geometry(
        geometry.kernel_size,
        geometry.patch_size,
        geometry.stride,
        geometry.padding,
        dilation,
        dilation_patch,
        geometry.first_displacement,
    )


# cupycorr's own words; spatial-correlation-sampler's and mmcv's differ little.

_GEOMETRY: Parameters = {
    "kernel_size": 1,
    "patch_size": 1,
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "dilation_patch": 1,
}
_MMCV = {name: default for name, default in _GEOMETRY.items() if name != "patch_size"}
_OPTIONS: Parameters = {"normalize": False, "similarity": "product"}


def _read_cupycorr(normalize: bool, similarity: str, **geometry: Any) -> Setting:
    return Setting(Layer(Geometry(**geometry), similarity, normalize))


def _write_cupycorr(setting: Setting) -> Parameters:
    geometry = setting.layer.geometry
    parameters = _given(vars(geometry), _GEOMETRY)
    if not geometry.is_centred:
        parameters["first_displacement"] = _short(geometry.first_displacement)
    return parameters | _given(vars(setting.layer), _OPTIONS)


def _call_cupycorr(parameters: Parameters) -> str:
    fields = {name: value for name, value in parameters.items() if name not in _OPTIONS}
    options = {name: value for name, value in parameters.items() if name in _OPTIONS}
    return f"correlation({_arguments(options, 'x1', 'x2', repr(Geometry(**fields)))})"


def _read_sampler(**geometry: Any) -> Setting:
    return Setting(Layer(Geometry(**geometry)))


def _write_sampler(setting: Setting) -> Parameters:
    _demand(setting.layer.geometry.is_centred, "has centred patches only")
    return _given(vars(setting.layer.geometry), _GEOMETRY)


def _read_mmcv(**parameters: Any) -> Setting:
    return Setting(Layer(Geometry.from_mmcv(**parameters)))


def _write_mmcv(setting: Setting) -> Parameters:
    rows, columns = setting.layer.geometry.patch_size
    _demand(rows == columns and rows % 2 == 1, "has square patches of odd size only")
    _demand(setting.layer.geometry.is_centred, "has centred patches only")
    return {"max_displacement": rows // 2} | _given(vars(setting.layer.geometry), _MMCV)


# FlowNet's layer, in NVIDIA's words and in Caffe's, and Caffe's for stereo.


_CAFFE: Parameters = {
    "kernel_size": REQUIRED,
    "max_displacement": REQUIRED,
    "pad": 0,
    "stride_1": 1,
    "stride_2": 1,
    "correlation_type": "multiply",
}
SIMILARITIES = {"multiply": "product", "subtract": "l1"}
"""What is summed, by Caffe's correlation_type."""


def _read_nvidia(kernel_size: Any, **others: Any) -> Setting:
    geometry = Geometry.from_flownet(kernel_size=kernel_size, **others)
    if kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size must be odd to be translated, got {kernel_size}: for even windows nvidia "
            "has an output position more than others"
        )
    return Setting(Layer(geometry, normalize=True), flat=True)


def _write_nvidia(setting: Setting) -> Parameters:
    odd = all(size % 2 for size in setting.layer.geometry.kernel_size)
    _demand(odd, "has one output position more for even windows")
    pad, kernel_size, reach, stride, step = _flownet(*_one_axis(setting.layer.geometry))
    return {
        "pad_size": pad,
        "kernel_size": kernel_size,
        "max_displacement": reach,
        "stride1": stride,
        "stride2": step,
    }


def _read_caffe(
    kernel_size: Any,
    max_displacement: Any,
    pad: Any,
    stride_1: Any,
    stride_2: Any,
    correlation_type: str,
    single_direction: Any = None,
) -> Setting:
    layer = pad, kernel_size, max_displacement, stride_1, stride_2
    if single_direction is None:
        geometry = Geometry.from_flownet(*layer)
    else:
        geometry = Geometry.from_correlation1d(*layer, single_direction)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    if correlation_type not in SIMILARITIES:
        raise ValueError(
            f"correlation_type must be 'multiply' or 'subtract', got {correlation_type!r}"
        )
    return Setting(Layer(geometry, SIMILARITIES[correlation_type], True), flat=True)


def _write_caffe(setting: Setting) -> Parameters:
    return _caffe(setting.layer.similarity, *_flownet(*_one_axis(setting.layer.geometry)))


def _write_caffe1d(setting: Setting) -> Parameters:
    y, x = setting.layer.geometry.y, setting.layer.geometry.x
    _demand(y.patch_size == 1 and y.first_displacement == 0, "displaces horizontally only")
    _demand(y.padding == 0, "pads horizontally only")
    for name in ("kernel_size", "stride"):
        _demand(getattr(y, name) == getattr(x, name), f"has one {name} for both axes")
    direction, radius = 0, x.patch_size // 2
    if x.patch_size % 2 == 0 or not setting.layer.geometry.is_centred:
        directions = {(1 - x.patch_size) * x.dilation_patch: -1, 0: 1}
        _demand(x.first_displacement in directions, "displaces to one side, or as far to both")
        direction, radius = directions[x.first_displacement], x.patch_size - 1
    parameters = _caffe(setting.layer.similarity, *_flownet(x, radius))
    return parameters | {"single_direction": direction}


def _caffe(
    similarity: str, pad: int, kernel_size: int, reach: int, stride: int, step: int
) -> Parameters:
    optional: Parameters = {
        "pad": pad,
        "stride_1": stride,
        "stride_2": step,
        "correlation_type": "multiply" if similarity == "product" else "subtract",
    }
    return {"kernel_size": kernel_size, "max_displacement": reach} | _given(optional, _CAFFE)


def _one_axis(geometry: Geometry) -> tuple[Axis, int]:
    """Return the axis of which both are, and the displacements to either side of 0."""
    for name in Axis._fields:
        y, x = getattr(geometry, name)
        _demand(y == x, f"has one {name} for both axes")
    _demand(geometry.y.patch_size % 2 == 1, "has patches of odd size only")
    _demand(geometry.is_centred, "has centred patches only")
    return geometry.y, geometry.y.patch_size // 2


def _flownet(axis: Axis, radius: int) -> tuple[int, int, int, int, int]:
    """Return padding, window, largest displacement, and both steps, in FlowNet's words.

    Padding there is ``padding + max_displacement`` and not negative, and there are
    ``radius = max_displacement // step`` displacements to a side; of all largest displacements
    that fit, this is the smallest. Where nothing is displaced, any step does.
    """
    _demand(axis.kernel_size % 2 == 1, "has windows of odd size only")
    _demand(axis.dilation == 1, "has dense windows only")
    reach = max(radius * axis.dilation_patch, -axis.padding)
    step = axis.dilation_patch if radius else reach + 1
    _demand(reach < (radius + 1) * step, "crops no more than its largest displacement")
    return axis.padding + reach, axis.kernel_size, reach, axis.stride, step


# Taichi's layer, and S. Niklaus's two, which have few parameters.


def _read_taichi(max_disp: Any, dila_patch: Any) -> Setting:
    return Setting(Layer(Geometry.from_taichi(max_disp, dila_patch)), flat=True)


def _write_taichi(setting: Setting) -> Parameters:
    first, step = (
        setting.layer.geometry.first_displacement[0],
        setting.layer.geometry.dilation_patch[0],
    )
    if setting.layer.geometry.patch_size == (1, 1):
        step = 2 * abs(first) + 1  # so long that the second displacement is not reached
    _only(setting, Geometry.from_taichi(max(0, -first), step))
    return {"max_disp": -first} | _given({"dila_patch": step}, {"dila_patch": 1})


def _read_pwc() -> Setting:
    return Setting(Layer(Geometry(patch_size=9), normalize=True), flat=True)


def _write_pwc(setting: Setting) -> Parameters:
    _only(setting, _read_pwc().layer.geometry)
    return {}


def _read_liteflownet(intStride: Any) -> Setting:
    geometry = Geometry(patch_size=7, stride=intStride, dilation_patch=intStride)
    return Setting(Layer(geometry, normalize=True), flat=True)


def _write_liteflownet(setting: Setting) -> Parameters:
    stride = setting.layer.geometry.stride[0]
    _only(setting, _read_liteflownet(stride).layer.geometry)
    return {"intStride": stride}


def _only(setting: Setting, possible: Geometry) -> None:
    """Demand a geometry, the nearest that a system has; name what else would have to be so."""
    possible = canonical(possible)
    for name in Axis._fields:
        value, needed = getattr(setting.layer.geometry, name), getattr(possible, name)
        _demand(value == needed, f"has {name} {_short(needed)}, not {_short(value)}")


def _demand(condition: bool, reason: str) -> None:
    if not condition:
        raise Inexpressible(reason)


def _given(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Parameters:
    """Return those of the values that have a default and differ from it."""
    short = {name: _short(values[name]) for name in defaults if name in values}
    return {name: value for name, value in short.items() if value != defaults[name]}


def _short(value: Any) -> Any:
    """Return the number that a pair holds twice."""
    return value[0] if isinstance(value, tuple) and value[0] == value[1] else value


def _arguments(parameters: Parameters, *positional: str) -> str:
    return ", ".join([*positional, *(f"{name}={value!r}" for name, value in parameters.items())])


VOCABULARIES = {
    "cupycorr": Vocabulary(
        {**_GEOMETRY, "first_displacement": None, **_OPTIONS},
        _read_cupycorr,
        _write_cupycorr,
        _call_cupycorr,
        flat=False,
        normalize=None,
        similarities=("product", "l1"),
    ),
    "spatial-correlation-sampler": Vocabulary(
        _GEOMETRY,
        _read_sampler,
        _write_sampler,
        lambda given: f"spatial_correlation_sample({_arguments(given, 'x1', 'x2')})",
        flat=False,
        normalize=False,
    ),
    "nvidia": Vocabulary(
        # kernel_size 0 and max_displacement 0 are the module's own.
        {"pad_size": 0, "kernel_size": 1, "max_displacement": REQUIRED, "stride1": 1, "stride2": 2},
        _read_nvidia,
        _write_nvidia,
        lambda given: f"nvidia.Correlation({_arguments(given)})(x1, x2)",
    ),
    "caffe": Vocabulary(
        _CAFFE,
        _read_caffe,
        _write_caffe,
        lambda given: f"caffe.Correlation({_arguments(given)})(x1, x2)",
        similarities=("product", "l1"),
    ),
    "caffe-1d": Vocabulary(
        {**_CAFFE, "single_direction": REQUIRED},
        _read_caffe,
        _write_caffe1d,
        lambda given: f"caffe.Correlation1D({_arguments(given)})(x1, x2)",
        similarities=("product", "l1"),
    ),
    "taichi": Vocabulary(
        {"max_disp": REQUIRED, "dila_patch": 1},
        _read_taichi,
        _write_taichi,
        lambda given: f"taichi.CorrTaichi({_arguments(given)})(x1, x2)",
        normalize=False,
    ),
    "mmcv": Vocabulary(
        {**_MMCV, "max_displacement": REQUIRED},
        _read_mmcv,
        _write_mmcv,
        lambda given: f"mmcv.Correlation({_arguments(given)})(x1, x2)",
        flat=False,
        normalize=False,
    ),
    "pytorch-pwc": Vocabulary(
        {}, _read_pwc, _write_pwc, lambda _: "sniklaus.FunctionCorrelation(x1, x2)"
    ),
    "pytorch-liteflownet": Vocabulary(
        {"intStride": REQUIRED},
        _read_liteflownet,
        _write_liteflownet,
        lambda given: f"sniklaus.FunctionCorrelation({_arguments(given, 'x1', 'x2')})",
    ),
}
"""Every system's vocabulary."""
