"""The flow-guided lookup as torch's dispatcher knows it: schemas, values, shapes, derivatives.

The derivatives are in `lookup_derivatives`.

The operators are defined when this module is imported; ``import cupycorr.torch`` does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cupycorr.cpu import lookup as cpu
from cupycorr.cpu import pooling
from cupycorr.lookup import Lookup, check, check_map, check_range, convert_all, scale_of
from cupycorr.torch import lookup_derivatives, memory, operators

_FIELDS = "int[2] radius, int[2] dilation_patch, int[2] pool, float scale, bool x_first"
_ARRAYS = "Tensor fmap1, Tensor[] levels, Tensor coords, Tensor? index1, Tensor? index2"
_SCHEMAS = {
    "pyramid": "(Tensor fmap2, int levels, int[2] pool) -> Tensor[]",
    "pyramid_grads": "(Tensor[] grads, int[2] pool) -> Tensor",
    "lookup": f"({_ARRAYS}, {_FIELDS}) -> Tensor",
    "lookup_grads": f"(Tensor grad_cost, {_ARRAYS}, {_FIELDS}, bool[] needs) "
    "-> (Tensor, Tensor[], Tensor)",
}
Fields = tuple[Sequence[int], Sequence[int], Sequence[int], float, bool]
Ops = torch.ops.cupycorr


def fields_of(lookup: Lookup, scale: float) -> Fields:
    """Return a lookup as the operators take it."""
    return lookup.radius, lookup.dilation_patch, lookup.pool, scale, lookup.x_first


@lru_cache(maxsize=1024)
def _lookup(levels: int, radius: Any, dilation_patch: Any, pool: Any, x_first: bool) -> Lookup:
    return Lookup(radius, levels, dilation_patch, pool, "xy" if x_first else "yx")


def parsed(levels: int, fields: Sequence[Any]) -> Lookup:
    """Return the lookup that the arguments of an operator describe."""
    radius, dilation_patch, pool, _, x_first = fields
    return _lookup(levels, tuple(radius), tuple(dilation_patch), tuple(pool), x_first)


# Values.


def _pyramid(fmap2: Tensor, levels: int, pool: Sequence[int]) -> list[Tensor]:
    results = _fake_pyramid(fmap2, levels, pool)
    if fmap2.is_cuda:
        lookup = Lookup(0, levels, pool=(pool[0], pool[1]))
        memory.lend_lookup("pyramid", {"fmap2": fmap2, "levels": results}, lookup)
    else:
        results[0].copy_(fmap2)
        cells = [_by_cells(level) for level in results]
        pooling.pyramid(cells, (pool[0], pool[1]), threads=torch.get_num_threads())
    return results


def _pyramid_grads(grads: Sequence[Tensor], pool: Sequence[int]) -> Tensor:
    result = _fake_pyramid_grads(grads, pool)
    if result.is_cuda:
        tensors = {"grad_levels": list(grads), "grad_fmap2": result}
        lookup = Lookup(0, len(grads), pool=(pool[0], pool[1]))
        memory.lend_lookup("pyramid_grads", tensors, lookup)
    else:
        cells = [_by_cells(grad) for grad in grads]
        pooling.pyramid_grads(cells, _by_cells(result), (pool[0], pool[1]))
    return result


def _by_cells(fmap: Tensor) -> Any:
    """Return a map's memory (F, C, H, W) as the engine pools it, (F, H, W, C)."""
    return memory.numpy_view(fmap.movedim(1, -1))


def _cost(
    fmap1: Tensor,
    levels: Sequence[Tensor],
    coords: Tensor,
    index1: Tensor | None,
    index2: Tensor | None,
    *fields: Any,
) -> Tensor:
    _check(fmap1, levels, coords, index1, index2, parsed(len(levels), fields))
    cost = _fake_cost(fmap1, levels, coords, index1, index2, *fields)
    tensors = _inputs(fmap1, levels, coords, index1, index2) | {"cost": cost}
    _compute("cost", tensors, fields)
    return cost


