"""Cost volumes of groups of channels, and of maps whose pixels are scaled to length 1.

Both are cost volumes of other maps: groups are samples of fewer channels, which contiguous maps
have in their memory already, and pixels are scaled before they are multiplied.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cupycorr import api
from cupycorr.geometry import integer
from cupycorr.layer import Layer

SHORTEST = 1e-12
"""Pixels that are shorter are divided by this, as torch.nn.functional.normalize does."""


def correlate(
    fmap1: Any, fmap2: Any, layer: Layer, groups: int | None, cosine: bool, allow_tf32: bool
) -> Any:
    """Compute a cost volume; see `cupycorr.correlation`."""
    one, two = _grouped(fmap1, fmap2, layer, groups, cosine)
    if cosine:
        are_tensors = api.library_of(("fmap1",), (fmap1,)).startswith("torch")
        scale = _unit_tensor if are_tensors else _unit
        one, two = scale(one), scale(two)
    cost = api.correlate(one, two, layer, allow_tf32=allow_tf32)
    if groups is None:
        return cost
    # Traced by torch.fx, a shape can be indexed and no more.
    return cost.reshape(fmap1.shape[0], groups, *(cost.shape[axis] for axis in range(1, 5)))


def differentiate(
    grad_cost: Any,
    fmap1: Any,
    fmap2: Any,
    layer: Layer,
    needs: tuple[bool, bool],
    groups: int | None,
    cosine: bool,
    allow_tf32: bool,
) -> tuple[Any, Any]:
    """Compute the gradients of that; see `cupycorr.correlation_vjp`."""
    api.library_of_arrays(("fmap1", "fmap2", "grad_cost"), (fmap1, fmap2, grad_cost))
    one, two = _grouped(fmap1, fmap2, layer, groups, cosine)
    if groups is not None:
        if np.ndim(grad_cost) != 6 or grad_cost.shape[1] != groups:
            raise ValueError(
                f"grad_cost must have the shape (N, {groups}, PH, PW, OH, OW), got "
                f"{np.shape(grad_cost)}"
            )
        grad_cost = grad_cost.reshape(-1, *grad_cost.shape[2:])
    maps = (_unit(one), _unit(two)) if cosine else (one, two)
    grad1, grad2 = api.differentiate(grad_cost, *maps, layer, needs, allow_tf32)

    def finished(grad: Any, fmap: Any) -> Any:
        if grad is None:
            return None
        return (_unit_vjp(grad, fmap) if cosine else grad).reshape(fmap1.shape)

    return finished(grad1, one), finished(grad2, two)


def _grouped(fmap1: Any, fmap2: Any, layer: Layer, groups: int | None, cosine: bool) -> list[Any]:
    """Check maps, and make samples of their groups of channels."""
    if cosine and layer.l1:
        raise ValueError("normalize='cosine' must come with similarity 'product', got 'l1'")
    names, maps = ("fmap1", "fmap2"), (fmap1, fmap2)
    library = api.library_of(names, maps)
    if groups is not None:
        groups = integer("groups", groups, least=1)
    if library != "torch.fx":
        api._check(names, maps, layer.geometry, api.is_traced(library, fmap1))
        if groups is not None and fmap1.shape[1] % groups:
            raise ValueError(
                f"groups must divide the maps' {fmap1.shape[1]} channels, got {groups}"
            )
    if groups is None:
        return list(maps)
    return [
        fmap.reshape(fmap.shape[0] * groups, fmap.shape[1] // groups, fmap.shape[2], fmap.shape[3])
        for fmap in maps
    ]


def _unit_tensor(fmap: Any) -> Any:
    """Scale the pixels of a tensor to length 1, and round once."""
    import torch

    if isinstance(fmap, torch.Tensor):
        wide = fmap if fmap.dtype is torch.float64 else fmap.float()
    else:  # torch.fx traces, and the dtype is not known
        wide = fmap * fmap.new_ones(1, dtype=torch.float32)
    return torch.nn.functional.normalize(wide, dim=1, eps=SHORTEST).to(fmap.dtype)


def _unit(fmap: Any) -> Any:
    """Scale the pixels of an array to length 1, and round once."""
    wide, length = _measured(fmap)
    return (wide / length).astype(fmap.dtype)


def _unit_vjp(grad: Any, fmap: Any) -> Any:
    """Return the gradient of `_unit`: what is across the pixel, divided by its length."""
    wide, length = _measured(fmap)
    unit, grad_unit = wide / length, grad.astype(wide.dtype)
    along = (unit * grad_unit).sum(1, keepdims=True) * (length > SHORTEST)
    return ((grad_unit - unit * along) / length).astype(fmap.dtype)


def _measured(fmap: Any) -> tuple[Any, Any]:
    """Return an array in the format of its sums, and its pixels' lengths."""
    wide = fmap if fmap.dtype.itemsize == 8 else fmap.astype(np.float32)
    return wide, np.maximum(np.sqrt((wide * wide).sum(1, keepdims=True)), SHORTEST)
