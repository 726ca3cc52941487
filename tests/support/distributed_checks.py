"""Checks that several processes run together, for test_distributed.py; prints one line each.

Maps and weights are small integers, so that sums are the same in whatever order they are added.
"""

import json

import distributed_training
import torch
import torch.distributed as dist
from tensors import difference, integers, pair
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import register_sharding
from torch.nn.parallel import DistributedDataParallel

import cupycorr
from cupycorr import Geometry
from cupycorr.torch import sharding as torch_sharding

SHAPE = (4, 3, 6, 7)
GEOMETRY = Geometry(2, (3, 4), 1, 1, 1, 2)
EVERY = slice(None)


class Towers(torch.nn.Module):
    """A cost volume of two maps' features."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False, dtype=torch.float64)
        self.features.weight.data = integers(self.features.weight.shape, seed=2)

    def forward(self, image1, image2):
        return cupycorr.correlation(self.features(image1), self.features(image2), GEOMETRY)


def gradient(net, part=EVERY):
    """Return the gradient of the weights for a part of the batch."""
    net(*(m[part] for m in pair(SHAPE))).square().sum().backward()
    (weight,) = net.parameters()
    return weight.grad


def averaged(wrap):
    """Compare the gradient of wrapped networks with the mean over the processes of one's own."""
    count = SHAPE[0] // dist.get_world_size()
    part = slice(dist.get_rank() * count, (dist.get_rank() + 1) * count)
    got = gradient(wrap(Towers()), part)
    got = got.full_tensor() if hasattr(got, "full_tensor") else got
    return difference(got, gradient(Towers()) / dist.get_world_size())


def sharded(placements, geometry=GEOMETRY, shape=SHAPE, function=None, normalize=False):
    """Compare the cost of distributed maps, and both gradients, with those of whole ones.

    They are to be placed as the maps are, if those are sharded over the batch, or whole.
    """
    function = cupycorr.correlation if function is None else function

    def results(maps):
        cost = function(*maps, geometry, normalize=normalize)
        return cost, *torch.autograd.grad(cost.square().sum(), maps, create_graph=True)

    whole = pair(shape, differentiable=True)
    parts = [
        distribute_tensor(m.detach(), MESH, [p]).requires_grad_()
        for m, p in zip(whole, placements, strict=True)
    ]
    got = results(parts)
    if set(placements) in ({Shard(0)}, {Replicate()}):
        misplaced = [t.placements for t in got if t.placements != (placements[0],)]
        if misplaced:
            return f"placed as {misplaced}"
    return difference(tuple(t.full_tensor() for t in got), results(whole))


def silent():
    """Find communication between processes, of which there is to be none."""
    maps = [distribute_tensor(m, MESH, [Shard(0)]).requires_grad_() for m in pair(SHAPE)]
    with CommDebugMode() as communication:
        cost = cupycorr.correlation(*maps, GEOMETRY)
        torch.autograd.grad(cost, maps, torch.ones_like(cost))
    count = communication.get_total_counts()
    return f"{count} collectives" if count else None


def without_autograd():
    with torch.inference_mode():
        maps = [distribute_tensor(m, MESH, [Shard(0)]) for m in pair(SHAPE)]
        got = cupycorr.correlation(*maps, GEOMETRY)
    return difference(got.full_tensor(), cupycorr.correlation(*pair(SHAPE), GEOMETRY))


def second_derivatives():
    def results(maps):
        cost = cupycorr.correlation(*maps, GEOMETRY)
        (first,) = torch.autograd.grad(cost.square().sum(), maps[0], create_graph=True)
        return torch.autograd.grad(first.square().sum(), maps)

    whole = pair(SHAPE, differentiable=True)
    parts = [distribute_tensor(m.detach(), MESH, [Shard(0)]).requires_grad_() for m in whole]
    return difference(tuple(t.full_tensor() for t in results(parts)), results(whole))


def compiled():
    function = torch.compile(cupycorr.correlation, backend="aot_eager", fullgraph=True)
    return sharded((Shard(0), Shard(0)), function=function)


def planted():
    """Expect an error where maps are cut into rows, as if rows did not meet."""

    def rows(*_):
        return [([Shard(3)], [Shard(2)] * 2 + [None] * 8)]

    register_sharding(torch.ops.cupycorr.cost.default)(rows)
    geometry = Geometry(patch_size=5)
    maps = [distribute_tensor(m, MESH, [Shard(2)]) for m in pair(SHAPE)]
    got = cupycorr.correlation(*maps, geometry).full_tensor()
    return None if difference(got, cupycorr.correlation(*pair(SHAPE), geometry)) else "not caught"


def unknown_torch():
    """Expect a clear error on a torch whose rules are not where they were, and only there."""

    def moved():
        raise AttributeError("no such rules")

    torch_sharding._rules = moved
    torch_sharding.register(torch.ops.cupycorr.cost.default)
    cupycorr.correlation(*pair(SHAPE), GEOMETRY)  # plain tensors do not matter
    maps = [distribute_tensor(m, MESH, [Shard(0)]) for m in pair(SHAPE)]
    try:
        cupycorr.correlation(*maps, GEOMETRY)
    except RuntimeError as error:
        clear = "cupycorr knows" in str(error) and "no such rules" in str(error)
        return None if clear else f"unclear: {error}"
    return "no error"


def learning(shard):
    """Find that the example does not learn."""
    (_, first), *_, (_, last) = distributed_training.train(MESH, shard)
    guessing = 3.2  # log(25)
    return None if first > 0.9 * guessing and last < 0.1 else f"losses {first} to {last}"


BATCH, WHOLE = Shard(0), Replicate()
# Each returns what is wrong, or None. What is planted comes last: it stays.
CHECKS = {
    # Comes first: torch has not yet been told about the operators.
    "the first call may be compiled": compiled,
    "ddp averages gradients": lambda: averaged(DistributedDataParallel),
    "fsdp averages gradients": lambda: averaged(lambda net: fully_shard(net, mesh=MESH)),
    "batches stay sharded": lambda: sharded((BATCH, BATCH)),
    "whole maps stay whole": lambda: sharded((WHOLE, WHOLE)),
    "another geometry has its own shape": lambda: sharded((BATCH, BATCH), Geometry(1, 5)),
    "normalized costs": lambda: sharded((BATCH, BATCH), Geometry(2, 3), normalize=True),
    "uneven batches": lambda: sharded((BATCH, BATCH), shape=(3, 4, 5, 6)),
    "one map sharded": lambda: sharded((BATCH, WHOLE)),
    "channels sharded": lambda: sharded((Shard(1), Shard(1))),
    "rows sharded": lambda: sharded((Shard(2), Shard(2))),
    "sharded batches need no communication": silent,
    "without autograd": without_autograd,
    "second derivatives": second_derivatives,
    "the example learns with sharded weights": lambda: learning(shard=True),
    "a wrong rule is caught": planted,
    "an unknown torch is named": unknown_torch,
}

if __name__ == "__main__":
    dist.init_process_group("gloo")
    MESH = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, check in CHECKS.items():
        try:
            error = check()
        except Exception as exception:
            error = f"{type(exception).__name__}: {exception}"
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        if dist.get_rank() == 0:
            print(json.dumps({name: next(filter(None, errors), None)}), flush=True)
    dist.destroy_process_group()
