"""Synthetic motion, and training on it: what train_raft.py and train_pwcnet.py share.

Images are random textures; each moves, turns and grows a little. A flow is (x, y): what is at a
position of the first image is at the position plus the flow in the second one.
"""

import argparse
import time

import torch
from torch import nn
from torch.nn import functional

SIZE = 64


def batch(samples, generator, reach=6.0):
    """Return pairs of images (N, 1, SIZE, SIZE), and the flows (N, 2, SIZE, SIZE) between them."""
    texture = torch.randn(samples, 1, SIZE, SIZE, generator=generator)
    shift, turn, grow = torch.split(
        torch.rand(samples, 4, generator=generator) * 2 - 1, [2, 1, 1], 1
    )
    # x moves to matrix @ x + shift, in pixels from the middle.
    turn, grow = 0.05 * turn, 1 + 0.05 * grow
    matrix = torch.stack([grow, -turn, turn, grow], 2).reshape(samples, 2, 2)
    shift = reach * shift
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    x = torch.stack(torch.meshgrid(axis, axis, indexing="xy")).reshape(2, -1)
    moved = matrix @ x + shift[..., None]
    source = torch.linalg.inv(matrix) @ (x - shift[..., None])
    images = []
    for where in (x.expand_as(source), source):
        # A texture of twice the size of the image, whose grains are two pixels.
        at = where.transpose(1, 2).reshape(samples, SIZE, SIZE, 2) / SIZE
        images.append(functional.grid_sample(texture, at, "bicubic", "reflection", False))
    return *images, (moved - x).reshape(samples, 2, SIZE, SIZE)


def error(flow, truth):
    """Return the mean distance of flows, in pixels."""
    return (flow - truth).norm(dim=1).mean()


def train(net, goal, steps, samples=8):
    """Train until flows of new images are right up to ``goal``; yield steps and errors."""
    data = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.05)
    for step in range(1, steps + 1):
        image1, image2, truth = batch(samples, data)
        flows = net(image1, image2)
        loss = sum(0.8**k * error(one, truth) for k, one in enumerate(reversed(flows)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            with torch.no_grad():
                image1, image2, truth = batch(32, torch.Generator().manual_seed(step))
                off = error(net(image1, image2)[-1], truth).item()
            yield step, off
            if off < goal:
                return


def main(make, what):
    """Train a network that ``make`` makes, as the command line says."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--goal", type=float, default=0.5, help="error that is enough, in pixels")
    parser.add_argument("--steps", type=int, default=1000, help="steps at most")
    options = parser.parse_args()
    torch.manual_seed(0)
    start, off = time.perf_counter(), float("inf")
    for step, off in train(make(), options.goal, options.steps):
        print(f"step {step:4}: {off:.2f} pixels, {time.perf_counter() - start:.0f} s", flush=True)
    raise SystemExit(off >= options.goal)
