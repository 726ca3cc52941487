"""torchvision's RAFT with cupycorr's lookup in place of its volume of all pairs.

    pip install torchvision '.[torch]'
    python examples/torchvision_raft.py check
    python examples/torchvision_raft.py time --size 436 1024
    python examples/torchvision_raft.py run --size 436 1024

The one line that changes is ``raft_large(corr_block=CorrBlock())``. ``check`` holds both networks,
with random weights, to their own blocks: flows and the gradients of all weights, in float32 and in
float64, as `ptlflow_networks.judge` says.

``time`` makes random maps of an eighth of an image's size, and looks them up 12 times around a
smooth flow, as a network does. ``run`` runs whole networks on two images. Each way runs in a
process of its own, and its memory is what that process's peak grows by. Times are minima with
medians in brackets, of the processor's time.
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


def peak():
    """Return the peak of this process's memory, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def time_block(way, size, runs):
    """Return each run's seconds, of preparing, of one lookup and of all, and memory."""
    generator = torch.Generator().manual_seed(0)
    height, width = (side // 8 for side in size)
    fmap1, fmap2 = torch.randn(2, 1, CHANNELS, height, width, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    coords = torch.stack([columns + 3.3 + rows / 40, rows - 2.6 + columns / 60])[None]
    before, times = peak(), []
    for _ in range(runs):
        start = time.process_time()
        block = WAYS[way]()
        block.build_pyramid(fmap1, fmap2)
        built = time.process_time()
        for _ in range(ITERATIONS):
            block.index_pyramid(coords)
        end = time.process_time()
        times.append((built - start, (end - built) / ITERATIONS, end - start))
    return times, peak() - before


def time_network(way, size, runs, name):
    """Return the seconds of each run of a network, and memory."""
    make, radius = NETWORKS[name]
    net = make(corr_block=WAYS[way](radius=radius)).eval()
    images = torch.rand(2, 1, 3, *size, generator=torch.Generator().manual_seed(0))
    before, times = peak(), []
    for _ in range(runs):
        start = time.process_time()
        net(*images, num_flow_updates=ITERATIONS)
        times.append((time.process_time() - start,))
    return times, peak() - before


def send_measured(send, threads, measure, *arguments):
    torch.set_num_threads(threads)
    with torch.no_grad():
        send.send(measure(*arguments))


def measured(threads, measure, way, *arguments):
    """Return the cells of a row, measured in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=send_measured, args=(send, threads, measure, way, *arguments))
    process.start()
    send.close()
    try:
        times, memory = receive.recv()
    except EOFError:
        return [way, "does not fit"]
    finally:
        process.join()
    columns = zip(*times, strict=True)
    cells = [f"{1e3 * min(column):.0f} ({1e3 * median(column):.0f})" for column in columns]
    return [way, *cells, f"{memory / 1e6:.0f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["check", "time", "run"])
    parser.add_argument("--size", nargs=2, type=int, default=(436, 1024), metavar=("H", "W"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.what == "check":
        raise SystemExit("\n".join(check()) or None)
    size = tuple(-(-side // 8) * 8 for side in options.size)
    if options.what == "time":
        heads = ["block", "once ms", "each lookup ms", f"with {ITERATIONS} lookups ms"]
        calls = [(time_block, way, size, options.runs) for way in WAYS]
    else:
        heads = ["network", "block", "ms"]
        calls = [(time_network, way, size, options.runs, name) for name in NETWORKS for way in WAYS]
    print("|", " | ".join([*heads, "memory MB"]), "|")
    print("|" + "---|" * (len(heads) + 1))
    for call in calls:
        print("|", " | ".join([*call[4:], *measured(options.threads, *call)]), "|", flush=True)


if __name__ == "__main__":
    main()
