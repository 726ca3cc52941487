"""The cost volume in torch: operators and their derivatives.

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

A call goes one of two ways. Generally torch's dispatcher finds out what an operator means: values,
shapes only, a node of a graph, a batch, a derivative. Where it would only find out that values are
wanted, and perhaps derivatives, a call takes the short way around it (`_is_plain`).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from functools import cache, lru_cache, partial
from itertools import product
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from cupycorr.cpu import engine
from cupycorr.geometry import Axis, Geometry
from cupycorr.layer import DTYPES, Layer


def cost(fmap1: Tensor, fmap2: Tensor, layer: Layer) -> Tensor:
    """Compute the cost volume of two checked feature maps; see `cupycorr.correlation`.

    Parameters
    ----------
    fmap1, fmap2 : Tensor (N, C, H, W), float16|bfloat16|float32|float64
        The feature maps: of equal shape, dtype and device, and of any strides.
    layer : Layer
        What is computed.

    Returns
    -------
    Tensor (N, PH, PW, OH, OW)
        Of the maps' dtype and device, contiguous, and differentiable any number of times, in
        reverse and in forward mode.

    Raises
    ------
    TypeError
        If a map is not dense, but sparse for instance.
    RuntimeError
        If the maps are on another kind of device than CPU, CUDA and meta, or on CUDA without CuPy.
    """
    if fmap1.device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(
            f"the maps must be on the CPU or on a CUDA device, got {fmap1.device}; move them with "
            ".cpu()"
        )
    if not (fmap1.layout is fmap2.layout is torch.strided):
        raise TypeError(
            f"the maps must be dense tensors, got {fmap1.layout} and {fmap2.layout}; convert them "
            "with .to_dense()"
        )
    return _derive(_L1_COST if layer.l1 else _COST, layer, fmap1, fmap2)[0]


def autocast(*maps: Any) -> tuple[Any, ...]:
    """Cast maps as torch.autocast asks for, where it is enabled on their device.

    Parameters
    ----------
    *maps : Tensor, of any shape and dtype
        What is not a floating tensor, or is float64, stays as it is.

    Returns
    -------
    tuple of Tensor
        In the dtype of the autocast region, float16 or bfloat16. The cost volume has that dtype
        then too; sums are accumulated in float32 and rounded once.
    """
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        return maps
    return tuple(_cast(tensor) if isinstance(tensor, Tensor) else tensor for tensor in maps)


def _cast(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


# What an operator computes.

FMAP1, FMAP2, COST, TANGENT1, TANGENT2 = range(5)
"""The slots of the trilinear form, and changes of the maps."""
_INPUTS = ("fmap1", "fmap2", "grad_cost", "tangent1", "tangent2")
_GRADIENTS = ("grad_fmap1", "grad_fmap2")
"""The names of slots as inputs, and of the first two as results, in engines and schemas."""


class _Operator(NamedTuple):
    """What computes the slots ``results``, of products the trilinear form's derivatives by them."""

    name: str
    operands: tuple[int, ...]
    """The slots that it takes; the first is a feature map."""
    results: tuple[int, ...]
    similarity: str = "product"

    @property
    def what(self) -> str:
        """What the engines call it."""
        if self.results != (COST,):
            return "grads"
        return "tangent" if TANGENT1 in self.operands else "cost"

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(torch.ops.cupycorr, self.name).default  # type: ignore[no-any-return]


_COST = _Operator("cost", (FMAP1, FMAP2), (COST,))
_GRADS = _Operator("grads", (FMAP1, FMAP2, COST), (FMAP1, FMAP2))
_OF_SLOT = (
    _Operator("grad_fmap1", (FMAP2, COST), (FMAP1,)),
    _Operator("grad_fmap2", (FMAP1, COST), (FMAP2,)),
    _COST,
)
_MAPS = (FMAP1, FMAP2)
_L1_COST = _Operator("l1_cost", _MAPS, (COST,), "l1")
_L1_TANGENT = _Operator("l1_tangent", (*_MAPS, TANGENT1, TANGENT2), (COST,), "l1")
_L1_GRADS = _Operator("l1_grads", (*_MAPS, COST), _MAPS, "l1")
_L1_OF_SLOT = (
    _Operator("l1_grad_fmap1", (*_MAPS, COST), (FMAP1,), "l1"),
    _Operator("l1_grad_fmap2", (*_MAPS, COST), (FMAP2,), "l1"),
)
_OPERATORS = (*_OF_SLOT, _GRADS, _L1_COST, _L1_TANGENT, *_L1_OF_SLOT, _L1_GRADS)


