"""The door: the public functions check their arrays once, and dispatch once to an engine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cupycorr.cpu import engine as cpu
from cupycorr.geometry import Geometry, IntOrPair
from cupycorr.layer import DTYPES, Layer

Shape = tuple[int, ...]


def spatial_correlation_sample(
    input1: Any,
    input2: Any,
    kernel_size: IntOrPair = 1,
    patch_size: IntOrPair = 1,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    dilation_patch: IntOrPair = 1,
) -> Any:
    """Compute the cost volume of two feature maps.

    Takes the arguments of spatial-correlation-sampler's function of the same name, in its order.

    Parameters
    ----------
    input1, input2 : array (N, C, H, W), float16|bfloat16|float32|float64
        The feature maps: NumPy or CuPy arrays or torch tensors, of any strides.
    kernel_size, patch_size, stride, padding, dilation, dilation_patch : int or (int, int)
        See `Geometry`.

    Returns
    -------
    array (N, PH, PW, OH, OW)
        Of the maps' library, dtype and device, contiguous; PH, PW = patch_size and
        OH = (H + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1, OW likewise.

    Raises
    ------
    TypeError
        If the maps are not floating arrays of one library and dtype, or a parameter is not an
        int or a pair of ints.
    ValueError
        If shapes differ or are not (N, C, H, W), devices differ, a parameter is out of range, or
        the taps do not fit into the padded image.

    Notes
    -----
    The sum is not normalised; terms whose positions lie outside a map are left out. float16 and
    bfloat16 accumulate in float32 and are rounded once. Definition: `Geometry`.
    """
    parameters = kernel_size, patch_size, stride, padding, dilation, dilation_patch
    # Other types may be equal to ints, and are refused or widened: they are looked at each time.
    remembered = {*map(type, parameters)} == {int} and not _is_compiling()
    layer = (_remembered if remembered else _layer)(*parameters)
    return correlate(input1, input2, layer, names=("input1", "input2"))


def _layer(*parameters: Any) -> Layer:
    return Layer(Geometry(*parameters))


_remembered = lru_cache(maxsize=1024)(_layer)


def _layer_of(geometry: Any, similarity: Any, normalize: Any) -> Layer:
    known = type(geometry) is Geometry and type(similarity) is str and type(normalize) is bool
    remembered = known and not _is_compiling()
    return (_remembered_of if remembered else Layer)(geometry, similarity, normalize)


def _is_compiling() -> bool:
    """Tell whether torch.compile reads this code; it complains of functions that remember."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


_remembered_of = lru_cache(maxsize=1024)(Layer)


def correlation(
    fmap1: Any,
    fmap2: Any,
    geometry: Geometry,
    *,
    normalize: bool | str = False,
    similarity: str = "product",
    groups: int | None = None,
    allow_tf32: bool = False,
) -> Any:
    """Compute the cost volume of two feature maps for a geometry.

    Parameters
    ----------
    fmap1, fmap2 : array (N, C, H, W), float16|bfloat16|float32|float64
        The feature maps: NumPy or CuPy arrays or torch tensors, of any strides.
    geometry : Geometry
        Which positions and displacements are compared.
    normalize : bool or "cosine", default False
        Divide by the number of terms of all taps, C * KH * KW; or scale every pixel of both maps,
        the C channels of a position, to length 1 (but divide by no less than 1e-12).
    similarity : {"product", "l1"}, default "product"
        Sum products, or absolute differences: small where the maps are alike.
    groups : int, optional
        Compare so many groups of neighbouring channels apart. C is then the channels of a group.
    allow_tf32 : bool, default False
        Whether products of CuPy arrays of float32 may be computed by tensor cores, which round the
        maps to TF32, of 11 binary digits in place of 24. torch tensors follow
        ``torch.set_float32_matmul_precision``.

    Returns
    -------
    array (N, PH, PW, OH, OW), or (N, groups, PH, PW, OH, OW) given groups
        Of the maps' library, dtype and device, contiguous.

    Raises
    ------
    TypeError, ValueError
        As `spatial_correlation_sample`; ValueError also for another similarity or normalize, and
        for groups that do not divide the channels; TypeError for torch tensors with allow_tf32.

    Notes
    -----
    "l1", with the symbols of `Geometry`::

        cost[n, p, q, y, x] = sum over c, i, j of |fmap1[n, c, Y, X] - fmap2[n, c, Y + dy, X + dx]|

    Here zeros stand outside the maps, so that a term with one position outside counts. Source:
    the SUBTRACT correlation of FlowNet2's Caffe layer (E. Ilg et al., "FlowNet 2.0", CVPR 2017),
    which divides like ``normalize``.
    """
    cosine = normalize == "cosine"
    layer = _layer_of(geometry, similarity, False if cosine else normalize)
    if cosine or groups is not None:
        from cupycorr import grouped

        return grouped.correlate(fmap1, fmap2, layer, groups, cosine, allow_tf32)
    return correlate(fmap1, fmap2, layer, allow_tf32=allow_tf32)


def correlation_vjp(
    grad_cost: Any,
    fmap1: Any,
    fmap2: Any,
    geometry: Geometry,
    *,
    normalize: bool | str = False,
    similarity: str = "product",
    groups: int | None = None,
    needs: tuple[bool, bool] = (True, True),
    allow_tf32: bool = False,
) -> tuple[Any, Any]:
    """Compute the gradients of a cost volume with respect to its maps (vector-Jacobian products).

    For NumPy and CuPy arrays; torch tensors have autograd.

    Parameters
    ----------
    grad_cost : array (N, PH, PW, OH, OW), or (N, groups, PH, PW, OH, OW) given groups
        The gradient of a scalar with respect to the cost volume, of the maps' dtype.
    fmap1, fmap2 : array (N, C, H, W), float16|bfloat16|float32|float64
        The feature maps that the cost volume was computed from.
    geometry : Geometry
        The geometry that it was computed with.
    normalize, similarity, groups
        As in `correlation`.
    needs : (bool, bool), default (True, True)
        Which of the two gradients to compute.
    allow_tf32 : bool, default False
        As in `correlation`; what is rounded to TF32 is grad_cost, summed over taps, and the maps.

    Returns
    -------
    (array (N, C, H, W) or None, array (N, C, H, W) or None)
        The gradients with respect to fmap1 and fmap2; None where not needed. They are contiguous,
        but if CuPy arrays lie in memory as (N, H, W, C), both of them, so do their gradients.

    Raises
    ------
    TypeError, ValueError
        As `spatial_correlation_sample`; ValueError also if grad_cost has not the shape of the
        cost volume, TypeError if needs is not a pair.

    Notes
    -----
    With the symbols of `Geometry`, and only terms whose positions exist::

        grad_fmap1[n, c, Y, X]           = sum of grad_cost[n, p, q, y, x]
                                                  * fmap2[n, c, Y + dy, X + dx]
        grad_fmap2[n, c, Y + dy, X + dx] = sum of grad_cost[n, p, q, y, x]
                                                  * fmap1[n, c, Y, X]

    For "l1" the sign of ``fmap1[n, c, Y, X] - fmap2[n, c, Y + dy, X + dx]`` takes the place of the
    other map's value in grad_fmap1, and the opposite sign in grad_fmap2. As in torch, it is 0 where
    values are equal, or NaN.
    """
    cosine = normalize == "cosine"
    layer = _layer_of(geometry, similarity, False if cosine else normalize)
    if cosine or groups is not None:
        from cupycorr import grouped

        return grouped.differentiate(
            grad_cost, fmap1, fmap2, layer, needs, groups, cosine, allow_tf32
        )
    return differentiate(grad_cost, fmap1, fmap2, layer, needs, allow_tf32)


def correlate(
    fmap1: Any,
    fmap2: Any,
    layer: Layer,
    names: tuple[str, str] = ("fmap1", "fmap2"),
    allow_tf32: bool = False,
) -> Any:
    """Check two maps, which the caller knows by ``names``, and dispatch; see `correlation`."""
    library = library_of(names, (fmap1, fmap2))
    if allow_tf32 and library.startswith("torch"):
        raise TypeError(
            "allow_tf32 must be left out for torch tensors, got True; they follow "
            "torch.set_float32_matmul_precision"
        )
    if library.startswith("torch") and layer.geometry.descends:
        axes = [axis for axis, step in enumerate(layer.geometry.dilation_patch, 1) if step < 0]
        return correlate(fmap1, fmap2, layer.ascending, names).flip(axes)
    if library == "torch.fx":
        from cupycorr.torch import operators

        return operators.trace(layer, fmap1, fmap2)
    if library == "torch":
        from cupycorr.torch import derivatives, operators

        fmap1, fmap2 = operators.autocast(fmap1, fmap2)
        _check(names, (fmap1, fmap2), layer.geometry, operators.traces(fmap1))
        operators.check(fmap1, fmap2)
        operator = derivatives.OF_L1_COST if layer.l1 else derivatives.OF_COST
        return derivatives.derive(operator, layer, fmap1, fmap2)[0]
    shapes = {"cost": _check(names, (fmap1, fmap2), layer.geometry)}
    inputs = {"fmap1": fmap1, "fmap2": fmap2}
    if library == "cupy":
        return _on_device("cost", inputs, shapes, layer, allow_tf32)["cost"]
    return _on_cpu("cost", inputs, shapes, layer)["cost"]


def differentiate(
    grad_cost: Any,
    fmap1: Any,
    fmap2: Any,
    layer: Layer,
    needs: tuple[bool, bool] = (True, True),
    allow_tf32: bool = False,
) -> tuple[Any, Any]:
    """Check a gradient and two maps, and dispatch; see `correlation_vjp`."""
    names, arrays = ("fmap1", "fmap2", "grad_cost"), (fmap1, fmap2, grad_cost)
    library = library_of_arrays(names, arrays)
    try:
        need1, need2 = needs
    except (TypeError, ValueError):
        raise TypeError(f"needs must be a pair of bools, got {needs!r}") from None
    _check(names, arrays, layer.geometry)
    wanted = {"grad_fmap1": need1, "grad_fmap2": need2}
    shapes = {name: fmap1.shape for name, needed in wanted.items() if needed}
    inputs = dict(zip(names, arrays, strict=True))
    if library == "cupy":
        grads = _on_device("grads", inputs, shapes, layer, allow_tf32)
    else:
        grads = _on_cpu("grads", inputs, shapes, layer)
    return grads.get("grad_fmap1"), grads.get("grad_fmap2")


def _on_cpu(
    what: str, inputs: dict[str, Any], shapes: dict[str, Shape], layer: Layer
) -> dict[str, Any]:
    """Compute results of some names and shapes from checked NumPy arrays."""
    dtype = inputs["fmap1"].dtype
    native = dtype if dtype.isnative else dtype.newbyteorder("=")
    results = {}
    for name, shape in shapes.items():
        results[name] = np.empty(shape, native)
    arrays = dict(inputs, **results)
    for name, array in arrays.items():
        if type(array) is not np.ndarray or array.dtype not in _STORED:
            arrays[name] = storage(array)
    if layer.geometry.descends:
        for name in VOLUMES & {*arrays}:
            arrays[name] = arrays[name][layer.geometry.reversal]
        layer = layer.ascending
    cpu.run(what, arrays, layer)
    return results


VOLUMES = {"cost", "grad_cost"}
"""The arrays that have displacements."""
_STORED = {np.dtype(name) for name in DTYPES if name != "bfloat16"}
"""The dtypes that the engine takes as they are."""


def _on_device(
    what: str,
    inputs: dict[str, Any],
    shapes: dict[str, Shape],
    layer: Layer,
    allow_tf32: bool = False,
) -> dict[str, Any]:
    """Compute results of some names and shapes from checked CuPy arrays."""
    import cupy

    from cupycorr.cuda import engine as cuda

    fmap1 = inputs["fmap1"]
    if fmap1.device.id != cuda.current_device():
        with fmap1.device:
            return _on_device(what, inputs, shapes, layer, allow_tf32)
    if layer.geometry.descends:
        reversal, turned = layer.geometry.reversal, dict(inputs)
        if "grad_cost" in inputs:
            turned["grad_cost"] = inputs["grad_cost"][reversal]
        results = _on_device(what, turned, shapes, layer.ascending, allow_tf32)
        if "cost" in results:
            results["cost"] = cupy.ascontiguousarray(results["cost"][reversal])
        return results
    maps = [array for name, array in inputs.items() if name in cuda.MAPS]
    channels_last = not fmap1.flags.c_contiguous and all(
        array.transpose(0, 2, 3, 1).flags.c_contiguous for array in maps
    )
    results = {}
    for name, shape in shapes.items():
        if channels_last and name in cuda.GRADIENTS:
            samples, channels, *size = shape
            result = cupy.ndarray((samples, *size, channels), fmap1.dtype).transpose(0, 3, 1, 2)
        else:
            result = cupy.ndarray(shape, fmap1.dtype)
        results[name] = result
    arrays = inputs | results
    for name, array in inputs.items():
        if not (array.flags.c_contiguous or (channels_last and name in cuda.MAPS)):
            arrays[name] = cupy.ascontiguousarray(array)
    cuda.run(what, arrays, layer, channels_last=channels_last, tf32=allow_tf32)
    return results


def library_of_arrays(names: tuple[str, ...], arrays: tuple[Any, ...]) -> str:
    """Return the library of NumPy or CuPy arrays; refuse tensors, which have autograd."""
    library = library_of(names, arrays)
    if library.startswith("torch"):
        raise TypeError(
            f"{enumerated(names)} must be NumPy or CuPy arrays, got torch tensors; differentiate "
            "those with torch.autograd"
        )
    return library


def library_of(names: tuple[str, ...], arrays: tuple[Any, ...]) -> str:
    """Return the library that arrays belong to; raise unless it is one and the same."""
    kinds = {*map(type, arrays)}
    for library, exact in (("numpy", "ndarray"), ("torch", "Tensor"), ("cupy", "ndarray")):
        if library in sys.modules and kinds == {getattr(sys.modules[library], exact, None)}:
            return library
    libraries = [_library_of_one(array) for array in arrays]
    known = ("numpy", "cupy", "torch")
    if libraries[0] in known and libraries == libraries[:1] * len(libraries):
        return libraries[0]
    if {"torch.fx"} <= {*libraries} <= {"torch.fx", "torch"}:
        return "torch.fx"
    for name, array, library in zip(names, arrays, libraries, strict=True):
        got = type(array).__name__
        if library == "":
            raise TypeError(f"{name} must be a NumPy or CuPy array or a torch tensor, got {got}")
        if library == "numpy.ma":
            raise TypeError(f"{name} must not be masked, got {got}; fill it with numpy.ma.filled")
    raise TypeError(
        f"{enumerated(names)} must be arrays of one library, got {enumerated(libraries)}"
    )


def _library_of_one(array: Any) -> str:
    """Return which library an array belongs to, without importing any; '' if it is no array."""
    if isinstance(array, np.ndarray):
        return "numpy.ma" if isinstance(array, np.ma.MaskedArray) else "numpy"
    if hasattr(array, "dtype"):
        for base in type(array).__mro__:
            root = base.__module__.partition(".")[0]
            if base.__module__ == "torch.fx.proxy":
                return "torch.fx"  # a value that torch.fx traces with
            if root in ("torch", "cupy"):
                return root
    return ""


def _check(
    names: tuple[str, ...], arrays: tuple[Any, ...], geometry: Geometry, traced: bool = False
) -> Shape:
    """Check maps, and a gradient if given as third, of one library; return the cost's shape.

    Sizes of arrays that are traced can be symbols, which have no hash.
    """
    dtypes = tuple([array.dtype for array in arrays])
    shapes = tuple([array.shape for array in arrays])
    cost_shape = (_agree if traced else _agreed)(names, dtypes, shapes, geometry)
    if not isinstance(arrays[0], np.ndarray):
        devices = [array.device for array in arrays]
        if devices != devices[:1] * len(devices):
            raise ValueError(
                f"{enumerated(names)} must be on one device, got {enumerated(devices)}"
            )
    return cost_shape


def _agree(
    names: tuple[str, ...], dtypes: tuple[Any, ...], shapes: tuple[Shape, ...], geometry: Geometry
) -> Shape:
    """Check what `_check` is given, as far as it is no memory; return the cost's shape."""
    kinds, shapes = [dtype_name(dtype) for dtype in dtypes], tuple(map(tuple, shapes))
    if kinds != kinds[:1] * len(kinds):
        raise TypeError(f"{enumerated(names)} must have equal dtypes, got {enumerated(kinds)}")
    if kinds[0] not in DTYPES:
        allowed = enumerated(list(DTYPES), "or")
        raise TypeError(f"{enumerated(names)} must have dtype {allowed}, got {kinds[0]}")
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{enumerated(names[:2])} must have equal shapes, got {enumerated(shapes[:2])}"
        )
    if len(shapes[0]) != 4:
        raise ValueError(f"{enumerated(names[:2])} must have shape (N, C, H, W), got {shapes[0]}")
    cost_shape = geometry.cost_shape(shapes[0])
    if len(shapes) == 3 and shapes[2] != cost_shape:
        raise ValueError(
            f"{names[2]} must have the cost volume's shape {cost_shape}, got {shapes[2]}"
        )
    return cost_shape


_agreed = lru_cache(maxsize=1024)(_agree)


def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype of either library, without its byte order."""
    # numpy.dtype.name would take ten times as long.
    name = dtype.type.__name__ if isinstance(dtype, np.dtype) else str(dtype)
    return str(name).removeprefix("torch.")


def is_traced(library: str, fmap: Any) -> bool:
    """Tell whether sizes of a map may be symbols."""
    if library != "torch":
        return False
    from cupycorr.torch import operators

    return operators.traces(fmap)


def enumerated(values: Sequence[object], word: str = "and") -> str:
    """Enumerate values in a sentence."""
    return f"{', '.join(map(str, values[:-1]))} {word} {values[-1]}"


def storage(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a plain array in native byte order, bfloat16 as its uint16 bits."""
    array = np.asarray(array)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array.view(np.uint16) if dtype_name(array.dtype) == "bfloat16" else array
