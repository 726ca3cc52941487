"""The door of the flow-guided lookup: check arrays once, and dispatch once to an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cupycorr import api
from cupycorr.cpu import lookup as cpu
from cupycorr.cpu import pooling
from cupycorr.lookup import Lookup, check, check_map, check_range, convert_all, scale_of


def pyramid(fmap2: Any, lookup: Lookup) -> tuple[Any, ...]:
    """Pool a map to the levels that a lookup samples, once for all lookups of an image pair.

    Parameters
    ----------
    fmap2 : array (N, C, H, W), float16|bfloat16|float32|float64
        The map that is looked up: a NumPy or CuPy array or a torch tensor, of any strides.
    lookup : Lookup
        Says how many levels there are, and how they are pooled.

    Returns
    -------
    tuple of array (N, C, h, w)
        ``lookup.levels`` maps, of the sizes of `Lookup.level_sizes`, that lie in memory as
        (N, h, w, C). The first is fmap2 itself if it lies so. Each cell is the mean of cells of
        the level before, summed in float32 (float64 maps: float64) and rounded.

    Raises
    ------
    TypeError
        If fmap2 is not a floating array, or lookup no Lookup.
    ValueError
        If fmap2 has not four axes, or a level would have no cell.
    """
    library = api.library_of(("fmap2",), (fmap2,))
    check_lookup(lookup)
    if library.startswith("torch"):
        from cupycorr.torch import lookup as tensors

        return tensors.pyramid(fmap2, lookup)
    check_map(tuple(fmap2.shape), api.dtype_name(fmap2.dtype))
    sizes = lookup.level_sizes(*fmap2.shape[2:])
    if library == "cupy":
        from cupycorr.cuda import lookup as cuda

        with fmap2.device:
            levels = _levels_like(fmap2, sizes)
            cuda.run("pyramid", {"fmap2": fmap2, "levels": levels}, lookup, 1.0)
        return tuple(levels)
    levels = _levels_like(fmap2, sizes)
    if levels[0] is not fmap2:
        levels[0][...] = fmap2
    pooling.pyramid([_by_cells(level) for level in levels], lookup.pool)
    return tuple(levels)


def correlation_lookup(
    fmap1: Any,
    fmap2: Any,
    coords: Any,
    lookup: Lookup,
    *,
    scale: float | None = None,
    index1: Any = None,
    index2: Any = None,
) -> Any:
    """Compute the costs of a patch of displacements around given coordinates.

    This is what RAFT-like networks look up in each iteration. The volume of all pairs is never
    made: memory grows with the positions times the patch.

    Parameters
    ----------
    fmap1 : array (N, C, *P), float16|bfloat16|float32|float64
        Vectors at any positions P, (H1, W1) for instance. NumPy or CuPy arrays or torch tensors, of
        any strides, like all others.
    fmap2 : array (N, C, H, W), or the sequence of its levels
        The map that is looked up, of the same dtype. It is pooled first; give `pyramid`'s levels,
        or any others, if there is more than one lookup.
    coords : array (N, 2, *P), float32, or float64 with float64 maps
        Where each position is believed to lie in fmap2: x and y, in pixels of level 0.
    lookup : Lookup
        Which displacements around the coordinates are compared, on which levels.
    scale : float, optional
        What costs are multiplied by; by default 1 / sqrt(C).
    index1, index2 : array (E,), int32|int64, optional
        The maps that each entry of coords (E, 2, *P) compares, where entries are edges of a graph
        of images. fmap1 and fmap2 then may have any numbers of maps.

    Returns
    -------
    array (N, levels, PH, PW, *P)
        Of the maps' dtype, contiguous; (N, levels, PW, PH, *P) in the order "xy".

    Raises
    ------
    TypeError
        If the maps are not floating arrays of one library and dtype, coords have another dtype,
        indices are no integers, or lookup is no Lookup.
    ValueError
        If shapes do not match, a level has no cell, or arrays are on several devices.
    IndexError
        If an index of NumPy arrays is out of range. On a GPU that is no term: the cost is 0.

    Notes
    -----
    Definition: `Lookup`. Nothing outside of a level counts, nor a corner whose weight is 0. Far
    outside, and at infinity, costs are 0; where a coordinate is NaN, so are all of its costs.
    Coordinates are floored in their own dtype, products and interpolation are computed in float32
    (float64), and each cost is rounded once. Results are the same bits each time.

    >>> lookup = Lookup(radius=4, levels=4)
    >>> levels = pyramid(fmap2, lookup)
    >>> cost = correlation_lookup(fmap1, levels, coords, lookup)  # (N, 4, 9, 9, H1, W1)
    """
    names, arrays, levels = _arguments(fmap1, fmap2, coords, index1, index2)
    library = api.library_of(names, arrays)
    check_lookup(lookup)
    if library.startswith("torch"):
        from cupycorr.torch import lookup as tensors

        return tensors.correlation_lookup(fmap1, fmap2, coords, lookup, scale, index1, index2)
    _check(names, arrays, lookup)
    if levels is None:
        levels = pyramid(fmap2, lookup)
    inputs = {"fmap1": fmap1, "levels": levels, "coords": coords}
    inputs |= {"index1": index1, "index2": index2}
    shapes = {"cost": lookup.cost_shape(fmap1.shape, coords.shape)}
    run = _on_device if library == "cupy" else _on_cpu
    return run("cost", inputs, shapes, lookup, scale_of(scale, fmap1.shape[1]))["cost"]


def correlation_lookup_vjp(
    grad_cost: Any,
    fmap1: Any,
    fmap2: Any,
    coords: Any,
    lookup: Lookup,
    *,
    scale: float | None = None,
    index1: Any = None,
    index2: Any = None,
    needs: tuple[bool, bool, bool] = (True, True, False),
) -> tuple[Any, Any, Any]:
    """Compute the gradients of a lookup's costs (vector-Jacobian products).

    For NumPy and CuPy arrays; torch tensors have autograd.

    Parameters
    ----------
    grad_cost : array of the cost's shape and the maps' dtype
        The gradient of a scalar with respect to the costs.
    fmap1, fmap2, coords, lookup, scale, index1, index2
        As for `correlation_lookup`.
    needs : (bool, bool, bool), default (True, True, False)
        Which of the gradients with respect to fmap1, fmap2 and coords to compute.

    Returns
    -------
    (array (N, C, *P), array (N, C, H, W) or tuple of those of levels, array (N, 2, *P))
        The gradients, of their operands' dtypes, None where not needed. Those of levels, if levels
        were given, lie in memory as (N, h, w, C); the others are contiguous.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `correlation_lookup`; ValueError also if grad_cost has not the shape of the cost,
        TypeError if needs has not three entries.

    Notes
    -----
    The cost is not differentiable where a coordinate is an integer; the gradient is that from the
    right. Where a coordinate is NaN, so are its two gradients, and the maps get nothing from there.
    """
    names, arrays, levels = _arguments(fmap1, fmap2, coords, index1, index2)
    library = api.library_of_arrays((*names, "grad_cost"), (*arrays, grad_cost))
    check_lookup(lookup)
    try:
        need1, need2, need_coords = needs
    except (TypeError, ValueError):
        raise TypeError(f"needs must be three bools, got {needs!r}") from None
    _check(names, arrays, lookup)
    cost_shape = lookup.cost_shape(fmap1.shape, coords.shape)
    check_grad(grad_cost, fmap1, cost_shape)
    is_map = levels is None
    levels = pyramid(fmap2, lookup) if levels is None else levels
    inputs = {"fmap1": fmap1, "levels": levels, "coords": coords, "grad_cost": grad_cost}
    inputs |= {"index1": index1, "index2": index2}
    shapes: dict[str, Any] = {}
    if need1:
        shapes["grad_fmap1"] = fmap1.shape
    if need2:
        shapes["grad_levels"] = [level.shape for level in levels]
    if need_coords:
        shapes["grad_coords"] = coords.shape
    run = _on_device if library == "cupy" else _on_cpu
    grads = run("grads", inputs, shapes, lookup, scale_of(scale, fmap1.shape[1]))
    grad2 = tuple(grads["grad_levels"]) if need2 else None
    if grad2 is not None and is_map:
        grad2 = _pooled_back(library, grad2, fmap2, lookup)
    return grads.get("grad_fmap1"), grad2, grads.get("grad_coords")


def _arguments(
    fmap1: Any, fmap2: Any, coords: Any, index1: Any, index2: Any
) -> tuple[tuple[str, ...], tuple[Any, ...], Sequence[Any] | None]:
    """Return the names of all arrays, the arrays, and the levels if they are given."""
    levels = fmap2 if isinstance(fmap2, (tuple, list)) else None
    named = {"fmap1": fmap1}
    if levels is None:
        named["fmap2"] = fmap2
    else:
        named.update((f"fmap2[{number}]", level) for number, level in enumerate(levels))
    named["coords"] = coords
    indices = ("index1", index1), ("index2", index2)
    named.update((name, index) for name, index in indices if index is not None)
    return tuple(named), tuple(named.values()), levels


def _check(names: tuple[str, ...], arrays: tuple[Any, ...], lookup: Lookup) -> None:
    """Check a lookup's arrays, which are of one library."""
    check(
        {name: tuple(array.shape) for name, array in zip(names, arrays, strict=True)},
        {name: api.dtype_name(array.dtype) for name, array in zip(names, arrays, strict=True)},
        lookup,
    )
    named = dict(zip(names, arrays, strict=True))
    check_devices(names, arrays)
    if not isinstance(arrays[0], np.ndarray):
        return
    for name, maps in (("index1", arrays[0]), ("index2", arrays[1])):
        index = named.get(name)
        if index is not None:
            check_range(name, index, len(maps))


