"""Derivatives of the lookup's operators.

The operators are linear in each of their operands but the coordinates, so their derivatives are
these operators again. Coordinates have first derivatives only.

As in `derivatives`, rules are attached on one level of differentiation at a time, so that
torch.func works in both modes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

_HERE = object()
"""Stands for a tensor, where tensors are kept apart."""
Ops = torch.ops.cupycorr
Grads = Sequence[Tensor | None]


def derive(name: str, *arguments: Any) -> Any:
    """Compute results below this level of differentiation, and attach the rules on this level."""
    with torch._C._AutoDispatchBelowAutograd(), forward_ad._set_fwd_grad_enabled(True):
        results = getattr(Ops, name)(*arguments)
    bare = _filled(arguments, repeat(_HERE))
    with enable_single_level_autograd_function():
        derived = _Derivative.apply(  # type: ignore[attr-defined]
            tuple(_tensors(results)), name, bare, *_tensors(arguments)
        )
    return _filled(results, iter(derived))


def _tensors(values: Any) -> Iterator[Tensor]:
    """List the tensors of nested sequences."""
    for value in [values] if isinstance(values, Tensor) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _filled(values: Any, tensors: Iterator[Any]) -> Any:
    """Return nested sequences with other tensors."""
    if isinstance(values, Tensor) or values is _HERE:
        return next(tensors)
    if isinstance(values, (tuple, list)):
        return type(values)([_filled(value, tensors) for value in values])
    return values


class _Derivative(torch.autograd.function._SingleLevelFunction):
    """Attach an operator's derivatives to its results, which are computed before."""

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

    @staticmethod
    def forward(
        ctx: Any, results: tuple[Tensor, ...], name: str, bare: Any, *operands: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.name, ctx.bare = name, bare
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands)
        ctx.save_for_forward(*operands)
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        arguments = _filled(ctx.bare, iter(ctx.saved_tensors))
        needs = ctx.needs_input_grad[3:]
        grads: list[Tensor | None] = []
        if any(one is not None for one in upstream):
            grads = list(_BACKWARD[ctx.name](arguments, upstream, needs))
        return None, None, None, *grads, *[None] * (len(needs) - len(grads))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        arguments = _filled(ctx.bare, iter(ctx.saved_tensors))
        results: list[Tensor] = []
        # One operand after the other changes, and what follows from that is added.
        for operands, change in _changes(ctx, tangents[3:]):
            given = _filled(ctx.bare, iter(operands))
            parts = list(_tensors(_changed(ctx.name, given, arguments, change)))
            results = [a + b for a, b in zip(results, parts, strict=True)] if results else parts
        return tuple(results)


def _changes(ctx: Any, tangents: Sequence[Tensor | None]) -> Iterator[tuple[list[Any], int]]:
    """Give the operands with one of them replaced by its change, and the number of its argument."""
    numbers = [number for number, argument in enumerate(ctx.bare) for _ in _marks(argument)]
    for number in sorted({*numbers}):
        own = [k for k, other in enumerate(numbers) if other == number]
        if all(tangents[k] is None for k in own):
            continue
        operands = list(ctx.saved_tensors)
        for k in own:
            tangent = tangents[k]
            operands[k] = torch.zeros_like(operands[k]) if tangent is None else tangent
        yield operands, number


def _marks(argument: Any) -> Iterator[None]:
    if argument is _HERE:
        yield None
    elif isinstance(argument, (tuple, list)):
        for part in argument:
            yield from _marks(part)


_COORDS = {"lookup": 2, "lookup_grads": 3, "volume_lookup": 1, "volume_lookup_grads": 2}
"""The number of the argument that is the coordinates."""


def _changed(name: str, given: Any, arguments: Any, change: int) -> Any:
    """Return how results change with one argument, which ``given`` has the change of."""
    if _COORDS.get(name) == change:
        raise RuntimeError(
            "coords must have no tangent, got one; lookups are differentiated by coords in reverse "
            "mode only"
        )
    results = getattr(Ops, name)(*given)
    if not name.endswith("lookup_grads"):
        return results
    # A gradient does not depend on its own operand.
    independent = {1: [0], 2: [1]} if name == "lookup_grads" else {1: [0]}
    groups = list(results)
    for number in independent.get(change, ()):
        groups[number] = _filled(
            groups[number], (torch.zeros_like(t) for t in _tensors([groups[number]]))
        )
    return groups


