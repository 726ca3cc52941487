"""The door of samples of explicit cost volumes: as `sampling`, with a map for each position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cupycorr import api
from cupycorr.cpu import pooling
from cupycorr.cpu import volume as cpu
from cupycorr.lookup import Lookup, check_samples, check_volume, convert_all
from cupycorr.sampling import (
    check_devices,
    check_grad,
    check_lookup,
    cupy_module,
    results_like,
)


def volume_pyramid(volume: Any, lookup: Lookup) -> tuple[Any, ...]:
    """Pool an explicit cost volume to the levels that a lookup samples.

    Parameters
    ----------
    volume : array (N, *P, H, W), float16|bfloat16|float32|float64
        A map of costs for each position: NumPy or CuPy array, or torch tensor.
    lookup : Lookup
        Says how many levels there are, and how they are pooled.

    Returns
    -------
    tuple of array (N, *P, h, w)
        ``lookup.levels`` volumes, the first of which is the given one, rounded as `pyramid`'s.

    Raises
    ------
    TypeError, ValueError
        As `pyramid`.
    """
    library = api.library_of(("volume",), (volume,))
    check_lookup(lookup)
    if library.startswith("torch"):
        from cupycorr.torch import volumes as tensors

        return tensors.volume_pyramid(volume, lookup)
    check_volume(tuple(volume.shape), api.dtype_name(volume.dtype))
    sizes = lookup.level_sizes(*volume.shape[-2:])
    module = np if library == "numpy" else cupy_module()
    dtype = volume.dtype.newbyteorder("=")
    levels = [volume, *(module.empty((*volume.shape[:-2], *size), dtype) for size in sizes[1:])]
    flat = [level.reshape(-1, *level.shape[-2:]) for level in levels]
    if library == "numpy":
        pooling.pyramid([api.storage(level) for level in flat], lookup.pool)
    elif lookup.levels > 1:
        from cupycorr.cuda import lookup as cuda

        with volume.device:
            # Maps of one channel: their channels lie side by side, in whatever order.
            fmap2, *others = [level[:, None] for level in flat]
            cuda.run("pyramid", {"fmap2": fmap2, "levels": [fmap2, *others]}, lookup, 1.0)
    return tuple(levels)


def volume_lookup(volume: Any, coords: Any, lookup: Lookup) -> Any:
    """Sample an explicit cost volume at a patch of displacements around given coordinates.

    For volumes that are there anyway, or are small, as in stereo: `correlation_lookup` needs none.

    Parameters
    ----------
    volume : array (N, *P, H, W), or the sequence of its levels, float16|bfloat16|float32|float64
        A map of costs for each position P. It is pooled first; give `volume_pyramid`'s levels, or
        any others, if there is more than one lookup.
    coords : array (N, 2, *P), float32, or float64 with float64 volumes
        Where each position looks in its map: x and y, in cells of level 0.
    lookup : Lookup
        Which displacements around the coordinates are sampled, on which levels.

    Returns
    -------
    array (N, levels, PH, PW, *P)
        Of the volume's dtype, contiguous; (N, levels, PW, PH, *P) in the order "xy".

    Raises
    ------
    TypeError, ValueError
        As `correlation_lookup`.

    Notes
    -----
    With the symbols of `Lookup`, the volume in the place of S, and scale 1. Groups of costs are an
    axis of P, along which coords may be repeated without a copy.
    """
    names, arrays = _volume_arguments(volume, coords)
    library = api.library_of(names, arrays)
    check_lookup(lookup)
    if library.startswith("torch"):
        from cupycorr.torch import volumes as tensors

        return tensors.volume_lookup(volume, coords, lookup)
    _check_volume(names, arrays, lookup)
    levels = volume if isinstance(volume, (tuple, list)) else volume_pyramid(volume, lookup)
    shapes = {"cost": _sampled_shape(levels, coords, lookup)}
    run = _volume_on_device if library == "cupy" else _volume_on_cpu
    return run("cost", {"levels": levels, "coords": coords}, shapes, lookup)["cost"]


def volume_lookup_vjp(
    grad_cost: Any,
    volume: Any,
    coords: Any,
    lookup: Lookup,
    *,
    needs: tuple[bool, bool] = (True, False),
) -> tuple[Any, Any]:
    """Compute the gradients of a volume's samples (vector-Jacobian products).

    For NumPy and CuPy arrays; torch tensors have autograd.

    Parameters
    ----------
    grad_cost : array of the samples' shape and the volume's dtype
        The gradient of a scalar with respect to the samples.
    volume, coords, lookup
        As for `volume_lookup`.
    needs : (bool, bool), default (True, False)
        Which of the gradients with respect to volume and coords to compute.

    Returns
    -------
    (array (N, *P, H, W) or tuple of those of levels, array (N, 2, *P))
        The gradients, contiguous, of their operands' dtypes; None where not needed.

    Raises
    ------
    TypeError, ValueError
        As `correlation_lookup_vjp`.
    """
    names, arrays = _volume_arguments(volume, coords)
    library = api.library_of_arrays((*names, "grad_cost"), (*arrays, grad_cost))
    check_lookup(lookup)
    try:
        need_volume, need_coords = needs
    except (TypeError, ValueError):
        raise TypeError(f"needs must be a pair of bools, got {needs!r}") from None
    _check_volume(names, arrays, lookup)
    is_volume = not isinstance(volume, (tuple, list))
    levels = volume_pyramid(volume, lookup) if is_volume else volume
    check_grad(grad_cost, levels[0], _sampled_shape(levels, coords, lookup))
    inputs = {"levels": levels, "coords": coords, "grad_cost": grad_cost}
    shapes: dict[str, Any] = {}
    if need_volume:
        shapes["grad_levels"] = [level.shape for level in levels]
    if need_coords:
        shapes["grad_coords"] = coords.shape
    run = _volume_on_device if library == "cupy" else _volume_on_cpu
    results = run("grads", inputs, shapes, lookup)
    grads = tuple(results["grad_levels"]) if need_volume else None
    if grads is None or not is_volume:
        return grads, results.get("grad_coords")
    total = (np if library == "numpy" else cupy_module()).empty_like(grads[0])
    flat = [grad.reshape(-1, *grad.shape[-2:]) for grad in grads]
    out = total.reshape(flat[0].shape)
    if library == "numpy":
        pooling.pyramid_grads([api.storage(grad) for grad in flat], api.storage(out), lookup.pool)
    else:
        from cupycorr.cuda import lookup as cuda

        one = {"grad_levels": [grad[:, None] for grad in flat], "grad_fmap2": out[:, None]}
        with total.device:
            cuda.run("pyramid_grads", one, lookup, 1.0)
    return total, results.get("grad_coords")


def _volume_arguments(volume: Any, coords: Any) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Return the names of all arrays, and the arrays."""
    if not isinstance(volume, (tuple, list)):
        return ("volume", "coords"), (volume, coords)
    names = (*(f"volume[{number}]" for number in range(len(volume))), "coords")
    return names, (*volume, coords)