def check_devices(names: tuple[str, ...], arrays: tuple[Any, ...]) -> None:
    """Check that arrays of one library are on one device."""
    if not isinstance(arrays[0], np.ndarray):
        devices = [array.device for array in arrays]
        if devices != devices[:1] * len(devices):
            raise ValueError(
                f"{api.enumerated(names)} must be on one device, got {api.enumerated(devices)}"
            )


def check_grad(grad_cost: Any, like: Any, shape: tuple[int, ...]) -> None:
    """Check the gradient of a cost of some shape, and of the dtype of ``like``."""
    got, wanted = api.dtype_name(grad_cost.dtype), api.dtype_name(like.dtype)
    if got != wanted or tuple(grad_cost.shape) != shape:
        raise (TypeError if got != wanted else ValueError)(
            f"grad_cost must have the cost's shape {shape} and dtype {wanted}, got "
            f"{tuple(grad_cost.shape)} and {got}"
        )


def check_lookup(lookup: Any) -> None:
    """Check that a lookup is one."""
    if not isinstance(lookup, Lookup):
        raise TypeError(f"lookup must be a Lookup, got {type(lookup).__name__}")


def _levels_like(fmap2: Any, sizes: list[tuple[int, int]]) -> list[Any]:
    """Return arrays for the levels of a map: the map itself as the first if it lies like them."""
    module: Any = np if isinstance(fmap2, np.ndarray) else cupy_module()
    dtype = fmap2.dtype.newbyteorder("=")
    levels = [_channels_last(module, (*fmap2.shape[:2], *size), dtype) for size in sizes]
    if fmap2.dtype.isnative and fmap2.transpose(0, 2, 3, 1).flags.c_contiguous:
        levels[0] = fmap2
    return levels


