"""Train a network on several processes, on one machine or many.

    torchrun --nproc-per-node 2 distributed_training.py
    torchrun --nproc-per-node 2 distributed_training.py --shard

Every process has its own part of each batch; with --shard also its own part of the weights.
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cupycorr import SpatialCorrelationSampler


class Motion(nn.Module):
    """Tells by how many pixels an image moved."""

    def __init__(self, reach=2):
        super().__init__()
        self.features = nn.Conv2d(1, 8, kernel_size=3, padding=1)
        self.match = SpatialCorrelationSampler(patch_size=2 * reach + 1)
        self.decide = nn.Linear((2 * reach + 1) ** 2, (2 * reach + 1) ** 2)

    def forward(self, image1, image2):
        cost = self.match(self.features(image1), self.features(image2))
        return self.decide(cost.flatten(1, 2).mean((2, 3)))


def batch(samples, generator, reach=2, size=16):
    """Return random images, the same moved by whole pixels, and the number of each movement."""
    first = torch.randn(samples, 1, size, size, generator=generator)
    moved = torch.randint((2 * reach + 1) ** 2, (samples,), generator=generator)
    shifts = [divmod(int(number), 2 * reach + 1) for number in moved]
    second = [
        image.roll((y - reach, x - reach), (1, 2))
        for image, (y, x) in zip(first, shifts, strict=True)
    ]
    return first, torch.stack(second), moved


def train(mesh, shard=False, steps=40):
    """Train on the processes of a mesh; yield every tenth step, and its loss on average."""
    torch.manual_seed(0)  # the same weights everywhere
    net = Motion().to(mesh.device_type)
    net = fully_shard(net, mesh=mesh) if shard else DistributedDataParallel(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)

    data = torch.Generator().manual_seed(dist.get_rank())  # other images everywhere
    for step in range(1, steps + 1):
        image1, image2, moved = (part.to(mesh.device_type) for part in batch(16, data))
        loss = nn.functional.cross_entropy(net(image1, image2), moved)
        optimizer.zero_grad()
        loss.backward()  # averages gradients over the processes
        optimizer.step()

        mean = loss.detach()
        dist.all_reduce(mean, dist.ReduceOp.SUM)
        if step == 1 or step % 10 == 0:
            yield step, mean.item() / dist.get_world_size()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shard", action="store_true", help="shard the weights (FSDP2)")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()

    accelerated = torch.cuda.is_available()
    dist.init_process_group("nccl" if accelerated else "gloo")
    # Also sets the CUDA device.
    mesh = init_device_mesh("cuda" if accelerated else "cpu", (dist.get_world_size(),))
    for step, loss in train(mesh, options.shard, options.steps):
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss:.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