def _check_volume(names: tuple[str, ...], arrays: tuple[Any, ...], lookup: Lookup) -> None:
    """Check a volume's arrays, which are of one library."""
    check_samples(
        {name: tuple(array.shape) for name, array in zip(names, arrays, strict=True)},
        {name: api.dtype_name(array.dtype) for name, array in zip(names, arrays, strict=True)},
        lookup,
    )
    check_devices(names, arrays)


def _sampled_shape(levels: Sequence[Any], coords: Any, lookup: Lookup) -> tuple[int, ...]:
    return lookup.cost_shape((0, 0, *coords.shape[2:]), coords.shape)


def _volume_on_cpu(
    what: str, inputs: dict[str, Any], shapes: dict[str, Any], lookup: Lookup
) -> dict[str, Any]:
    """Compute results of some names and shapes from checked NumPy arrays."""
    results = results_like(np, inputs, shapes, inputs["levels"][0].dtype, channels_last=False)
    cpu.run(what, convert_all({**inputs, **results}, api.storage), lookup)
    return results


def _volume_on_device(
    what: str, inputs: dict[str, Any], shapes: dict[str, Any], lookup: Lookup
) -> dict[str, Any]:
    """Compute results of some names and shapes from checked CuPy arrays."""
    from cupycorr.cuda import volume_lookup as cuda

    with inputs["coords"].device:
        results = results_like(
            cupy_module(), inputs, shapes, inputs["levels"][0].dtype, channels_last=False
        )
        levels = [cupy_module().ascontiguousarray(level) for level in inputs["levels"]]
        cuda.run(what, {**inputs, "levels": levels, **results}, lookup)
    return results