def _channels_last(module: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    maps, channels, height, width = shape
    return module.empty((maps, height, width, channels), dtype).transpose(0, 3, 1, 2)


def _on_cpu(
    what: str, inputs: dict[str, Any], shapes: dict[str, Any], lookup: Lookup, scale: float
) -> dict[str, Any]:
    """Compute results of some names and shapes from checked NumPy arrays."""
    results = results_like(np, inputs, shapes, inputs["fmap1"].dtype)
    cpu.run(what, convert_all({**inputs, **results}, api.storage), lookup, scale)
    return results


def _on_device(
    what: str, inputs: dict[str, Any], shapes: dict[str, Any], lookup: Lookup, scale: float
) -> dict[str, Any]:
    """Compute results of some names and shapes from checked CuPy arrays."""
    from cupycorr.cuda import lookup as cuda

    with inputs["fmap1"].device:
        results = results_like(cupy_module(), inputs, shapes, inputs["fmap1"].dtype)
        arrays = {**inputs, **results}
        if "grad_cost" in arrays:
            arrays["grad_cost"] = cupy_module().ascontiguousarray(arrays["grad_cost"])
        cuda.run(what, arrays, lookup, scale)
    return results


def results_like(
    module: Any,
    inputs: dict[str, Any],
    shapes: dict[str, Any],
    dtype: Any,
    channels_last: bool = True,
) -> dict[str, Any]:
    """Return uninitialised arrays for results."""
    dtype, results = dtype.newbyteorder("="), {}
    for name, shape in shapes.items():
        if name == "grad_levels":
            make = _channels_last if channels_last else _contiguous
            results[name] = [make(module, level, dtype) for level in shape]
        elif name == "grad_coords":
            results[name] = module.empty(shape, inputs["coords"].dtype.newbyteorder("="))
        else:
            results[name] = module.empty(shape, dtype)
    return results


def _contiguous(module: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    return module.empty(shape, dtype)


def _pooled_back(library: str, grads: tuple[Any, ...], fmap2: Any, lookup: Lookup) -> Any:
    """Return the gradient of a map from those of its levels."""
    if library == "cupy":
        from cupycorr.cuda import lookup as cuda

        with fmap2.device:
            grad = cupy_module().empty(fmap2.shape, fmap2.dtype)
            arrays = {"grad_levels": list(grads), "grad_fmap2": grad}
            cuda.run("pyramid_grads", arrays, lookup, 1.0)
        return grad
    grad = np.empty(fmap2.shape, fmap2.dtype.newbyteorder("="))
    pooling.pyramid_grads([_by_cells(level) for level in grads], _by_cells(grad), lookup.pool)
    return grad


def _by_cells(fmap: Any) -> Any:
    """Return a map (F, C, H, W) as the engine pools it, (F, H, W, C)."""
    return np.moveaxis(api.storage(fmap), 1, -1)


def cupy_module() -> Any:
    """Return CuPy, which has been imported: an array is its."""
    import cupy

    return cupy
