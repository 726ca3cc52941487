"""The public functions: checks at the door, then dispatch to the engine of the arrays' library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cupycorr.cpu import engine as numpy_engine
from cupycorr.geometry import Geometry, IntOrPair

FLOATING = ("float16", "bfloat16", "float32", "float64")
SIMILARITIES = ("product", "l1")
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
        the window does not fit into the padded image.

    Notes
    -----
    The sum is not normalised; terms whose positions lie outside a map are left out. float16 and
    bfloat16 accumulate in float32 and are rounded once. Definition: `Geometry`.
    """
    geometry = Geometry(kernel_size, patch_size, stride, padding, dilation, dilation_patch)
    return correlate(input1, input2, geometry, names=("input1", "input2"))


def correlation(
    fmap1: Any,
    fmap2: Any,
    geometry: Geometry,
    *,
    normalize: bool = False,
    similarity: str = "product",
) -> Any:
    """Compute the cost volume of two feature maps for a geometry.

    Parameters
    ----------
    fmap1, fmap2 : array (N, C, H, W), float16|bfloat16|float32|float64
        The feature maps: NumPy or CuPy arrays or torch tensors, of any strides.
    geometry : Geometry
        Which positions and displacements are compared.
    normalize : bool, default False
        Divide by the number of terms of a full window, C * KH * KW.
    similarity : {"product", "l1"}, default "product"
        Sum products, or absolute differences: small where the maps are alike.

    Returns
    -------
    array (N, PH, PW, OH, OW)
        Of the maps' library, dtype and device, contiguous.

    Raises
    ------
    TypeError, ValueError
        As `spatial_correlation_sample`; ValueError also for another similarity.

    Notes
    -----
    "l1", with the symbols of `Geometry`::

        cost[n, p, q, y, x] = sum over c, i, j of |fmap1[n, c, Y, X] - fmap2[n, c, Y + dy, X + dx]|

    Here zeros stand outside the maps, so that a term with one position outside counts. Source:
    the SUBTRACT correlation of FlowNet2's Caffe layer (E. Ilg et al., "FlowNet 2.0", CVPR 2017),
    which divides like ``normalize``.
    """
    return correlate(fmap1, fmap2, geometry, normalize=normalize, similarity=similarity)


