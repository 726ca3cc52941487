"""How the operators act on distributed tensors, which are sharded over several processes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding


def register(operator: Any) -> None:
    """Let an operator keep tensors that are sharded over the batch, and replicate all others.

    Samples do not meet, so each process computes those that it has, without communication; the
    operands and results are then sharded alike. With a torch that keeps its rules elsewhere than
    where they are looked for here, the operator refuses distributed tensors.
    """
    results = len(operator._schema.returns)
    operands = sum(str(argument.type) == "Tensor" for argument in operator._schema.arguments)
    others = len(operator._schema.arguments) - operands

    acceptable = [
        ([placement] * results, [placement] * operands + [None] * others)
        for placement in (Replicate(), Shard(0))
    ]
    register_sharding(operator)(lambda *_: acceptable)

    # DTensor remembers the shapes of results by what it takes to determine them, and
    # register_sharding does not count pairs of ints among that. So another geometry would be
    # given the shapes of the first. torch offers no public way to say so.
    try:
        rules = _rules()
        rules[operator] = dataclasses.replace(rules[operator], static_argnum=operands)
    except (AttributeError, KeyError, TypeError) as error:
        _refuse(operator, f"{type(error).__name__}: {error}")


def _rules() -> dict[Any, Any]:
    """Return what DTensor knows of each operator's arguments."""
    rules: dict[Any, Any] = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    return rules


def _refuse(operator: Any, reason: str) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError(
            f"distributed tensors must be those of a torch that cupycorr knows, got torch "
            f"{torch.__version__} ({reason}); gather the maps first, with .full_tensor()"
        )

    register_sharding(operator)(refuse)
