"""The operators as torch's dispatcher knows them: schemas, values, shapes, batches, gradients.

The operators are defined when this module is imported; ``import cupycorr.torch`` does that.
"""

from __future__ import annotations

import sys
import warnings
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from cupycorr.geometry import Axis, Geometry
from cupycorr.layer import DTYPES, Layer
from cupycorr.torch import derivatives
from cupycorr.torch.derivatives import COST, FMAP1, FMAP2, INPUTS, OPERATORS, Operator

_DTYPES = tuple(getattr(torch, name) for name in DTYPES)


def check(fmap1: Tensor, fmap2: Tensor) -> None:
    """Refuse tensors that hold no dense memory of a device that is known.

    Raises
    ------
    TypeError
        If a map is not dense, but sparse for instance.
    RuntimeError
        If the maps are on another kind of device than CPU, CUDA and meta.
    """
    if not fmap1.is_cuda and fmap1.device.type not in ("cpu", "meta"):
        raise RuntimeError(
            f"the maps must be on the CPU or on a CUDA device, got {fmap1.device}; move them with "
            ".cpu()"
        )
    if not (fmap1.layout is fmap2.layout is torch.strided):
        raise TypeError(
            f"the maps must be dense tensors, got {fmap1.layout} and {fmap2.layout}; convert them "
            "with .to_dense()"
        )


def traces(fmap: Tensor) -> bool:
    """Tell whether torch traces or a subclass stands for a tensor, so that sizes may be symbols."""
    return torch.compiler.is_compiling() or type(fmap) is not Tensor


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


# The functions that torch calls for an operator, one for each dispatch key.


def _kernel(operator: Operator, *arguments: Any) -> Any:
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
    return _returned(derivatives.compute(operator, layer, *operands))


def _fake_kernel(operator: Operator, *arguments: Any) -> Any:
    """Return results without values; sizes may be symbols, of which nothing may be asked."""
    operands, layer = _parse(operator, arguments)
    fmap, geometry = operands[0], layer.geometry
    batch, _, height, width = fmap.shape
    sizes = geometry.y.output_size(height), geometry.x.output_size(width)
    shapes = {FMAP1: fmap.shape, FMAP2: fmap.shape, COST: (batch, *geometry.patch_size, *sizes)}
    return _returned(
        derivatives.allocate(operator, operands, [shapes[slot] for slot in operator.results])
    )


def _warn_of_onnx() -> None:
    """Name what an export to ONNX lacks, which torch's own error will not name."""
    if "cupycorr.onnx" not in sys.modules:
        warnings.warn(
            "cupycorr::cost must be translated to ONNX, got no translation; pass "
            "custom_translation_table=cupycorr.onnx.translation_table()",
            stacklevel=3,
        )


def _vmap_kernel(
    operator: Operator, info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> Any:
    """Fold the batches of vmap into those of the maps; what has none is repeated."""
    operands, layer = _parse(operator, arguments)
    count = info.batch_size
    batches = [
        t.expand(count, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(operands, in_dims, strict=False)
    ]
    results = derivatives.dispatch(operator, layer, *(t.flatten(0, 1) for t in batches))
    results = tuple(t.reshape(*batches[0].shape[:2], *t.shape[1:]) for t in results)
    return _returned(results), _returned((0,) * len(results))


def _autograd_kernel(operator: Operator, *arguments: Any) -> Any:
    if torch.onnx.is_in_onnx_export() and operator is derivatives.OF_COST:
        _warn_of_onnx()
    operands, layer = _parse(operator, arguments)
    return _returned(derivatives.derive_on_one_level(operator, layer, *operands))


def _autocast_kernel(operator: Operator, fmap1: Tensor, fmap2: Tensor, *fields: Any) -> Any:
    fmap1, fmap2 = autocast(fmap1, fmap2)
    with torch.autocast(fmap1.device.type, enabled=False):
        return derivatives.registered(operator)(fmap1, fmap2, *fields)


@lru_cache(maxsize=1024)
def _layer(similarity: str, normalize: bool, *fields: tuple[int, int]) -> Layer:
    layer = Layer(Geometry(*fields), similarity, normalize)
    if layer.geometry.descends:
        spacing = layer.geometry.dilation_patch
        raise ValueError(f"dilation_patch of an operator must be at least 1, got {spacing}")
    return layer


def _parse(operator: Operator, arguments: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], Layer]:
    """Take an operator's arguments apart: operands, and the layer."""
    count = len(operator.operands)
    fields = map(tuple, arguments[count:-1])
    return arguments[:count], _layer(operator.similarity, arguments[-1], *fields)


def trace(layer: Layer, fmap1: Any, fmap2: Any) -> Any:
    """Call the operator of the cost volume on what torch.fx traces with: one node of its graph."""
    operator = derivatives.OF_L1_COST if layer.l1 else derivatives.OF_COST
    (cost,) = derivatives.dispatch(operator, layer, fmap1, fmap2)
    return cost


def _flops(operator: Operator, *arguments: Any, out_shape: Any = None) -> int:
    """Count two operations for each pair of positions in the maps and each result, by shapes."""
    (shape, *_), layer = _parse(operator, arguments)
    return 2 * len(operator.results) * layer.geometry.multiply_adds(tuple(shape))


def _returned(results: tuple[Any, ...]) -> Any:
    """Return one result bare, as schemas have it."""
    return results if len(results) > 1 else results[0]


def _register(library: torch.library.Library) -> None:
    """Define the operators and what they mean."""
    fields = ", ".join(f"int[2] {name}" for name in Axis._fields)
    for operator in OPERATORS:
        operands = ", ".join(f"Tensor {INPUTS[slot]}" for slot in operator.operands)
        results = ", ".join("Tensor" for _ in operator.results)
        library.define(  # type: ignore[no-untyped-call]
            f"{operator.name}({operands}, {fields}, bool normalize) -> ({results})",
            tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
        )
        for key, kernel in (("CPU", _kernel), ("CUDA", _kernel), ("Autograd", _autograd_kernel)):
            library.impl(operator.name, partial(kernel, operator), key)  # type: ignore[no-untyped-call]
        qualified = f"cupycorr::{operator.name}"
        torch.library.register_fake(qualified, partial(_fake_kernel, operator), lib=library)
        register_flop_formula(getattr(torch.ops.cupycorr, operator.name))(partial(_flops, operator))
        torch.library.register_vmap(qualified, partial(_vmap_kernel, operator), lib=library)
    for operator in (derivatives.OF_COST, derivatives.OF_L1_COST):
        for key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(operator.name, partial(_autocast_kernel, operator), key)  # type: ignore[no-untyped-call]


_LIBRARY = torch.library.Library("cupycorr", "FRAGMENT")  # type: ignore[no-untyped-call]
_register(_LIBRARY)