def _derive(operator: _Operator, layer: Layer, *operands: Tensor) -> tuple[Tensor, ...]:
    """Compute what an operator returns, differentiably, in the operands' dtype."""
    if torch.compiler.is_compiling():
        # What is traced is to be the bare operator: the dispatcher's state cannot be traced.
        return _dispatch(operator, layer, *operands)
    if _is_plain(operands):
        if _is_differentiated(operands):
            results: tuple[Tensor, ...] = _Derivative.apply(  # type: ignore[no-untyped-call]
                _compute, operator, layer, *operands
            )
            return results
        return _compute(operator, layer, *operands)
    _learn_sharding()
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return _dispatch(operator, layer, *operands)


def _compute(operator: _Operator, layer: Layer, *operands: Tensor) -> tuple[Tensor, ...]:
    """Compute what an operator returns for dense tensors, on their own memory."""
    fmap = operands[0]
    shapes = {FMAP1: fmap.shape, FMAP2: fmap.shape, COST: layer.geometry.cost_shape(fmap.shape)}
    results = tuple(fmap.new_empty(shapes[slot]) for slot in operator.results)
    what = operator.what
    arrays = dict(zip((_INPUTS[slot] for slot in operator.operands), operands, strict=True))
    names = ("cost",) if operator.results == (COST,) else _GRADIENTS
    arrays |= {
        names[slot if what == "grads" else 0]: result
        for slot, result in zip(operator.results, results, strict=True)
    }
    # Engines read the shape of a map that no wanted gradient depends on: either map's.
    arrays.setdefault("fmap1", fmap)
    arrays.setdefault("fmap2", fmap)
    if fmap.is_cuda:
        from cupycorr.torch import memory

        memory.run(what, arrays, layer)
    else:
        views = {name: _array(tensor) for name, tensor in arrays.items()}
        engine.run(what, views, layer, threads=torch.get_num_threads())
    return results


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    """Return a tensor's memory as an array, bfloat16 as its uint16 bits."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


class _Rules:
    """What an operator returns, with its derivatives; ``run`` computes the values."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., tuple[Tensor, ...]],
        operator: _Operator,
        layer: Layer,
        *operands: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.operator, ctx.layer = operator, layer
        ctx.set_materialize_grads(False)
        if operator.similarity == "l1":
            ctx.save_for_backward(*operands[:2])
            ctx.save_for_forward(*operands[:2])
            return run(operator, layer, *operands)
        # An operand appears in the gradients of the others only.
        needs = ctx.needs_input_grad[3:]
        ctx.save_for_backward(
            *(
                tensor if any(needs[:i] + needs[i + 1 :]) else None
                for i, tensor in enumerate(operands)
            )
        )
        ctx.save_for_forward(*operands)
        return run(operator, layer, *operands)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        operator: _Operator = ctx.operator
        needs = ctx.needs_input_grad[3:]
        if operator.similarity == "l1":
            grads: Iterable[Tensor | None] = _l1_backward(ctx, needs, upstream)
        elif operator is _COST and all(needs) and upstream[0] is not None:
            grads = _derive(_GRADS, ctx.layer, *ctx.saved_tensors, upstream[0])
        else:
            changes = dict(zip(operator.results, upstream, strict=True))
            grads = (
                _change(slot, changes, ctx) if needed else None
                for slot, needed in zip(operator.operands, needs, strict=True)
            )
        return None, None, None, *grads

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        operator: _Operator = ctx.operator
        if operator.similarity == "l1":
            return _l1_jvp(ctx, tangents[3:])
        changes = dict(zip(operator.operands, tangents[3:], strict=True))
        tangents = tuple(_change(slot, changes, ctx) for slot in operator.results)
        # Autograd fails on a result without a tangent, beside one that has one.
        fmap = ctx.saved_tensors[0]
        return tuple(fmap.new_zeros(fmap.shape) if t is None else t for t in tangents)


