"""Samples of explicit cost volumes as torch's dispatcher knows them; see `lookup`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cupycorr.cpu import volume as cpu
from cupycorr.lookup import Lookup, check_samples, check_volume, convert_all
from cupycorr.torch import memory, operators
from cupycorr.torch.lookup import (
    Ops,
    batched,
    check_devices,
    check_grad,
    described,
    dtype_name,
    parsed,
    register,
)

_ARRAYS = "Tensor[] levels, Tensor coords"
_FIELDS = "int[2] radius, int[2] dilation_patch, int[2] pool, bool x_first"


def _samples(levels: Sequence[Tensor], coords: Tensor, *fields: Any) -> Tensor:
    _check_samples(levels, coords, fields)
    cost = _fake_samples(levels, coords, *fields)
    tensors = {"levels": list(levels), "coords": coords, "cost": cost}
    _compute_samples("cost", tensors, fields)
    return cost


def _samples_grads(
    grad_cost: Tensor, levels: Sequence[Tensor], coords: Tensor, *fields: Any
) -> tuple[list[Tensor], Tensor]:
    *patch, needs = fields
    _check_samples(levels, coords, patch)
    check_grad(grad_cost, _fake_samples(levels, coords, *patch))
    results = _fake_samples_grads(grad_cost, levels, coords, *fields)
    tensors: dict[str, Any] = {"levels": list(levels), "coords": coords, "grad_cost": grad_cost}
    names = ("grad_levels", "grad_coords")
    tensors |= {name: grad for name, grad, need in zip(names, results, needs, strict=True) if need}
    _compute_samples("grads", tensors, patch)
    return results


def _check_samples(levels: Sequence[Tensor], coords: Tensor, patch: Sequence[Any]) -> None:
    tensors = {"coords": coords, **{f"volume[{k}]": level for k, level in enumerate(levels)}}
    check_samples(*described(tensors), parsed(len(levels), (*patch[:3], 1.0, patch[3])))
    check_devices(tensors)


def _compute_samples(what: str, tensors: dict[str, Any], patch: Sequence[Any]) -> None:
    """Compute samples of dense tensors, or their gradients, on their own memory."""
    lookup = parsed(len(tensors["levels"]), (*patch[:3], 1.0, patch[3]))
    if 0 in tensors["coords"].shape:
        return
    if tensors["coords"].is_cuda:
        memory.lend_lookup(what, tensors, lookup, volume=True)
    else:
        cpu.run(
            what, convert_all(tensors, memory.numpy_view), lookup, threads=torch.get_num_threads()
        )


def _fake_samples(levels: Sequence[Tensor], coords: Tensor, *fields: Any) -> Tensor:
    radius, _, _, x_first = fields
    patch = [2 * reach + 1 for reach in radius]
    shape = *(patch[::-1] if x_first else patch), *coords.shape[2:]
    return levels[0].new_empty(coords.shape[0], len(levels), *shape)


def _fake_samples_grads(
    grad_cost: Tensor, levels: Sequence[Tensor], coords: Tensor, *fields: Any
) -> tuple[list[Tensor], Tensor]:
    need_levels, need_coords = fields[-1]
    return (
        [level.new_empty(level.shape if need_levels else (0,)) for level in levels],
        coords.new_empty(coords.shape if need_coords else (0,)),
    )


def _vmap_samples(info: Any, in_dims: Any, levels: Sequence[Tensor], *arguments: Any) -> Any:
    coords = batched(arguments[0], in_dims[1], info.batch_size).flatten(0, 1)
    maps = _joint(levels, in_dims[0], info.batch_size)
    cost = Ops.volume_lookup(maps, coords, *arguments[1:])
    return cost.unflatten(0, (info.batch_size, -1)), 0


def _vmap_samples_grads(
    info: Any, in_dims: Any, grad_cost: Tensor, levels: Sequence[Tensor], *arguments: Any
) -> Any:
    count = info.batch_size
    grad_cost = batched(grad_cost, in_dims[0], count).flatten(0, 1)
    coords = batched(arguments[0], in_dims[2], count).flatten(0, 1)
    maps = _joint(levels, in_dims[1], count)
    grads, grad_coords = Ops.volume_lookup_grads(grad_cost, maps, coords, *arguments[1:])
    results = (
        [grad.reshape(count, *_apart(grad, count)) for grad in grads],
        grad_coords.reshape(count, *_apart(grad_coords, count)),
    )
    return results, ([0] * len(grads), 0)


def _joint(tensors: Sequence[Tensor], in_dims: Any, count: int) -> list[Tensor]:
    """Return tensors with the batch folded into the samples."""
    return [
        batched(tensor, dim, count).flatten(0, 1)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]


def _apart(tensor: Tensor, count: int) -> tuple[int, ...]:
    """Return the shape of an entry of a batch; a result that is not needed has no elements."""
    return (tensor.shape[0] // count, *tensor.shape[1:])


_LIBRARY = torch.library.Library("cupycorr", "FRAGMENT")  # type: ignore[no-untyped-call]
register(
    _LIBRARY, "volume_lookup", f"({_ARRAYS}, {_FIELDS}) -> Tensor",
    _samples, _fake_samples, _vmap_samples,
)  # fmt: skip
register(
    _LIBRARY,
    "volume_lookup_grads",
    f"(Tensor grad_cost, {_ARRAYS}, {_FIELDS}, bool[] needs) -> (Tensor[], Tensor)",
    _samples_grads, _fake_samples_grads, _vmap_samples_grads,
)  # fmt: skip


# What the door calls.


def volume_pyramid(volume: Any, lookup: Lookup) -> tuple[Any, ...]:
    """Return the levels of a tensor; see `cupycorr.volume_pyramid`."""
    if isinstance(volume, Tensor):
        check_volume(tuple(volume.shape), dtype_name(volume))
        lookup.level_sizes(*volume.shape[-2:])
    levels = [volume]
    for _ in range(1, lookup.levels):
        maps = levels[-1].flatten(0, -3).unsqueeze(1)
        pooled = torch.nn.functional.avg_pool2d(maps, lookup.pool)
        levels.append(pooled.reshape(*volume.shape[:-2], *pooled.shape[-2:]))
    return tuple(levels)


def volume_lookup(volume: Any, coords: Any, lookup: Lookup) -> Any:
    """Return samples of tensors; see `cupycorr.volume_lookup`."""
    is_map = not isinstance(volume, (tuple, list))
    levels = list(volume_pyramid(volume, lookup) if is_map else volume)
    if isinstance(coords, Tensor):
        tensors = {"coords": coords, **{f"volume[{k}]": level for k, level in enumerate(levels)}}
        check_samples(*described(tensors), lookup)
        operators.check(levels[0], levels[0])
    fields = lookup.radius, lookup.dilation_patch, lookup.pool, lookup.x_first
    return Ops.volume_lookup(levels, coords, *fields)