def _pyramid(arguments: Any, upstream: Grads, needs: Sequence[bool]) -> Grads:
    fmap2, levels, pool = arguments
    (*maps, height, width), grads = fmap2.shape, []
    for number, grad in zip(range(levels), upstream, strict=True):
        size = height // pool[0] ** number, width // pool[1] ** number
        grads.append(fmap2.new_zeros(*maps, *size) if grad is None else grad)
    return [Ops.pyramid_grads(grads, pool)]


def _filled_with_zeros(grads: Grads, like: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(other) if grad is None else grad
        for grad, other in zip(grads, like, strict=True)
    ]


def _pyramid_grads(arguments: Any, upstream: Grads, needs: Sequence[bool]) -> Grads:
    grads, pool = arguments
    return list(Ops.pyramid(upstream[0], len(grads), pool))


def _lookup(arguments: Any, upstream: Grads, needs: Sequence[bool]) -> Grads:
    levels = len(arguments[1])
    wanted = [needs[0], any(needs[1 : 1 + levels]), needs[1 + levels]]
    grad1, grad2, grad_coords = Ops.lookup_grads(upstream[0], *arguments, wanted)
    return [
        grad1 if wanted[0] else None,
        *(grad2 if wanted[1] else [None] * levels),
        grad_coords if wanted[2] else None,
    ]


def _lookup_grads(arguments: Any, upstream: Grads, needs: Sequence[bool]) -> Grads:
    grad_cost, fmap1, levels, *shared, wanted = arguments
    _refuse_coords(wanted[2], needs[2 + len(levels)])
    change1, *change2, _ = upstream
    by_cost: Any = None
    by_fmap1: Any = None
    by_levels: Grads = [None] * len(levels)
    if wanted[1] and any(change is not None for change in change2):
        changes = _filled_with_zeros(change2, levels)
        by_cost = Ops.lookup(fmap1, changes, *shared)
        by_fmap1 = Ops.lookup_grads(grad_cost, fmap1, changes, *shared, [True, False, False])[0]
    if wanted[0] and change1 is not None:
        cost = Ops.lookup(change1, levels, *shared)
        by_cost = cost if by_cost is None else by_cost + cost
        by_levels = Ops.lookup_grads(grad_cost, change1, levels, *shared, [False, True, False])[1]
    return [by_cost, by_fmap1, *by_levels]


def _volume_lookup(arguments: Any, upstream: Grads, needs: Sequence[bool]) -> Grads:
    levels = len(arguments[0])
    wanted = [any(needs[:levels]), needs[levels]]
    grads, grad_coords = Ops.volume_lookup_grads(upstream[0], *arguments, wanted)
    return [*(grads if wanted[0] else [None] * levels), grad_coords if wanted[1] else None]


def _volume_lookup_grads(arguments: Any, upstream: Grads, needs: Sequence[bool]) -> Grads:
    _, levels, *shared, wanted = arguments
    _refuse_coords(wanted[1], needs[1 + len(levels)])
    if not wanted[0] or all(change is None for change in upstream[:-1]):
        return []
    changes = _filled_with_zeros(upstream[:-1], levels)
    return [Ops.volume_lookup(changes, *shared)]


def _refuse_coords(*second: bool) -> None:
    if any(second):
        raise RuntimeError(
            "coords must be detached for second derivatives of a lookup, got coords that require "
            "gradients; costs have first derivatives by coords only"
        )


_BACKWARD: dict[str, Callable[[Any, Grads, Sequence[bool]], Grads]] = {
    "pyramid": _pyramid,
    "pyramid_grads": _pyramid_grads,
    "lookup": _lookup,
    "lookup_grads": _lookup_grads,
    "volume_lookup": _volume_lookup,
    "volume_lookup_grads": _volume_lookup_grads,
}
