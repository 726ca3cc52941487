"""How the operators act on distributed tensors, which are sharded over several processes."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding


def register(operator: Any) -> None:
    """Let an operator keep tensors that are sharded over the batch, and replicate all others.

    Samples do not meet, so each process computes those that it has, without communication; the
    operands and results are then sharded alike.
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
    # given the shapes of the first.
    schemas = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    schemas[operator] = RuntimeSchemaInfo(static_argnum=operands, needs_pytree=True)
