"""Networks of the package ptlflow, with cupycorr in place of the cost volumes they come with.

    python -m venv ptl
    ptl/bin/python -m pip install torch torchvision ptlflow==0.4.2 '.[torch]'
    ptl/bin/python examples/ptlflow_networks.py

ptlflow's networks take their cost volumes from spatial-correlation-sampler where it is installed,
and else from plain torch, which samples the second map once per displacement. Here each of them
runs with plain torch and with cupycorr, with the same random weights, on the same images, each way
in a process of its own. ``--ways spatial-correlation-sampler`` times that as well.

RAFT-like networks have a block each, that holds the products of all pairs of positions; here
cupycorr's takes its place, which looks costs up on demand. The images must then be 128 pixels high
and wide, or more.

Every cost volume that a network asks cupycorr for, and its gradients, are held to slices of maps in
float64, within what `cupycorr.verify` allows float32 to round; every lookup is held to one in
float64. Whole networks, their flows and the
gradients of all weights by the flows' mean square, are held to plain torch as well: in float64 they
may differ by as much as float32 does, 2**29 times less, and in float32 flows may be off by at most
twice what they are with plain torch. This needs networks that are continuous. Some zero warped
features wherever a warped map of ones is below 1, which rounding makes it anywhere; these are known
by flows that leap with plain torch when images change in float64's last bits, and of them only the
cost volumes are judged.

Times are of single runs, the ways in turns, with as many threads each. ``--clock cpu`` counts the
processor's time instead, for a machine that others use; with one thread, as others wait spinning.
The script prints a table in Markdown, of medians with minima in brackets, and fails if results
differ by more than that.

``--memory`` judges nothing. It measures forward passes alone, and by how much they raise the peak
memory of a process that has made the network, each way in a new one. Times are then minima.
"""

import argparse
import copy
import resource
import sys
import time
import warnings
from multiprocessing import get_context
from statistics import median
from typing import NamedTuple
from unittest import mock

PLAIN, OURS, COMPILED = "plain torch", "cupycorr", "spatial-correlation-sampler"
CLIENTS = (
    "flownetc", "flownetcs", "flownetcss", "flownet2", "pwcnet", "pwcnet_nodc", "irr_pwcnet",
    "irr_pwcnet_irr", "liteflownet", "liteflownet2", "liteflownet2_pseudoreg", "liteflownet3",
    "liteflownet3_pseudoreg", "liteflownet3s", "liteflownet3s_pseudoreg", "hd3", "hd3_ctxt",
    "maskflownet", "maskflownet_s", "scopeflow", "starflow", "fastflownet", "neuflow",
)  # fmt: skip
"""All that use the package; some others import it and go ways of their own."""
LOOKUPS = {
    "raft": "raft", "raft_small": "raft", "gma": "gma", "sea_raft_s": "sea_raft",
    "sea_raft_m": "sea_raft", "skflow": "skflow",
    "streamflow": "streamflow", "rapidflow": "rapidflow", "rpknet": "rpknet",
    "ms_raft_p": "ms_raft_plus", "ccmr": "ccmr", "dpflow": "dpflow",
    "memflow": "memflow.MemFlowNet", "memflow_t": "memflow.MemFlowNet",
    "videoflow_bof": "videoflow.Networks.BOFNet",
    "videoflow_mof": "videoflow.Networks.MOFNetStack", "flow_anything": "flow_anything",
    "flowseek_t": "flowseek", "flowseek_m": "flowseek", "recover_mn": "recover",
    "recover_rn": "recover", "recover_cx": "recover",
}  # fmt: skip
"""RAFT-like networks, and the package that has their block.

splatflow, matchflow and memfof have such a block too, but need CuPy, an extension of their own, and
weights that are downloaded. Left out are variants of these in size (sea_raft and sea_raft_l,
rapidflow_it1 and so on, ccmr_p) and networks that look something else up: gmflownet reads all
products; craft, csflow, lcv_raft, llaflow and separableflow change or join them; scv keeps the
largest; flow1d has rows and columns; neuflow2's block is called in another way; gmflow_refine
and unimatch sample warped maps. Networks for stereo are not in the package.
"""
FRAMES = {"streamflow": 4, "videoflow_bof": 3, "videoflow_mof": 5}
TWICE, FLOAT64, NUDGE, LEAP = 2, 2.0**-29, 2.0**-50, 2.0**-20
DTYPES = ("float32", "float64")
FLOAT32_ONLY = ("neuflow",)
SAMPLES = 10**6
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Results(NamedTuple):
    """Arrays in float64, of a run in one dtype; every nth gradient where there are millions."""

    flow: object
    gradients: object


