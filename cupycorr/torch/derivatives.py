"""The operators' formulas and derivatives.

The cost volume and its two gradients are three faces of one trilinear form of three *slots*::

    T(fmap1, fmap2, cost) = sum of cost[n, p, q, y, x]
                                   * fmap1[n, c, Y, X] * fmap2[n, c, Y + dy, X + dx]

with the symbols of `Geometry`. Each is the derivative of T with respect to one slot, as a function
of the two others; so the derivatives of each, of any order, are these three again. They are the
operators ``cupycorr::cost``, ``cupycorr::grad_fmap1`` and ``cupycorr::grad_fmap2``;
``cupycorr::grads`` computes the latter two at once, which shares work.

Absolute differences have operators of their own, closed under derivatives as well. Given the signs
of the differences, which are constant almost everywhere, ``cupycorr::l1_tangent`` is a linear map
from changes of the feature maps to that of the cost, and ``cupycorr::l1_grads`` its adjoint;
``cupycorr::l1_cost`` is the cost itself.

A call takes one of two ways (`derive`). Dense tensors in plain eager mode go straight to the
engine. Everything else (transforms of torch.func, tracers, dispatch modes, subclasses) calls the
registered operator, and torch's dispatcher finds out what that means. Both ways attach the same
rules to the results: the second one in the operator's autograd kernel, for one level of
differentiation at a time.

Private names of torch that are used, tried with torch 2.6, 2.8, 2.10, 2.13 and 2.14, and tests of
``tests/torch`` that fail without them:

==========================================  =======================================================
name                                        test
==========================================  =======================================================
``_C._dispatch_keys``                       test_a_lazily_negated_map_is_negated
``_C._dispatch_tls_local_include_set``      test_the_dispatcher_gives_the_same_cost
``_C._AutoDispatchBelowAutograd``           test_grad_is_the_gradient_of_autograd
``enable_single_level_autograd_function``   test_grad_is_the_gradient_of_autograd
``autograd.function._SingleLevelFunction``  test_grad_is_the_gradient_of_autograd
its ``_compiled_autograd_key``              test_compiled_autograd_gives_the_same_gradients
``forward_ad._set_fwd_grad_enabled``        test_hessians_of_all_modes_are_that_of_autograd
``forward_ad._current_level``               test_hessians_of_all_modes_are_that_of_autograd
``DTensor._op_dispatcher`` (`sharding`)     test_processes_compute_what_one_computes
``_C._cuda_getCurrentRawStream`` (`memory`) test_work_goes_to_torchs_current_stream
``_C._get_fp32_precision_getter``,          test_costs_of_float32_follow_the_precision_of_torchs_
``_C._get_cublas_allow_tf32`` (`memory`)    matrix_products
==========================================  =======================================================

The first two belong to the way around the dispatcher. `torch.library.register_autograd` would do
without the others but the last. With it torch.func.grad fails on the operators, and tangents in
forward mode are silently zero.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from cupycorr.cpu import engine
from cupycorr.geometry import Axis
from cupycorr.layer import Layer
from cupycorr.torch import memory

FMAP1, FMAP2, COST, TANGENT1, TANGENT2 = range(5)
"""The slots of the trilinear form, and changes of the maps."""
INPUTS = ("fmap1", "fmap2", "grad_cost", "tangent1", "tangent2")
"""The names of slots as inputs, in engines and schemas."""
_RESULTS = ("grad_fmap1", "grad_fmap2", "cost")
"""The names of slots as results, in engines."""
_MAPS = (FMAP1, FMAP2)


class Operator(NamedTuple):
    """One operator: it takes the tensors of ``operands`` and returns those of ``results``.

    For products, the result of a slot is dT/d(slot).
    """

    name: str
    operands: tuple[int, ...]
    """The slots that it takes; the first is a feature map."""
    results: tuple[int, ...]
    similarity: str = "product"

    @property
    def what(self) -> str:
        """The engines' name for it."""
        if self.results != (COST,):
            return "grads"
        return "tangent" if TANGENT1 in self.operands else "cost"