def correlation_vjp(
    grad_cost: Any,
    fmap1: Any,
    fmap2: Any,
    geometry: Geometry,
    *,
    normalize: bool = False,
    similarity: str = "product",
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Any, Any]:
    """Compute the gradients of a cost volume with respect to its maps (vector-Jacobian products).

    For NumPy and CuPy arrays; torch tensors have autograd.

    Parameters
    ----------
    grad_cost : array (N, PH, PW, OH, OW)
        The gradient of a scalar with respect to the cost volume, of the maps' dtype.
    fmap1, fmap2 : array (N, C, H, W), float16|bfloat16|float32|float64
        The feature maps that the cost volume was computed from.
    geometry : Geometry
        The geometry that it was computed with.
    normalize, similarity
        As in `correlation`.
    needs : (bool, bool), default (True, True)
        Which of the two gradients to compute.

    Returns
    -------
    (array (N, C, H, W) or None, array (N, C, H, W) or None)
        The gradients with respect to fmap1 and fmap2; None where not needed.

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
    _check_similarity(similarity)
    names, arrays = ("fmap1", "fmap2", "grad_cost"), (fmap1, fmap2, grad_cost)
    library = _library(names, arrays)
    if library == "torch":
        raise TypeError(
            f"{_all(names)} must be NumPy or CuPy arrays, got torch tensors; differentiate those "
            "with torch.autograd"
        )
    try:
        need1, need2 = needs
    except (TypeError, ValueError):
        raise TypeError(f"needs must be a pair of bools, got {needs!r}") from None
    _check(names, arrays, geometry)
    divisor = geometry.divisor(fmap1.shape[1], normalize)
    if library == "cupy":
        return cupy_gradients(
            grad_cost, fmap1, fmap2, geometry, divisor, (need1, need2), similarity=similarity
        )
    grad_fmap1, grad_fmap2 = (_empty(fmap1.shape, fmap1) if n else None for n in (need1, need2))
    numpy_engine.backward(
        _storage(grad_cost),
        _storage(fmap1),
        _storage(fmap2),
        None if grad_fmap1 is None else _storage(grad_fmap1),
        None if grad_fmap2 is None else _storage(grad_fmap2),
        geometry,
        similarity=similarity,
        divisor=divisor,
    )
    return grad_fmap1, grad_fmap2


def correlate(
    fmap1: Any,
    fmap2: Any,
    geometry: Geometry,
    *,
    normalize: bool = False,
    similarity: str = "product",
    names: tuple[str, str] = ("fmap1", "fmap2"),
) -> Any:
    """Check two maps, which the caller knows by ``names``, and dispatch; see `correlation`."""
    _check_similarity(similarity)
    library = _library(names, (fmap1, fmap2))
    if library == "torch":
        from cupycorr.torch import operators as torch_ops

        fmap1, fmap2 = torch_ops.autocast(fmap1, fmap2)
        _check(names, (fmap1, fmap2), geometry)
        return torch_ops.correlation(fmap1, fmap2, geometry, normalize, similarity)
    cost_shape = _check(names, (fmap1, fmap2), geometry)
    divisor = geometry.divisor(fmap1.shape[1], normalize)
    if library == "cupy":
        return cupy_cost(fmap1, fmap2, geometry, divisor, similarity=similarity)
    cost = _empty(cost_shape, fmap1)
    one, two, out = map(_storage, (fmap1, fmap2, cost))
    numpy_engine.forward(one, two, out, geometry, similarity=similarity, divisor=divisor)
    return cost


def cupy_cost(
    fmap1: Any,
    fmap2: Any,
    geometry: Geometry,
    divisor: int = 1,
    *,
    similarity: str = "product",
    plain: bool = False,
) -> Any:
    """Compute the cost volume of checked CuPy arrays; see `cuda_engine.forward`."""
    import cupy

    from cupycorr.cuda import engine as cuda_engine

    with fmap1.device:
        cost = cupy.empty(geometry.cost_shape(fmap1.shape), fmap1.dtype)
        one, two = map(cupy.ascontiguousarray, (fmap1, fmap2))
        options: dict[str, Any] = {"similarity": similarity, "divisor": divisor, "plain": plain}
        cuda_engine.forward(one, two, cost, geometry, **options)
    return cost


def cupy_gradients(
    grad_cost: Any,
    fmap1: Any,
    fmap2: Any,
    geometry: Geometry,
    divisor: int = 1,
    needs: tuple[bool, bool] = (True, True),
    *,
    similarity: str = "product",
    plain: bool = False,
) -> tuple[Any, Any]:
    """Compute the gradients of checked CuPy arrays; see `cuda_engine.backward`."""
    import cupy

    from cupycorr.cuda import engine as cuda_engine

    with fmap1.device:
        grad1, grad2 = (cupy.empty(fmap1.shape, fmap1.dtype) if n else None for n in needs)
        upstream, one, two = map(cupy.ascontiguousarray, (grad_cost, fmap1, fmap2))
        options: dict[str, Any] = {"similarity": similarity, "divisor": divisor, "plain": plain}
        cuda_engine.backward(upstream, one, two, grad1, grad2, geometry, **options)
    return grad1, grad2


def _check_similarity(similarity: str) -> None:
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be 'product' or 'l1', got {similarity!r}")


def _library(names: tuple[str, ...], arrays: tuple[Any, ...]) -> str:
    """Return the library that arrays belong to; raise unless it is one and the same."""
    libraries = [_library_of(array) for array in arrays]
    known = ("numpy", "cupy", "torch")
    if libraries.count(libraries[0]) == len(libraries) and libraries[0] in known:
        return libraries[0]
    for name, array, library in zip(names, arrays, libraries, strict=True):
        kind = type(array).__name__
        if library == "":
            raise TypeError(f"{name} must be a NumPy or CuPy array or a torch tensor, got {kind}")
        if library == "numpy.ma":
            raise TypeError(f"{name} must not be masked, got {kind}; fill it with numpy.ma.filled")
    raise TypeError(f"{_all(names)} must be arrays of one library, got {_all(libraries)}")


def _library_of(array: Any) -> str:
    """Return which library an array belongs to, without importing any; '' if it is no array."""
    if isinstance(array, np.ndarray):
        return "numpy.ma" if isinstance(array, np.ma.MaskedArray) else "numpy"
    if hasattr(array, "dtype"):
        for base in type(array).__mro__:
            root = base.__module__.partition(".")[0]
            if root in ("torch", "cupy"):
                return root
    return ""


def _check(names: tuple[str, ...], arrays: tuple[Any, ...], geometry: Geometry) -> Shape:
    """Check maps, and a gradient if given as third, of one library; return the cost's shape."""
    if not isinstance(geometry, Geometry):
        raise TypeError(f"geometry must be a Geometry, got {type(geometry).__name__}")
    dtypes = [_dtype_name(array.dtype) for array in arrays]
    if dtypes.count(dtypes[0]) != len(dtypes):
        raise TypeError(f"{_all(names)} must have equal dtypes, got {_all(dtypes)}")
    if dtypes[0] not in FLOATING:
        raise TypeError(f"{_all(names)} must have dtype {_all(FLOATING, 'or')}, got {dtypes[0]}")
    shapes = [tuple(array.shape) for array in arrays]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{_all(names[:2])} must have equal shapes, got {_all(shapes[:2])}")
    if len(shapes[0]) != 4:
        raise ValueError(f"{_all(names[:2])} must have shape (N, C, H, W), got {shapes[0]}")
    if not isinstance(arrays[0], np.ndarray):
        devices = [array.device for array in arrays]
        if devices.count(devices[0]) != len(devices):
            raise ValueError(f"{_all(names)} must be on one device, got {_all(devices)}")
    cost_shape = geometry.cost_shape(shapes[0])
    if len(shapes) == 3 and shapes[2] != cost_shape:
        raise ValueError(
            f"{names[2]} must have the cost volume's shape {cost_shape}, got {shapes[2]}"
        )
    return cost_shape


def _dtype_name(dtype: Any) -> str:
    """Return the name of a dtype of either library, without its byte order."""
    # numpy.dtype.name would take ten times as long.
    name = dtype.type.__name__ if isinstance(dtype, np.dtype) else str(dtype)
    return str(name).removeprefix("torch.")


def _all(values: Sequence[object], word: str = "and") -> str:
    """Enumerate values in a sentence."""
    return f"{', '.join(map(str, values[:-1]))} {word} {values[-1]}"


def _empty(shape: Shape, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array of another's dtype, in native byte order."""
    return np.empty(shape, like.dtype if like.dtype.isnative else like.dtype.newbyteorder("="))


def _storage(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a plain array in native byte order, bfloat16 as its uint16 bits."""
    array = np.asarray(array)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array.view(np.uint16) if _dtype_name(array.dtype) == "bfloat16" else array