class _Derivative(_Rules, torch.autograd.Function):
    """The rules on all levels of torch.func's transforms."""


class _SingleLevelDerivative(_Rules, torch.autograd.function._SingleLevelFunction):
    """The rules on the level that the dispatcher has come down to."""


def _change(slot: int, changes: dict[int, Tensor | None], ctx: Any) -> Tensor | None:
    """Return how the derivative with respect to a slot changes with the slots in ``changes``.

    The sum over them of the derivative at that change, and at the third slot's saved value.
    """
    values = dict(zip(ctx.operator.operands, ctx.saved_tensors, strict=True))
    operator = _OF_SLOT[slot]
    total: Tensor | None = None
    for changed, change in changes.items():
        if changed != slot and change is not None:
            operands = ((values | {changed: change})[other] for other in operator.operands)
            (term,) = _derive(operator, ctx.layer, *operands)
            total = term if total is None else total + term
    return total


def _l1_backward(
    ctx: Any, needs: tuple[bool, ...], upstream: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients by the operands of an l1 operator; by its signs they are none."""
    maps: tuple[Tensor, Tensor] = ctx.saved_tensors
    none: tuple[None, None] = None, None
    if COST in ctx.operator.operands:
        return (*none, _l1_tangent(ctx, ctx.operator.results, upstream) if needs[2] else None)
    grads: tuple[Tensor | None, ...] = none
    if upstream[0] is not None and all(needs[-2:]):
        grads = _derive(_L1_GRADS, ctx.layer, *maps, upstream[0])
    elif upstream[0] is not None:
        grads = tuple(
            _derive(operator, ctx.layer, *maps, upstream[0])[0] if need else None
            for operator, need in zip(_L1_OF_SLOT, needs[-2:], strict=True)
        )
    return grads if ctx.operator is _L1_COST else (*none, *grads)


def _l1_jvp(ctx: Any, tangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Return how the results of an l1 operator change with its operands, its signs apart."""
    maps: tuple[Tensor, Tensor] = ctx.saved_tensors
    operator: _Operator = ctx.operator
    if COST not in operator.operands:
        return (_l1_tangent(ctx, _MAPS, tangents[-2:]),)
    if tangents[2] is None:
        return tuple(torch.zeros_like(maps[0]) for _ in operator.results)
    return _derive(operator, ctx.layer, *maps, tangents[2])


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
    return _derive(_L1_TANGENT, ctx.layer, *maps, *filled)[0]


# How torch's dispatcher knows of the operators.


def _keys(*names: str) -> torch._C.DispatchKeySet:
    first, *others = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, n)) for n in names)
    for other in others:
        first = first | other
    return first


_AUTOCAST = _keys("AutocastCPU", "AutocastCUDA")
_PLAIN = _keys(
    *("CPU", "CUDA", "BackendSelect", "ADInplaceOrView"),
    *("AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA"),
).raw_repr()
"""Dispatch keys under which the dispatcher runs a device's kernel, between autograd and that."""


def _is_plain(tensors: tuple[Tensor, ...]) -> bool:
    """Tell whether all that the dispatcher would do is to differentiate and to compute.

    That is: dense tensors on the CPU or a CUDA device; no subclass, transform, tracer or mode. What
    surrounds the engine then takes a third of the time that it takes with the dispatcher and its
    Python kernels, two thirds for both passes; that is a fifth of a forward call on maps of 4 x 4
    pixels.
    """
    keys = torch._C._dispatch_tls_local_include_set().raw_repr()
    for tensor in tensors:
        keys |= torch._C._dispatch_keys(tensor).raw_repr()
    return not keys & ~_PLAIN and not torch.overrides.has_torch_function(tensors)


