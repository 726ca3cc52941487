"""torchvision's RAFT with cupycorr's lookup in place of its volume of all pairs.

    pip install torchvision '.[torch]'
    python examples/torchvision_raft.py check
    python examples/torchvision_raft.py time --size 436 1024

The one line that changes is ``raft_large(corr_block=CorrBlock())``. ``check`` holds both networks,
with random weights, to their own blocks: flows and the gradients of all weights, in float32 and in
float64, as `ptlflow_networks.judge` says.

``time`` makes random maps of an eighth of an image's size, and looks them up 12 times around a
smooth flow, as a network does. Each way runs in a process of its own, and its memory is what that
process's peak grows by. Times are minima with medians in brackets.
"""

import argparse
import multiprocessing
import resource
import time
from statistics import median

import torch
from ptlflow_networks import DTYPES, Results, judge
from torchvision.models import optical_flow
from torchvision.models.optical_flow import raft

from cupycorr.compat.torchvision import CorrBlock

NETWORKS = {"raft_small": (optical_flow.raft_small, 3), "raft_large": (optical_flow.raft_large, 4)}
WAYS = {"torchvision": raft.CorrBlock, "cupycorr": CorrBlock}
ITERATIONS, CHANNELS = 12, 256


def results(make, block, dtype):
    """Return a network's flow and the gradients of its weights, in float64."""
    # Weights and images are made in float32, so that they are the same in both dtypes.
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    net = make(corr_block=block).to(dtype).eval()
    texture = torch.rand(1, 3, 32, 40)
    image = torch.nn.functional.interpolate(texture, (128, 160), mode="bicubic").to(dtype)
    torch.set_default_dtype(dtype)
    flow = net(image, image.roll((2, -3), (2, 3)), num_flow_updates=ITERATIONS)[-1]
    flow.square().mean().backward()
    grads = [weight.grad.flatten() for weight in net.parameters() if weight.grad is not None]
    return Results(flow.detach().double().numpy(), torch.cat(grads).double().numpy())


def check():
    """Compare the networks with both blocks; return what is off."""
    grid, wrong = raft.make_coords_grid, []
    # torchvision's coordinates are always float32, which its own block then refuses in float64.
    raft.make_coords_grid = lambda *size: grid(*size).to(torch.get_default_dtype())
    for name, (make, radius) in NETWORKS.items():
        found = {way: [] for way in WAYS}
        for dtype in map(torch.__dict__.get, DTYPES):
            for way, block in WAYS.items():
                found[way].append(results(make, block(radius=radius), dtype))
        # These networks do not leap: what is off counts.
        errors, off = judge(*found.values(), nudged=found["torchvision"][-1].flow)
        shown = " / ".join(f"{error:.1e}" for error in errors)
        print(f"{name}: flows, gradients off by, torchvision / cupycorr: {shown}", flush=True)
        wrong += [f"{name}: {what}" for what in off]
    return wrong


def measure(way, size, runs, threads, send):
    """Send the seconds of each run's preparation and lookups, and the peak memory in bytes."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    height, width = (-(-side // 8) for side in size)
    fmap1, fmap2 = torch.randn(2, 1, CHANNELS, height, width, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    coords = torch.stack([columns + 3.3 + rows / 40, rows - 2.6 + columns / 60])[None]
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    with torch.no_grad():
        for _ in range(runs):
            start = time.process_time()
            block = WAYS[way]()
            block.build_pyramid(fmap1, fmap2)
            built = time.process_time()
            for _ in range(ITERATIONS):
                block.index_pyramid(coords)
            times.append((built - start, (time.process_time() - built) / ITERATIONS))
    send.send((times, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))


def measured(way, size, runs, threads):
    """Return a row of the table."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(way, size, runs, threads, send))
    process.start()
    send.close()
    try:
        times, memory = receive.recv()
    except EOFError:
        return [way, "does not fit"]
    finally:
        process.join()
    whole = [built + ITERATIONS * each for built, each in times]
    columns = (*zip(*times, strict=True), whole)
    cells = [f"{1e3 * min(column):.0f} ({1e3 * median(column):.0f})" for column in columns]
    return [way, *cells, f"{memory / 1e6:.0f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--size", nargs=2, type=int, default=(436, 1024), metavar=("H", "W"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.what == "check":
        raise SystemExit("\n".join(check()))
    heads = ["block", "once ms", "each lookup ms", f"with {ITERATIONS} lookups ms", "memory MB"]
    print("|", " | ".join(heads), "|")
    print("|" + "---|" * len(heads))
    for way in WAYS:
        row = measured(way, options.size, options.runs, options.threads)
        print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