OF_COST = Operator("cost", _MAPS, (COST,))
_GRADS = Operator("grads", (*_MAPS, COST), _MAPS)
_OF_SLOT = (
    Operator("grad_fmap1", (FMAP2, COST), (FMAP1,)),
    Operator("grad_fmap2", (FMAP1, COST), (FMAP2,)),
    OF_COST,
)
OF_L1_COST = Operator("l1_cost", _MAPS, (COST,), "l1")
_L1_TANGENT = Operator("l1_tangent", (*_MAPS, TANGENT1, TANGENT2), (COST,), "l1")
_L1_GRADS = Operator("l1_grads", (*_MAPS, COST), _MAPS, "l1")
_L1_OF_SLOT = (
    Operator("l1_grad_fmap1", (*_MAPS, COST), (FMAP1,), "l1"),
    Operator("l1_grad_fmap2", (*_MAPS, COST), (FMAP2,), "l1"),
)
_BOTH = {OF_COST: _GRADS, OF_L1_COST: _L1_GRADS}
"""The operators that compute both gradients of a cost volume."""
OPERATORS = (*_OF_SLOT, _GRADS, OF_L1_COST, _L1_TANGENT, *_L1_OF_SLOT, _L1_GRADS)


def derive(operator: Operator, layer: Layer, *operands: Tensor) -> tuple[Tensor, ...]:
    """Compute what an operator returns, differentiably, in the operands' dtype."""
    if torch.compiler.is_compiling():
        # The trace must hold the bare operator: torch cannot trace the rest of this function.
        return dispatch(operator, layer, *operands)
    if not _are_plain(operands):
        return _dispatch_uncast(operator, layer, *operands)
    results = compute(operator, layer, *operands)
    differentiable, tangents = torch.is_grad_enabled(), forward_ad._current_level >= 0
    for tensor in operands:
        if (differentiable and tensor.requires_grad) or (tangents and _has_tangent(tensor)):
            return _Derivative.apply(results, operator, layer, *operands)  # type: ignore[attr-defined, no-any-return]
    return results


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def registered(operator: Operator) -> Callable[..., Any]:
    """Return the operator as it is registered with torch."""
    return getattr(torch.ops.cupycorr, operator.name).default  # type: ignore[no-any-return]


def dispatch(operator: Operator, layer: Layer, *operands: Tensor) -> tuple[Tensor, ...]:
    """Call the registered operator."""
    results = registered(operator)(*operands, *fields(layer))
    return results if isinstance(results, tuple) else (results,)


def derive_on_one_level(operator: Operator, layer: Layer, *operands: Tensor) -> tuple[Tensor, ...]:
    """Compute results below this level of differentiation, and attach the rules on this level."""
    _learn_sharding()
    # torch calls `_Derivative.jvp` with forward mode switched off, which holds for levels below.
    with torch._C._AutoDispatchBelowAutograd(), forward_ad._set_fwd_grad_enabled(True):
        results = dispatch(operator, layer, *operands)
    with enable_single_level_autograd_function():
        derived: tuple[Tensor, ...] = _Derivative.apply(results, operator, layer, *operands)  # type: ignore[attr-defined]
    return derived


def fields(layer: Layer) -> tuple[Any, ...]:
    """Return a layer as the arguments of an operator."""
    return (*(getattr(layer.geometry, name) for name in Axis._fields), layer.normalize)


_PLAIN = 0
"""The dispatch keys that only ask for derivatives and values of dense tensors."""
for _name in (
    *("BackendSelect", "ADInplaceOrView", "CPU", "CUDA"),
    *("AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA"),
):
    _PLAIN |= torch.DispatchKeySet(getattr(torch.DispatchKey, _name)).raw_repr()