def _is_differentiated(tensors: Iterable[Tensor]) -> bool:
    """Tell whether a derivative, in reverse or forward mode, may be asked for."""
    return forward_ad._current_level >= 0 or (
        torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    )


def _dispatch(operator: _Operator, layer: Layer, *operands: Tensor) -> tuple[Tensor, ...]:
    """Call an operator through the dispatcher."""
    results = operator.function(*operands, *_fields(layer))
    return results if isinstance(results, tuple) else (results,)


def _dispatch_below_autograd(
    operator: _Operator, layer: Layer, *operands: Tensor
) -> tuple[Tensor, ...]:
    """Call an operator through the dispatcher, for values at this level of differentiation.

    A transform of torch.func may differentiate on another level below; autograd.Function has
    switched that off for its own.
    """
    with (
        torch.enable_grad(),
        forward_ad._set_fwd_grad_enabled(True),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        return _dispatch(operator, layer, *operands)


def _autograd_kernel(operator: _Operator, *arguments: Any) -> Any:
    _learn_sharding()
    if torch.onnx.is_in_onnx_export() and operator is _COST:
        _warn_of_onnx()
    operands, layer = _parse(operator, arguments)
    if _is_differentiated(operands) or torch._C._are_functorch_transforms_active():
        # autograd.Function.apply would start again at the top.
        with enable_single_level_autograd_function():
            results = _SingleLevelDerivative.apply(  # type: ignore[attr-defined]
                _dispatch_below_autograd, operator, layer, *operands
            )
    else:
        results = _dispatch_below_autograd(operator, layer, *operands)
    return _returned(operator, results)


def _warn_of_onnx() -> None:
    """Name what an export to ONNX lacks, which torch's own error will not name."""
    if "cupycorr.onnx" not in sys.modules:
        warnings.warn(
            "cupycorr::cost must be translated to ONNX, got no translation; with dynamo=True pass "
            "custom_translation_table=cupycorr.onnx.translation_table(), with dynamo=False "
            "call cupycorr.onnx.register_symbolic() first",
            stacklevel=3,
        )


def _learn_sharding() -> None:
    """Tell distributed tensors about the operators, once somebody has imported those."""
    if "torch.distributed.tensor" in sys.modules:
        _register_sharding()


@cache
def _register_sharding() -> None:
    from cupycorr.torch import sharding as torch_sharding

    for operator in _OPERATORS:
        torch_sharding.register(operator.function)


def _kernel(operator: _Operator, *arguments: Any) -> Any:
    operands, layer = _parse(operator, arguments)
    # Graphs that were traced or exported come here with whatever tensors they are given, and the
    # engine would read and write outside of theirs.
    fmap = operands[0]
    if fmap.dim() != 4:
        raise ValueError(
            f"operands of cupycorr::{operator.name} must be maps of shape (N, C, H, W), got "
            f"{tuple(fmap.shape)}"
        )
    shapes = [
        layer.geometry.cost_shape(fmap.shape) if slot == COST else fmap.shape
        for slot in operator.operands
    ]
    if [operand.shape for operand in operands] != shapes:
        raise ValueError(
            f"operands of cupycorr::{operator.name} must have the shapes "
            f"{', '.join(str(tuple(shape)) for shape in shapes)}, got "
            f"{', '.join(str(tuple(operand.shape)) for operand in operands)}"
        )
    if len({operand.device for operand in operands}) > 1:
        raise ValueError(
            f"operands of cupycorr::{operator.name} must be on one device, got "
            f"{', '.join(str(operand.device) for operand in operands)}"
        )
    if len({operand.dtype for operand in operands}) > 1 or fmap.dtype not in _DTYPES:
        raise TypeError(
            f"operands of cupycorr::{operator.name} must have one dtype of "
            f"{', '.join(map(str, _DTYPES))}, got "
            f"{', '.join(str(operand.dtype) for operand in operands)}"
        )
    return _returned(operator, _compute(operator, layer, *operands))


def _fake_kernel(operator: _Operator, *arguments: Any) -> Any:
    """Return results without values; sizes may be symbols, of which nothing may be asked."""
    (fmap, *_), layer = _parse(operator, arguments)
    geometry = layer.geometry
    batch, _, height, width = fmap.shape
    sizes = geometry.y.output_size(height), geometry.x.output_size(width)
    shapes = {FMAP1: fmap.shape, FMAP2: fmap.shape, COST: (batch, *geometry.patch_size, *sizes)}
    results = tuple(fmap.new_empty(shapes[slot]) for slot in operator.results)
    return _returned(operator, results)


def _vmap_kernel(
    operator: _Operator, info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> Any:
    """Fold the batches of vmap into those of the maps; what has none is repeated."""
    operands, layer = _parse(operator, arguments)
    count = info.batch_size
    folded, samples = [], 0
    for tensor, dim in zip(operands, in_dims, strict=False):
        batched = tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        samples = batched.shape[1]
        folded.append(batched.flatten(0, 1))
    results = _dispatch(operator, layer, *folded)
    results = tuple(result.view(count, samples, *result.shape[1:]) for result in results)
    return _returned(operator, results), _returned(operator, (0,) * len(results))


def _autocast_kernel(operator: _Operator, fmap1: Tensor, fmap2: Tensor, *fields: Any) -> Any:
    fmap1, fmap2 = autocast(fmap1, fmap2)
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return operator.function(fmap1, fmap2, *fields)


_DTYPES = tuple(getattr(torch, name) for name in DTYPES)
_FIELDS = Axis._fields
"""What an operator takes of a geometry, each as two ints."""


def _fields(layer: Layer) -> tuple[Any, ...]:
    """Return a layer as the arguments of an operator."""
    return (*(getattr(layer.geometry, name) for name in _FIELDS), layer.normalize)


@lru_cache(maxsize=1024)
def _layer(similarity: str, normalize: bool, *fields: tuple[int, int]) -> Layer:
    return Layer(Geometry(*fields), similarity, normalize)


def _parse(operator: _Operator, arguments: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], Layer]:
    """Take an operator's arguments apart: operands, and the layer."""
    count = len(operator.operands)
    fields = map(tuple, arguments[count:-1])
    return arguments[:count], _layer(operator.similarity, arguments[-1], *fields)


def _returned(operator: _Operator, results: tuple[Any, ...]) -> Any:
    """Return one result bare, as schemas have it."""
    return results if len(operator.results) > 1 else results[0]


def _register(library: torch.library.Library) -> None:
    """Define the operators and what they mean under each dispatch key."""
    fields = ", ".join(f"int[2] {name}" for name in _FIELDS)
    for operator in _OPERATORS:
        operands = ", ".join(f"Tensor {_INPUTS[slot]}" for slot in operator.operands)
        results = ", ".join("Tensor" for _ in operator.results)
        library.define(  # type: ignore[no-untyped-call]
            f"{operator.name}({operands}, {fields}, bool normalize) -> ({results})",
            tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
        )
        library.impl(operator.name, partial(_kernel, operator), "CPU")  # type: ignore[no-untyped-call]
        library.impl(operator.name, partial(_kernel, operator), "CUDA")  # type: ignore[no-untyped-call]
        library.impl(operator.name, partial(_autograd_kernel, operator), "Autograd")  # type: ignore[no-untyped-call]
        qualified = f"cupycorr::{operator.name}"
        torch.library.register_fake(qualified, partial(_fake_kernel, operator), lib=library)
        torch.library.register_vmap(qualified, partial(_vmap_kernel, operator), lib=library)
    for operator, key in product((_COST, _L1_COST), ("AutocastCPU", "AutocastCUDA")):
        library.impl(operator.name, partial(_autocast_kernel, operator), key)  # type: ignore[no-untyped-call]


_LIBRARY = torch.library.Library("cupycorr", "FRAGMENT")  # type: ignore[no-untyped-call]
_register(_LIBRARY)