def _grads(
    grad_cost: Tensor,
    fmap1: Tensor,
    levels: Sequence[Tensor],
    coords: Tensor,
    index1: Tensor | None,
    index2: Tensor | None,
    *fields: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    *shared, needs = fields
    lookup = parsed(len(levels), shared)
    _check(fmap1, levels, coords, index1, index2, lookup)
    check_grad(grad_cost, _fake_cost(fmap1, levels, coords, index1, index2, *shared))
    results = _fake_grads(grad_cost, fmap1, levels, coords, index1, index2, *fields)
    names = ("grad_fmap1", "grad_levels", "grad_coords")
    wanted = {name: grad for name, grad, need in zip(names, results, needs, strict=True) if need}
    inputs = _inputs(fmap1, levels, coords, index1, index2)
    _compute("grads", inputs | {"grad_cost": grad_cost} | wanted, shared)
    return results


def _inputs(
    fmap1: Tensor,
    levels: Sequence[Tensor],
    coords: Tensor,
    index1: Tensor | None,
    index2: Tensor | None,
) -> dict[str, Any]:
    return {
        "fmap1": fmap1,
        "levels": list(levels),
        "coords": coords,
        "index1": index1,
        "index2": index2,
    }


def _compute(what: str, tensors: dict[str, Any], fields: Sequence[Any]) -> None:
    """Compute a result into dense tensors, on their own memory."""
    lookup, scale = parsed(len(tensors["levels"]), fields), fields[3]
    if tensors["fmap1"].is_cuda:
        memory.lend_lookup(what, tensors, lookup, scale)
        return
    for name, maps in (("index1", tensors["fmap1"]), ("index2", tensors["levels"][0])):
        index = tensors[name]
        if index is not None:
            check_range(name, index, len(maps))
    cpu.run(
        what,
        convert_all(tensors, memory.numpy_view),
        lookup,
        scale,
        threads=torch.get_num_threads(),
    )


def _check(
    fmap1: Tensor,
    levels: Sequence[Tensor],
    coords: Tensor,
    index1: Tensor | None,
    index2: Tensor | None,
    lookup: Lookup,
) -> None:
    """Refuse what would make an engine read or write outside of an array.

    Graphs that were traced or exported come here with whatever tensors they are given.
    """
    given = {"fmap1": fmap1, "coords": coords, "index1": index1, "index2": index2}
    given.update((f"fmap2[{number}]", level) for number, level in enumerate(levels))
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    check(*described(tensors), lookup)
    check_devices(tensors)


def described(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shapes and the dtypes of tensors, by name."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return shapes, {name: dtype_name(tensor) for name, tensor in tensors.items()}


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's dtype."""
    return str(tensor.dtype).removeprefix("torch.")


def check_devices(tensors: dict[str, Tensor]) -> None:
    """Check that tensors, by name, are on one device."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        devices = ", ".join(f"{name} {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"all tensors must be on one device, got {devices}")


def check_grad(grad_cost: Tensor, cost: Tensor) -> None:
    """Check the gradient of a cost."""
    if grad_cost.shape != cost.shape or grad_cost.dtype is not cost.dtype:
        raise ValueError(
            f"grad_cost must have the cost's shape {tuple(cost.shape)} and dtype {cost.dtype}, got "
            f"{tuple(grad_cost.shape)} and {grad_cost.dtype}"
        )


# Shapes. Sizes may be symbols.


def _fake_pyramid(fmap2: Tensor, levels: int, pool: Sequence[int]) -> list[Tensor]:
    (height, width), results = fmap2.shape[2:], []
    for _ in range(levels):
        level = fmap2.new_empty(fmap2.shape[0], height, width, fmap2.shape[1])
        results.append(level.permute(0, 3, 1, 2))
        height, width = height // pool[0], width // pool[1]
    return results


def _fake_pyramid_grads(grads: Sequence[Tensor], pool: Sequence[int]) -> Tensor:
    return grads[0].new_empty(grads[0].shape)


def _fake_cost(
    fmap1: Tensor,
    levels: Sequence[Tensor],
    coords: Tensor,
    index1: Tensor | None,
    index2: Tensor | None,
    *fields: Any,
) -> Tensor:
    shape = parsed(len(levels), fields).cost_shape(fmap1.shape, coords.shape)
    return fmap1.new_empty(shape)


def _fake_grads(
    grad_cost: Tensor,
    fmap1: Tensor,
    levels: Sequence[Tensor],
    coords: Tensor,
    index1: Tensor | None,
    index2: Tensor | None,
    *fields: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return results without values; of those that are not needed, without elements."""
    need1, need2, need_coords = fields[-1]
    return (
        fmap1.new_empty(fmap1.shape if need1 else (0,)),
        [
            level.new_empty(level.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
            if need2
            else level.new_empty(0)
            for level in levels
        ],
        coords.new_empty(coords.shape if need_coords else (0,)),
    )


# Batches of vmap are folded into those of the maps.


def _vmap_pyramid(info: Any, in_dims: Any, fmap2: Tensor, *fields: Any) -> Any:
    maps = batched(fmap2, in_dims[0], info.batch_size)
    results = Ops.pyramid(maps.flatten(0, 1), *fields)
    split = [level.unflatten(0, maps.shape[:2]) for level in results]
    return split, [0] * len(split)


def _vmap_pyramid_grads(info: Any, in_dims: Any, grads: Sequence[Tensor], *fields: Any) -> Any:
    maps = [
        batched(grad, dim, info.batch_size) for grad, dim in zip(grads, in_dims[0], strict=True)
    ]
    result = Ops.pyramid_grads([grad.flatten(0, 1) for grad in maps], *fields)
    return result.unflatten(0, maps[0].shape[:2]), 0


def _folded(info: Any, in_dims: Any, arrays: Sequence[Any]) -> tuple[list[Any], Any, Any]:
    """Fold batches into samples; return the arrays, and how to unfold fmap1 and levels."""
    count = info.batch_size
    fmap1, coords = (batched(arrays[k], in_dims[k], count) for k in (0, 2))
    levels = [batched(level, dim, count) for level, dim in zip(arrays[1], in_dims[1], strict=True)]
    indices: list[Any] = []
    for k, maps in ((3, fmap1), (4, levels[0])):
        if arrays[k] is None:
            indices.append(None)
            continue
        index = batched(arrays[k], in_dims[k], count)
        first = torch.arange(count, device=index.device, dtype=index.dtype) * maps.shape[1]
        indices.append((index + first[:, None]).flatten())
    folded = [fmap1.flatten(0, 1), [level.flatten(0, 1) for level in levels]]
    return [*folded, coords.flatten(0, 1), *indices], fmap1.shape[:2], levels[0].shape[:2]


def _vmap_cost(info: Any, in_dims: Any, *arguments: Any) -> Any:
    arrays, _, _ = _folded(info, in_dims, arguments[:5])
    cost = Ops.lookup(*arrays, *arguments[5:])
    return cost.unflatten(0, (info.batch_size, -1)), 0


def _vmap_grads(info: Any, in_dims: Any, grad_cost: Tensor, *arguments: Any) -> Any:
    arrays, maps1, maps2 = _folded(info, in_dims[1:], arguments[:5])
    grad_cost = batched(grad_cost, in_dims[0], info.batch_size).flatten(0, 1)
    grad1, grad2, grad_coords = Ops.lookup_grads(grad_cost, *arrays, *arguments[5:])
    need1, need2, need_coords = arguments[-1]
    count = info.batch_size
    nothing = arrays[0].new_empty(count, 0)
    results = (
        grad1.unflatten(0, maps1) if need1 else nothing,
        [level.unflatten(0, maps2) if need2 else nothing for level in grad2],
        grad_coords.unflatten(0, (count, -1)) if need_coords else arrays[2].new_empty(count, 0),
    )
    return results, (0, [0] * len(grad2), 0)


def batched(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    """Return a tensor with the batch first, repeated if it has none."""
    return tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _flops(
    fmap1: Any, levels: Any, coords: Any, index1: Any, index2: Any, radius: Any, *_: Any,
    out_shape: Any = None,
) -> int:  # fmt: skip
    """Count two operations for each channel of each displacement."""
    displacements = prod(2 * reach + 1 for reach in radius)
    positions = coords[0] * prod(coords[2:])
    return int(2 * len(levels) * displacements * positions * fmap1[1])


def _flops_of_grads(grad_cost: Any, *arguments: Any, out_shape: Any = None) -> int:
    return _flops(*arguments) * sum(map(bool, arguments[-1]))


def register(
    library: torch.library.Library, name: str, schema: str, kernel: Any, fake: Any, folded: Any
) -> None:
    """Define an operator: its values, shapes, derivatives, and what vmap makes of it."""
    library.define(  # type: ignore[no-untyped-call]
        name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
    )
    differentiable = partial(lookup_derivatives.derive, name)
    for key, function in (("CPU", kernel), ("CUDA", kernel), ("Autograd", differentiable)):
        library.impl(name, function, key)  # type: ignore[no-untyped-call]
    qualified = f"cupycorr::{name}"
    torch.library.register_fake(qualified, fake, lib=library)
    torch.library.register_vmap(qualified, folded, lib=library)


_LIBRARY = torch.library.Library("cupycorr", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _functions in {
    "pyramid": (_pyramid, _fake_pyramid, _vmap_pyramid),
    "pyramid_grads": (_pyramid_grads, _fake_pyramid_grads, _vmap_pyramid_grads),
    "lookup": (_cost, _fake_cost, _vmap_cost),
    "lookup_grads": (_grads, _fake_grads, _vmap_grads),
}.items():
    register(_LIBRARY, _name, _SCHEMAS[_name], *_functions)
register_flop_formula(Ops.lookup)(_flops)
register_flop_formula(Ops.lookup_grads)(_flops_of_grads)


# What the door calls.


def pyramid(fmap2: Any, lookup: Lookup) -> tuple[Any, ...]:
    """Return the levels of a tensor; see `cupycorr.pyramid`."""
    (fmap2,) = operators.autocast(fmap2)
    if isinstance(fmap2, Tensor):
        check_map(tuple(fmap2.shape), str(fmap2.dtype).removeprefix("torch."))
        operators.check(fmap2, fmap2)
        lookup.level_sizes(*fmap2.shape[2:])
    levels = Ops.pyramid(fmap2, lookup.levels, lookup.pool)
    return tuple(levels[number] for number in range(lookup.levels))


def correlation_lookup(
    fmap1: Any,
    fmap2: Any,
    coords: Any,
    lookup: Lookup,
    scale: float | None,
    index1: Any,
    index2: Any,
) -> Any:
    """Return the cost of tensors; see `cupycorr.correlation_lookup`."""
    levels = fmap2 if isinstance(fmap2, (tuple, list)) else pyramid(fmap2, lookup)
    fmap1, *levels = operators.autocast(fmap1, *levels)
    if isinstance(fmap1, Tensor):
        _check(fmap1, levels, coords, index1, index2, lookup)
        operators.check(fmap1, levels[0])
        scale = scale_of(scale, fmap1.shape[1])
    elif scale is None:
        scale = fmap1.shape[1] ** -0.5
    return Ops.lookup(fmap1, list(levels), coords, index1, index2, *fields_of(lookup, scale))
