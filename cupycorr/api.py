"""The public functions: checks at the door, then dispatch to the engine of the arrays' library."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cupycorr import numpy_engine
from cupycorr.geometry import Geometry, IntOrPair

FLOATING = ("float16", "bfloat16", "float32", "float64")


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
        The feature maps: NumPy arrays or torch tensors, of any strides.
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
    return _correlate(input1, input2, geometry, False, ("input1", "input2"))


def correlation(fmap1: Any, fmap2: Any, geometry: Geometry, *, normalize: bool = False) -> Any:
    """Compute the cost volume of two feature maps for a geometry.

    Parameters
    ----------
    fmap1, fmap2 : array (N, C, H, W), float16|bfloat16|float32|float64
        The feature maps: NumPy arrays or torch tensors, of any strides.
    geometry : Geometry
        Which positions and displacements are compared.
    normalize : bool, default False
        Divide by the number of terms of a full window, C * KH * KW.

    Returns
    -------
    array (N, PH, PW, OH, OW)
        Of the maps' library, dtype and device, contiguous.

    Raises
    ------
    TypeError, ValueError
        As `spatial_correlation_sample`.
    """
    if not isinstance(geometry, Geometry):
        raise TypeError(f"geometry must be a Geometry, got {type(geometry).__name__}")
    return _correlate(fmap1, fmap2, geometry, normalize, ("fmap1", "fmap2"))


def correlation_vjp(
    grad_cost: Any,
    fmap1: Any,
    fmap2: Any,
    geometry: Geometry,
    *,
    normalize: bool = False,
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Any, Any]:
    """Compute the gradients of a cost volume with respect to its maps (vector-Jacobian products).

    For NumPy arrays; torch tensors have autograd.

    Parameters
    ----------
    grad_cost : array (N, PH, PW, OH, OW)
        The gradient of a scalar with respect to the cost volume, of the maps' dtype.
    fmap1, fmap2 : array (N, C, H, W), float16|bfloat16|float32|float64
        The feature maps that the cost volume was computed from.
    geometry : Geometry
        The geometry that it was computed with.
    normalize : bool, default False
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
        cost volume.

    Notes
    -----
    With the symbols of `Geometry`, and only terms whose positions exist::

        grad_fmap1[n, c, Y, X]             = sum of grad_cost[n, p, q, y, x] * fmap2[n, c, Y + dy, X + dx]
        grad_fmap2[n, c, Y + dy, X + dx]   = sum of grad_cost[n, p, q, y, x] * fmap1[n, c, Y, X]
    """
    if not isinstance(geometry, Geometry):
        raise TypeError(f"geometry must be a Geometry, got {type(geometry).__name__}")
    names = ("fmap1", "fmap2", "grad_cost")
    library = _check(names, (fmap1, fmap2, grad_cost), geometry)
    if library == "torch":
        raise TypeError("correlation_vjp takes NumPy arrays, got torch tensors; use autograd")
    grad, one, two = (_numpy_storage(a) for a in (grad_cost, fmap1, fmap2))
    dtype = _numpy_dtype(fmap1)
    grads = [np.empty(one.shape, dtype) if needed else None for needed in needs]
    numpy_engine.backward(
        grad, one, two, *(None if g is None else _numpy_storage(g) for g in grads),
        geometry, divisor=_divisor(fmap1.shape, geometry, normalize),
    )
    return grads[0], grads[1]


def _correlate(
    fmap1: Any, fmap2: Any, geometry: Geometry, normalize: bool, names: tuple[str, str]
) -> Any:
    """Check and dispatch."""
    library = _check(names, (fmap1, fmap2), geometry)
    if library == "torch":
        from cupycorr import torch_ops

        return torch_ops.correlation(fmap1, fmap2, geometry, normalize)
    cost = np.empty(geometry.cost_shape(fmap1.shape), _numpy_dtype(fmap1))
    numpy_engine.forward(
        _numpy_storage(fmap1), _numpy_storage(fmap2), _numpy_storage(cost), geometry,
        divisor=_divisor(fmap1.shape, geometry, normalize),
    )
    return cost


def _check(names: tuple[str, ...], arrays: tuple[Any, ...], geometry: Geometry) -> str:
    """Check maps, and an upstream gradient if given as third; return their library's name."""
    libraries = [_library(name, array) for name, array in zip(names, arrays, strict=True)]
    if len(set(libraries)) > 1:
        raise TypeError(f"{_all(names)} must be arrays of one library, got {_all(libraries)}")
    if libraries[0] == "cupy":
        raise RuntimeError(
            f"{_all(names)} are CuPy arrays, and this version computes on the CPU only; "
            "convert them with cupy.asnumpy"
        )
    dtypes = [str(array.dtype).removeprefix("torch.").lstrip("<>=") for array in arrays]
    dtypes = [np.dtype(d).name if libraries[0] == "numpy" and d != "bfloat16" else d for d in dtypes]
    for name, dtype in zip(names, dtypes, strict=True):
        if dtype not in FLOATING:
            raise TypeError(f"{name} must have one of the dtypes {_all(FLOATING)}, got {dtype}")
    if len(set(dtypes)) > 1:
        raise TypeError(f"{_all(names)} must have equal dtypes, got {_all(dtypes)}")
    if libraries[0] == "torch" and len({array.device for array in arrays}) > 1:
        devices = [str(array.device) for array in arrays]
        raise ValueError(f"{_all(names)} must be on one device, got {_all(devices)}")
    shapes = [tuple(array.shape) for array in arrays]
    for name, shape in zip(names[:2], shapes[:2], strict=True):
        if len(shape) != 4:
            raise ValueError(f"{name} must have the shape (N, C, H, W), got {shape}")
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{_all(names[:2])} must have equal shapes, got {shapes[0]} and {shapes[1]}"
        )
    cost_shape = geometry.cost_shape(shapes[0])
    if len(arrays) == 3 and shapes[2] != cost_shape:
        raise ValueError(f"{names[2]} must have the cost's shape {cost_shape}, got {shapes[2]}")
    return libraries[0]


def _library(name: str, array: Any) -> str:
    """Return which library an array belongs to, without importing any."""
    for base in type(array).__mro__:
        root = base.__module__.partition(".")[0]
        if root in ("numpy", "cupy", "torch") and hasattr(array, "dtype"):
            return root
    raise TypeError(f"{name} must be a NumPy array or a torch tensor, got {type(array).__name__}")


def _all(words: tuple[str, ...] | list[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1]


def _divisor(shape: tuple[int, ...], geometry: Geometry, normalize: bool) -> int:
    """Return what every sum is divided by."""
    return max(1, shape[1]) * geometry.window_taps if normalize else 1


def _numpy_dtype(array: npt.NDArray[Any]) -> np.dtype[Any]:
    return array.dtype.newbyteorder("=")


def _numpy_storage(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a plain array in native byte order, bfloat16 as its uint16 bits."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError("maps must not be masked arrays, fill them first (numpy.ma.filled)")
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        return array.view(np.uint16)
    return array.astype(_numpy_dtype(array), copy=False)