def _are_plain(tensors: tuple[Tensor, ...]) -> bool:
    """Tell whether tensors are memory of the CPU or a CUDA device, and torch is in no mode."""
    keys = torch._C._dispatch_tls_local_include_set().raw_repr()
    for tensor in tensors:
        keys |= torch._C._dispatch_keys(tensor).raw_repr()
    return not keys & ~_PLAIN and not torch.overrides.has_torch_function(tensors)


def _dispatch_uncast(operator: Operator, layer: Layer, *operands: Tensor) -> tuple[Tensor, ...]:
    """Call the registered operator, in the operands' dtype where autocast has another one."""
    _learn_sharding()
    device, dtype = operands[0].device.type, operands[0].dtype
    enabled = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    if enabled and dtype is not torch.get_autocast_dtype(device):
        with torch.autocast(device, enabled=False):
            return dispatch(operator, layer, *operands)
    return dispatch(operator, layer, *operands)


def _learn_sharding() -> None:
    """Tell distributed tensors about the operators, once somebody has imported those."""
    if "torch.distributed.tensor" in sys.modules:
        _register_sharding()


@cache
def _register_sharding() -> None:
    from cupycorr.torch import sharding

    for operator in OPERATORS:
        sharding.register(registered(operator))


class _Derivative(torch.autograd.function._SingleLevelFunction):
    """Attach an operator's derivatives to its results, which are computed before.

    `torch.autograd.Function` would go through all levels of torch.func first.
    """

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

    @staticmethod
    def forward(
        ctx: Any,
        results: tuple[Tensor, ...],
        operator: Operator,
        layer: Layer,
        *operands: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.operator, ctx.layer = operator, layer
        ctx.set_materialize_grads(False)
        if operator.similarity == "l1":
            ctx.save_for_backward(*operands[:2])
            ctx.save_for_forward(*operands[:2])
            return results
        # An operand appears in the gradients of the others only.
        needs = ctx.needs_input_grad[3:]
        ctx.save_for_backward(
            *(t if any(needs[:i] + needs[i + 1 :]) else None for i, t in enumerate(operands))
        )
        ctx.save_for_forward(*operands)
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        operator: Operator = ctx.operator
        needs = ctx.needs_input_grad[3:]
        grads: Iterable[Tensor | None]
        both = _BOTH.get(operator)
        if both is not None and all(needs) and upstream[0] is not None:
            grads = derive(both, ctx.layer, *ctx.saved_tensors, upstream[0])
        elif operator.similarity == "l1":
            grads = _l1_backward(ctx, needs, upstream)
        else:
            changes = dict(zip(operator.results, upstream, strict=True))
            grads = (
                _change(slot, changes, ctx) if needed else None
                for slot, needed in zip(operator.operands, needs, strict=True)
            )
        return None, None, None, *grads

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        operator: Operator = ctx.operator
        if operator.similarity == "l1":
            return _l1_jvp(ctx, tangents[3:])
        changes = dict(zip(operator.operands, tangents[3:], strict=True))
        results = tuple(_change(slot, changes, ctx) for slot in operator.results)
        # Autograd fails on a result without a tangent, beside one that has one.
        fmap = ctx.saved_tensors[0]
        return tuple(fmap.new_zeros(fmap.shape) if t is None else t for t in results)


def compute(operator: Operator, layer: Layer, *operands: Tensor) -> tuple[Tensor, ...]:
    """Compute what an operator returns for dense tensors, on their own memory."""
    fmap = operands[0]
    names, shapes = _described(operator, layer, fmap.shape)
    results = allocate(operator, operands, shapes)
    tensors = dict(zip(names, (*operands, *results), strict=True))
    # Engines read the shape of a map that no wanted gradient depends on: either map's.
    tensors.setdefault("fmap1", fmap)
    tensors.setdefault("fmap2", fmap)
    if fmap.is_cuda:
        memory.lend(operator.what, tensors, layer)
    else:
        views = {name: memory.numpy_view(tensor) for name, tensor in tensors.items()}
        engine.run(operator.what, views, layer, threads=torch.get_num_threads())
    return results


def allocate(
    operator: Operator, operands: tuple[Tensor, ...], shapes: Iterable[Sequence[Any]]
) -> tuple[Tensor, ...]:
    """Return tensors of some shapes for an operator's results; sizes may be symbols.

    On CUDA devices gradients lie in memory as their maps do.
    """
    fmap = operands[0]
    maps = operands[:-1] if COST in operator.operands else operands
    if not fmap.is_cuda or not memory.are_channels_last(*maps):
        return tuple(map(fmap.new_empty, shapes))
    return tuple(
        fmap.new_empty(shape)
        if slot == COST
        else torch.empty_like(fmap, memory_format=torch.channels_last)
        for slot, shape in zip(operator.results, shapes, strict=True)
    )


@lru_cache(maxsize=1024)
def _described(
    operator: Operator, layer: Layer, shape: tuple[int, ...]
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Return the engines' names for an operator's operands and results, and the results' shapes."""
    operands, results = operator.operands, operator.results
    names = *(INPUTS[slot] for slot in operands), *(_RESULTS[slot] for slot in results)
    cost_shape = layer.geometry.cost_shape(shape)
    return names, tuple(cost_shape if slot == COST else tuple(shape) for slot in results)


def _change(slot: int, changes: dict[int, Tensor | None], ctx: Any) -> Tensor | None:
    """Return how the derivative with respect to a slot changes with the slots in ``changes``.

    Each of these adds the derivative at its change and at the third slot's saved value.
    """
    values = dict(zip(ctx.operator.operands, ctx.saved_tensors, strict=True))
    operator = _OF_SLOT[slot]
    total: Tensor | None = None
    for changed, change in changes.items():
        if changed != slot and change is not None:
            operands = ((values | {changed: change})[other] for other in operator.operands)
            (term,) = derive(operator, ctx.layer, *operands)
            total = term if total is None else total + term
    return total


def _l1_backward(
    ctx: Any, needs: tuple[bool, ...], upstream: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of an l1 operator with respect to its operands.

    The maps enter through signs, which are constant almost everywhere, so their gradients are None.
    """
    maps: tuple[Tensor, Tensor] = ctx.saved_tensors
    none: tuple[None, None] = None, None
    if COST in ctx.operator.operands:
        return (*none, _l1_tangent(ctx, ctx.operator.results, upstream) if needs[2] else None)
    grads: tuple[Tensor | None, ...] = none
    if upstream[0] is not None and all(needs[-2:]):
        grads = derive(_L1_GRADS, ctx.layer, *maps, upstream[0])
    elif upstream[0] is not None:
        grads = tuple(
            derive(operator, ctx.layer, *maps, upstream[0])[0] if need else None
            for operator, need in zip(_L1_OF_SLOT, needs[-2:], strict=True)
        )
    return grads if ctx.operator is OF_L1_COST else (*none, *grads)


def _l1_jvp(ctx: Any, tangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Return how the results of an l1 operator change with its operands, while signs stay."""
    maps: tuple[Tensor, Tensor] = ctx.saved_tensors
    operator: Operator = ctx.operator
    if COST not in operator.operands:
        return (_l1_tangent(ctx, _MAPS, tangents[-2:]),)
    if tangents[2] is None:
        return tuple(torch.zeros_like(maps[0]) for _ in operator.results)
    return derive(operator, ctx.layer, *maps, tangents[2])


def _l1_tangent(
    ctx: Any, slots: tuple[int, ...], changes: tuple[Tensor | None, ...]
) -> Tensor | None:
    """Return how the l1 cost volume changes with the maps, if any of them do."""
    maps: tuple[Tensor, Tensor] = ctx.saved_tensors
    if all(change is None for change in changes):
        return None
    given = dict(zip(slots, changes, strict=True))
    both = (given.get(slot) for slot in _MAPS)
    filled = (torch.zeros_like(maps[0]) if change is None else change for change in both)
    return derive(_L1_TANGENT, ctx.layer, *maps, *filled)[0]