class Worker:
    """The networks, one at a time, with one way to compute cost volumes, which imports decide.

    way : PLAIN, OURS or COMPILED
    threads : int, how many torch is to use
    clock : str, key of CLOCKS
    """

    def __init__(self, way, threads, clock):
        warnings.filterwarnings("ignore")
        if way == PLAIN:
            sys.modules["spatial_correlation_sampler"] = None  # as if it were not installed
        elif way == OURS:
            from cupycorr.compat import ptlflow, stand_in_for

            stand_in_for("spatial_correlation_sampler")
            for package in LOOKUPS.values():
                stand_in_for(f"ptlflow.models.{package}.corr", ptlflow)
        import ptlflow
        import torch

        torch.set_num_threads(threads)
        self.ptlflow, self.torch, self.clock = ptlflow, torch, CLOCKS[clock]

    def load(self, name, size):
        """Make a network, and images of a moving texture; return the sum of the weights."""
        torch = self.torch
        torch.manual_seed(0)
        self.net = self.ptlflow.get_model(name).eval()
        texture = torch.rand(1, 3, *(side // 4 for side in size))
        image = torch.nn.functional.interpolate(texture, size, mode="bicubic").clamp(0, 1)
        frames = [image.roll((2 * n, -3 * n), (2, 3)) for n in range(FRAMES.get(name, 2))]
        self.images = torch.stack(frames, 1)
        return sum(parameter.double().sum().item() for parameter in self.net.parameters())

    def results(self, dtypes):
        """Return results in each of some dtypes."""
        return [self._results(getattr(self.torch, dtype), self.images) for dtype in dtypes]

    def nudged(self):
        """Return the flow in float64 for images that differ in the last bits."""
        return self._results(self.torch.float64, self.images.double() * (1 + NUDGE)).flow

    def volumes(self):
        """Return of each volume or lookup asked of cupycorr what is wrong with it, or None."""
        from cupycorr.compat import blocks
        from cupycorr.cpu import engine as numpy_engine
        from cupycorr.cpu import lookup as numpy_lookup

        def run(what, arrays, layer, **options):
            asked.append((arrays["fmap1"].copy(), arrays["fmap2"].copy(), layer.geometry))
            compute(what, arrays, layer, **options)

        def run_lookup(what, arrays, lookup, scale, **options):
            compute_lookup(what, arrays, lookup, scale, **options)
            looked_up.append((copy.deepcopy(arrays), lookup, scale))

        asked, looked_up, compute, compute_lookup = [], [], numpy_engine.run, numpy_lookup.run
        with (
            mock.patch.object(numpy_engine, "run", run),
            mock.patch.object(numpy_lookup, "run", run_lookup),
            mock.patch.object(blocks, "SMALL", 0),  # all lookups reach the engine
            self.torch.no_grad(),
        ):
            self._new()({"images": self.images})
        found = [excess(*arguments) for arguments in asked]
        return found + [excess_of_lookup(*arguments) for arguments in looked_up]

    def _new(self):
        """Return the network as it was made: some keep what they compute from weights."""
        return copy.deepcopy(self.net)

    def _results(self, dtype, images):
        torch = self.torch
        torch.set_default_dtype(dtype)  # of what networks make themselves, such as coordinates
        net = self._new().to(dtype)
        flow = step(net, images.to(dtype))
        torch.set_default_dtype(torch.float32)
        grads = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        every = 1 + sum(map(len, grads)) // SAMPLES
        return Results(
            flow.detach().double().numpy(),
            torch.cat([grad[::every] for grad in grads]).double().numpy(),
        )

    def seconds(self, training):
        """Return how long a run takes: forward, or forward and backward."""
        net = self._new()
        start = self.clock()
        if training:
            step(net, self.images)
        else:
            with self.torch.no_grad():
                net({"images": self.images})
        return self.clock() - start

    def memory(self):
        """Return the peak of this process's memory, in MB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def step(net, images):
    """Return a network's flow, whose gradients it then has."""
    flow = net({"images": images})["flows"]
    flow.square().mean().backward()
    return flow


def excess(fmap1, fmap2, geometry):
    """Compare a cost volume and its gradients with slices in float64; describe what is off."""
    import torch
    from cupycorr.cli.bench.peers import slices

    from cupycorr import correlation, verify

    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(geometry.cost_shape(fmap1.shape), generator=generator)
    tensors = (torch.from_numpy(fmap1), torch.from_numpy(fmap2), upstream)

    def run(correlate, arguments):
        maps = [tensor.clone().requires_grad_() for tensor in arguments[:2]]
        cost = correlate(*maps, geometry)
        results = cost.detach(), *torch.autograd.grad(cost, maps, arguments[2])
        return [result.double().numpy() for result in results]

    got = run(correlation, tensors)
    doubles = [tensor.double() for tensor in tensors]
    want, size = run(slices, doubles), run(slices, [tensor.abs() for tensor in doubles])
    displacements = geometry.patch_size[0] * geometry.patch_size[1]
    terms = (fmap1.shape[1], displacements, displacements)
    found = (verify.excess(*each, "float32") for each in zip(got, want, size, terms, strict=True))
    return next(filter(None, found), None)


def excess_of_lookup(arrays, lookup, scale):
    """Compare the costs of a lookup with those in float64; describe what is off.

    Where a position lies between cells is computed in the dtype of coords, as it is there.
    """
    import numpy as np

    from cupycorr import Lookup, correlation_lookup, verify

    one = arrays["fmap1"].astype(np.float64)
    patch = Lookup(lookup.radius, 1, lookup.dilation_patch, order=lookup.order)
    for number, level in enumerate(arrays["levels"]):
        pools = np.array(lookup.pool[::-1], arrays["coords"].dtype) ** number
        place = arrays["coords"] / pools[:, None, None]
        cell = np.floor(place)
        coords = cell.astype(np.float64) + (place - cell)
        two = level.astype(np.float64)
        want = correlation_lookup(one, [two], coords, patch, scale=scale)
        size = correlation_lookup(abs(one), [abs(two)], coords, patch, scale=scale)
        got = arrays["cost"][:, number, None].astype(np.float64)
        # Beside the sum over channels: four weights, three sums of corners and the scale.
        wrong = verify.excess(got, want, size, one.shape[1] + 8, "float32")
        if wrong:
            return f"level {number}: {wrong}"
    return None


def serve(connection, *arguments):
    """Answer calls of a worker's methods until there are no more."""
    worker = Worker(*arguments)
    try:
        while True:
            method, *arguments = connection.recv()
            connection.send(getattr(worker, method)(*arguments))
    except EOFError:
        pass


class Process:
    """A worker in a process of its own."""

    def __init__(self, *arguments):
        context = get_context("spawn")
        self._connection, other = context.Pipe()
        context.Process(target=serve, args=(other, *arguments), daemon=True).start()
        other.close()

    def close(self):
        """Let the process end."""
        self._connection.close()

    def __call__(self, method, *arguments):
        self._connection.send((method, *arguments))
        return self._connection.recv()


def distance(got, want):
    """Return the length of the difference by that of what is wanted."""
    difference = got - want
    return float((difference @ difference / (want @ want)) ** 0.5)


def judge(plain, ours, nudged=None):
    """Return distances from plain torch in the finest dtype, and what is off; see above."""
    shown, wrong = [], []
    for kind in Results._fields:
        want = getattr(plain[-1], kind).ravel()
        first, *others = (
            distance(getattr(result, kind).ravel(), want) for result in (plain[0], *ours)
        )
        shown += [first, others[0]]
        limits = [TWICE * first if kind == "flow" else None, TWICE * FLOAT64 * first]
        for dtype, error, limit in zip(DTYPES, others, limits, strict=False):
            if limit is not None and not error <= limit:  # so that a NaN is off as well
                wrong.append(f"{kind} in {dtype} off by {error:.1e}, allowed {limit:.1e}")
    leaps = nudged is None or distance(nudged.ravel(), plain[-1].flow.ravel()) > LEAP * shown[0]
    return shown, [] if leaps else wrong


def turns(workers, runs, *call):
    """Return each way's times in ms, of calls in turns."""
    times = {way: [] for way in workers}
    for _ in range(runs):
        for way, worker in workers.items():
            times[way].append(1e3 * worker(*call))
    return times


def load(name, workers, size):
    """Make a network in all processes."""
    weights = {worker("load", name, size) for worker in workers.values()}
    if len(weights) != 1:
        raise SystemExit(f"{name}'s weights must be the same in all processes, got {weights}")


def memory_row(name, workers, size, runs):
    """Return a row of the table of forward passes and their memory."""
    load(name, workers, size)
    before = {way: worker("memory") for way, worker in workers.items()}
    times = {way: min(t) / 1e3 for way, t in turns(workers, runs, "seconds", False).items()}
    grown = {way: worker("memory") - before[way] for way, worker in workers.items()}
    cells = [f"{time:.3g}" for time in times.values()]
    cells.append(f"{times[PLAIN] / times[OURS]:.1f}")
    return [name, *cells, *(f"{size:.0f}" for size in grown.values())]


def row(name, workers, size, runs):
    """Compare the ways for one network; return a row of the table, and what is wrong."""
    load(name, workers, size)
    volumes = workers[OURS]("volumes")
    dtypes = DTYPES[:1] if name in FLOAT32_ONLY else DTYPES
    nudged = None if name in FLOAT32_ONLY else workers[PLAIN]("nudged")
    errors, wrong = judge(*(workers[way]("results", dtypes) for way in (PLAIN, OURS)), nudged)
    wrong += [f"cost volume {n}: {what}" for n, what in enumerate(volumes) if what]
    if not volumes:
        wrong.append("asks for no cost volume")
    cells = [name, str(len(volumes))]
    for training in (False, True):
        times = turns(workers, 1 + runs, "seconds", training)
        times = {way: counted for way, (_, *counted) in times.items()}  # without the first ones
        cells += [f"{median(t):.0f} ({min(t):.0f})" for t in times.values()]
        cells.append(f"{median(times[PLAIN]) / median(times[OURS]):.1f}")
        slower = [way for way in times if min(times[way]) < min(times[OURS])]
        if slower:
            print(f"{name}: {' and '.join(slower)} took less time", file=sys.stderr)
    cells += [f"{a:.1e} / {b:.1e}" for a, b in (errors[:2], errors[2:])]
    return cells, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("networks", nargs="*", default=(*CLIENTS, *LOOKUPS), metavar="network")
    parser.add_argument("--size", nargs=2, type=int, default=(256, 320), metavar=("H", "W"))
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--ways", nargs="*", default=(), choices=[COMPILED], help="one more way")
    parser.add_argument("--memory", action="store_true", help="measure forward passes alone")
    options = parser.parse_args()
    ways = [PLAIN, OURS, *options.ways]

    def start():
        return {way: Process(way, options.threads, options.clock) for way in ways}

    head = ["network"]
    if options.memory:
        head += [f"forward s, {way}" for way in ways] + ["times faster"]
        head += [f"memory MB, {way}" for way in ways]
    else:
        head.append("cost volumes")
        for what in ("forward", "training"):
            head += [f"{what} ms, {way}" for way in ways] + ["times faster"]
        head += ["error of flows, plain / cupycorr", "of gradients"]
    print("|", " | ".join(head), "|")
    print("|" + "---|" * len(head))
    workers, failed = start(), False
    for number, name in enumerate(options.networks):
        wrong = []
        if options.memory:
            if number:
                for worker in workers.values():
                    worker.close()
                workers = start()
            cells = memory_row(name, workers, tuple(options.size), options.runs)
        else:
            cells, wrong = row(name, workers, tuple(options.size), options.runs)
        print("|", " | ".join(cells), "|", flush=True)
        for what in wrong:
            print(f"{name}: {what}", file=sys.stderr)
        failed |= bool(wrong)
    sys.exit(failed)


if __name__ == "__main__":
    main()
